"""Masked regularisation in the real trainers of SAELens and dictionary_learning: the activations they train on are
ours.

The peers live in an environment of their own: `make test-peers`. Elsewhere these tests are skipped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_project import byte_tokenizer, tiny_model

pytest.importorskip("dictionary_learning")
pytest.importorskip("sae_lens")

import datasets

from masksae import activation_batches, mask_dataset, mask_inputs, mask_tokens
from masksae.activations import from_model
from masksae.data.models import LanguageModel
from masksae.errors import ConfigError
from masksae.tracing import activations

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = dict(
    re.findall(r"test_peers_plugins.py: (\w+) -->\n```python\n(.*?)```", (ROOT / "docs/own.md").read_text(), re.DOTALL)
)
KEYS = {"p": 0.3, "token_id": 1, "seed": 5, "spare": (0,)}
IDS = torch.randint(3, 90, (48, 12), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = 0
CORRUPTED, WHERE = mask_tokens(IDS, **KEYS)


@pytest.fixture
def model():
    return tiny_model("llama")


def ours(model, keep, corrupted=CORRUPTED):
    """Activations at the positions to keep."""
    return activations(model, corrupted, block=1)[keep]


def assert_same_rows(found, expected):
    """Whatever the order: every row of one has its like in the other."""
    distances = torch.cdist(found.double(), expected.double())
    assert len(found) and distances.min(1).values.max() < 1e-4 and distances.min(0).values.max() < 1e-4


def saelens_config(drop, steps, output):
    """What a user of SAELens writes, masking apart."""
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
    from sae_lens.saes import BatchTopKTrainingSAEConfig

    return LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4),
        model_name="tiny", model_class_name="AutoModelForCausalLM", hook_name="model.layers.1",
        dataset_path="", is_dataset_tokenized=True, streaming=False, context_size=12, prepend_bos=False,
        training_tokens=steps * 32, train_batch_size_tokens=32, store_batch_size_prompts=4, n_batches_in_buffer=8,
        exclude_special_tokens=[0, 1] if drop else [0], device="cpu", lr=1e-3, n_checkpoints=0,
        output_path=str(output / "sae"), checkpoint_path=str(output), logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip


@pytest.mark.parametrize("drop", [False, True], ids=["kept", "dropped"])
@pytest.mark.parametrize("stream", [False, True], ids=["Dataset", "IterableDataset"])
def test_saelens_trains_on_our_activations(model, drop, stream, monkeypatch, tmp_path):
    """Its own runner, from a pre-tokenised data set; masked positions dropped by its own option. A stream's masks are
    those of `mask_inputs`."""
    from sae_lens import LanguageModelSAETrainingRunner
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.sae_trainer import SAETrainer

    data = datasets.Dataset.from_dict({"input_ids": IDS.tolist()})
    data = data.to_iterable_dataset() if stream else data
    seen, step = [], SAETrainer._train_step
    monkeypatch.setattr(
        SAETrainer,
        "_train_step",
        lambda self, sae, sae_in: seen.append(sae_in.clone()) or step(self, sae=sae, sae_in=sae_in),
    )
    runner = LanguageModelSAETrainingRunner(
        saelens_config(drop, 48, tmp_path),
        override_dataset=mask_dataset(data, **KEYS),
        override_model=HookedProxyLM(model, byte_tokenizer()),
    )
    runner.run()
    masks = mask_inputs(tiny_model("llama"), **KEYS)
    corrupted, where = (masks.corrupt(IDS), masks.is_masked) if stream else (CORRUPTED, WHERE)
    keep = ~where if drop else torch.ones_like(where)
    keep[:, 0] = False
    assert len(seen) == 48
    assert_same_rows(torch.cat(seen), ours(model, keep, corrupted))


def recorder():
    """A trainer of dictionary_learning that keeps what it is given, and its config."""
    from dictionary_learning.trainers import BatchTopKSAE, BatchTopKTrainer

    seen = []

    class Recorder(BatchTopKTrainer):
        def update(self, step, x):
            seen.append(x.clone())
            return super().update(step, x)

    config = dict(
        trainer=Recorder, dict_class=BatchTopKSAE, activation_dim=16, dict_size=32, k=4, layer=1, lm_name="tiny",
        steps=12, warmup_steps=2, device="cpu", lr=1e-3,
    )  # fmt: skip
    return seen, config


@pytest.mark.parametrize("drop", [False, True], ids=["kept", "dropped"])
def test_dictionary_learning_trains_on_our_batches(model, drop):
    stream = from_model(
        LanguageModel("tiny", model, None, ""), IDS, block=1, p=0.3, token_id=1, mask_seed=5, bos_id=0,
        batch_size=32, seed=0, progress=False,
    )  # fmt: skip
    from dictionary_learning.training import trainSAE

    seen, config = recorder()
    trainSAE(activation_batches(stream, drop_masked=drop), [config], steps=stream.batches_per_epoch, device="cpu")
    seen = torch.cat(seen)
    keep = ~WHERE if drop else torch.ones_like(WHERE)
    keep[:, 0] = False
    expected = ours(model, keep)
    distances = torch.cdist(seen.double(), expected.double()).min(1).values
    assert len(seen) == 16 * 32 and distances.max() < 1e-4


BUFFER = """
import sys
import torch
from nnsight import LanguageModel, __version__
assert __version__.startswith("0.3"), __version__  # what dictionary_learning 0.1.0 asks for
from tiny_project import byte_tokenizer, tiny_model
from dictionary_learning.buffer import ActivationBuffer
from masksae import mask_inputs
from test_plugins_text import TEXTS

model, tokenizer = tiny_model("llama"), byte_tokenizer()
tokenizer.pad_token = "<bos>"
language_model = LanguageModel(model, tokenizer=tokenizer)
with mask_inputs(model, p=0.3, token_id=1, seed=5, spare=(0,)):
    buffer = ActivationBuffer(
        iter(TEXTS), language_model, language_model.model.layers[1], d_submodule=16, n_ctxs=len(TEXTS), ctx_len=12,
        refresh_batch_size=8, out_batch_size=16, device="cpu",
    )
    buffer.refresh()
torch.save(buffer.activations, sys.argv[1])
"""
TEXTS = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(12)) for i in range(48)]


def test_the_text_buffer_of_dictionary_learning_sees_masked_tokens(model, tmp_path):
    """Its ActivationBuffer, from text, with the nnsight that it asks for, in a process of its own."""
    old = Path(sys.prefix) / "nnsight-0.3"
    script = BUFFER.replace("from test_plugins_text import TEXTS", f"TEXTS = {TEXTS!r}")
    path = os.pathsep.join(map(str, (old, ROOT / "tests/support", ROOT)))
    command = [sys.executable, "-c", script, str(tmp_path / "found.pt")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    ids = torch.tensor(byte_tokenizer()(TEXTS, add_special_tokens=False)["input_ids"])
    corrupted = mask_inputs(tiny_model("llama"), **KEYS).corrupt(ids)
    assert 0.2 < (corrupted != ids).float().mean() < 0.4
    expected = activations(model, corrupted, block=1).flatten(0, 1)
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected, rtol=1e-4, atol=1e-5)


def test_a_hooked_transformer_sees_masked_tokens():
    """SAELens' usual kind of model."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=12, d_head=8, d_vocab=128, act_fn="relu", default_prepend_bos=False, device="cpu"
    )
    hooked = HookedTransformer(config)
    with pytest.raises(ConfigError, match="token_id 128 is outside the vocabulary of 128 tokens"):
        mask_inputs(hooked, **KEYS | {"token_id": 128})
    name = "blocks.0.hook_resid_post"
    with mask_inputs(hooked, **KEYS) as masks:
        _, cache = hooked.run_with_cache(IDS, names_filter=[name], stop_at_layer=1, prepend_bos=False)
        corrupted = masks.corrupt(IDS)
    _, expected = hooked.run_with_cache(corrupted, names_filter=[name], stop_at_layer=1, prepend_bos=False)
    assert (corrupted != IDS).any() and torch.equal(cache[name], expected[name])


@pytest.mark.parametrize("name", ["saelens", "batches", "hook"])
def test_the_examples_of_the_page_run(name, model, tmp_path):
    from dictionary_learning.training import trainSAE
    from sae_lens import LoggingConfig
    from sae_lens.load_model import HookedProxyLM

    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    seen, config = recorder()
    names = {
        "tokenizer": byte_tokenizer(), "texts": TEXTS, "mask_token": "<mask>", "ids": IDS,
        "mask_id": 1, "bos_id": 0, "pad_id": 2, "d_model": 16,
        "model_name": "tiny", "model_path": str(tmp_path / "model"),
        "training_tokens": 2048, "steps": 12, "context_size": 12, "batch_size": 64,
        "logger": LoggingConfig(log_to_wandb=False), "output": str(tmp_path),
        "trainer_configs": [config], "trainSAE": trainSAE,
        "model": HookedProxyLM(model, byte_tokenizer()) if name == "saelens" else model,
        "buffer": (
            model(IDS[i % 48 :][:1], output_hidden_states=True).hidden_states[2].flatten(0, 1) for i in range(99)
        ),
    }  # fmt: skip
    if name == "saelens":
        exec(EXAMPLES["blocks"], names)
    exec(EXAMPLES[name].replace("layers.8", "layers.1"), names)
    if name == "batches":
        corrupted, where = mask_tokens(IDS, p=0.3, token_id=1, seed=0, spare=(0,))
        keep = ~where
        keep[:, 0] = False
        expected = activations(model, corrupted, block=1)[keep]
        assert torch.cdist(torch.cat(seen).double(), expected.double()).min(1).values.max() < 1e-4
    elif name == "hook":
        corrupted = mask_inputs(tiny_model("llama"), p=0.3, token_id=1, seed=0, spare=(0, 2)).corrupt(IDS)
        expected = activations(model, corrupted, block=1)
        torch.testing.assert_close(torch.stack(seen), expected[:12], rtol=1e-4, atol=1e-5)
    else:
        assert (tmp_path / "sae_weights.safetensors").exists()
