"""Our files in the real libraries and theirs here: encode and decode are equal on [n, d] and [batch, sequence, d].

The peers live in an environment of their own: `make test-peers`. Elsewhere these tests are skipped.
"""

import json

import pytest
import torch

pytest.importorskip("dictionary_learning")
pytest.importorskip("sae_lens")

from peers import dictionary_learning_trainer, saelens_sae
from random_saes import ALL_RULES, random_batch, random_sae

from masksae import MATRYOSHKA, TrainConfig, load_dictionary_learning, load_saelens
from masksae.export import saebench_adapter
from masksae.saes.formats import DICTIONARY_LEARNING

every_case = pytest.mark.parametrize(
    "rule, prefixes",
    [(rule, ()) for rule in ALL_RULES] + [(ALL_RULES[1], MATRYOSHKA)],
    ids=[type(rule).__name__ for rule in ALL_RULES] + ["Matryoshka"],
)


def make(rule, prefixes=()):
    sae = random_sae(rule, prefixes, dtype=torch.float32).requires_grad_(False)
    if rule.estimates_threshold:
        sae.threshold.fill_(0.4)
    return sae if rule.unit_rows else sae.normalise_()


def assert_same(ours, theirs, norms=1.0):
    x = random_batch(dtype=torch.float32)
    for given in (x, x.reshape(4, 16, 24)):
        f = ours.encode(given)
        torch.testing.assert_close(f, theirs.encode(given) * norms, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(f), theirs.decode(theirs.encode(given)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(given), theirs(given), rtol=1e-5, atol=1e-5)


@every_case
def test_saelens_reads_ours(rule, prefixes, tmp_path):
    from sae_lens import SAE

    sae = make(rule, prefixes)
    folder = sae.to_saelens(tmp_path / "sae", model_name="pythia-160m-deduped", hook_name="blocks.8.hook_resid_post")
    theirs = SAE.load_from_disk(folder)
    assert theirs.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
    assert_same(sae, theirs)


@every_case
def test_we_read_saelens(rule, prefixes, tmp_path):
    """What their trainer saves for inference, decoder rows of any norm."""
    from sae_lens import SAE

    theirs = saelens_sae(make(rule, prefixes))
    with torch.no_grad():
        theirs.W_dec *= 0.5 + torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.4)
    theirs.save_inference_model(tmp_path / "sae")
    saved = SAE.load_from_disk(tmp_path / "sae")
    rescaled = getattr(saved.cfg, "rescale_acts_by_decoder_norm", False)
    norms = 1.0 if rescaled else saved.W_dec.norm(dim=1).detach()
    assert_same(load_saelens(tmp_path / "sae"), saved.requires_grad_(False), norms)


@every_case
def test_a_checkpoint_of_saelens_is_the_finished_sae(rule, prefixes, tmp_path):
    """Its trainer saves them with norms still in the decoder, and what is the threshold's own in double precision."""
    theirs = saelens_sae(make(rule, prefixes))
    with torch.no_grad():
        theirs.W_dec *= 0.5 + torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.4)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "sae")
    checkpoint, finished = load_saelens(tmp_path / "checkpoint"), load_saelens(tmp_path / "sae")
    assert_same(finished, checkpoint)
    assert checkpoint.config == finished.config
    assert checkpoint.config.group_sizes == make(rule, prefixes).config.group_sizes


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}},
        {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 8}},
        {"apply_b_dec_to_input": False, "normalize_activations": False},
    ],
)
def test_folders_of_before_version_6_are_read_alike(told, tmp_path):
    from sae_lens import SAE
    from safetensors.torch import load_file, save_file

    folder = make(ALL_RULES[3]).to_saelens(tmp_path / "sae")
    record = {"d_in": 24, "d_sae": 96, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_post"}
    record |= {"model_name": "gpt2-small", "hook_point_layer": 3, "l1_coefficient": 1e-3, "expansion_factor": 4} | told
    (folder / "cfg.json").write_text(json.dumps(record))
    w = load_file(folder / "sae_weights.safetensors")
    save_file(w | {"scaling_factor": torch.ones(96)}, folder / "sae_weights.safetensors")
    theirs, ours = SAE.load_from_disk(folder), load_saelens(folder)
    assert_same(ours, theirs.requires_grad_(False))
    assert ours.origin == {"model_name": "gpt2-small", "hook_name": theirs.cfg.metadata.hook_name}


@every_case
def test_dictionary_learning_reads_ours(rule, prefixes, tmp_path):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    sae = make(rule, prefixes)
    [*_, name] = [
        peer.name for peer in DICTIONARY_LEARNING if peer.rule is type(rule) and peer.prefixed == bool(prefixes)
    ]
    module = next(m for m in (dictionary, batch_top_k, matryoshka_batch_top_k, top_k) if hasattr(m, name))
    theirs = getattr(module, name).from_pretrained(sae.to_dictionary_learning(tmp_path / "sae") / "ae.pt")
    assert_same(sae, theirs.requires_grad_(False))


@every_case
def test_we_read_dictionary_learning(rule, prefixes, tmp_path):
    trainer = dictionary_learning_trainer(make(rule, prefixes), TrainConfig(steps=100, warmup=1, threshold_start=1))
    if rule.estimates_threshold:
        trainer.ae.threshold.fill_(0.4)
    else:
        with torch.no_grad():
            w = trainer.ae.W_dec if hasattr(trainer.ae, "W_dec") else trainer.ae.decoder.weight.T
            w *= 0.5 + torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "trainer_0"
    folder.mkdir()
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    config = {name: value for name, value in trainer.config.items() if isinstance(value, str | int | float | None)} \
        if hasattr(trainer, "config") else {}  # fmt: skip
    config.setdefault("dict_class", type(trainer.ae).__name__)
    (folder / "config.json").write_text(json.dumps({"trainer": config}))
    norms = 1.0
    if not rule.ranked:
        norms = (
            trainer.ae.W_dec.norm(dim=1) if hasattr(trainer.ae, "W_dec") else trainer.ae.decoder.weight.norm(dim=0)
        ).detach()
    assert_same(load_dictionary_learning(folder), trainer.ae.requires_grad_(False), norms)


@every_case
def test_saebench_takes_the_adapter(rule, prefixes):
    """Its own loader's checks, its norm check and its pooling of latents over tokens, against pooling by hand."""
    pytest.importorskip("sae_bench")
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations
    from sae_bench.sae_bench_utils.general_utils import check_decoder_norms, load_and_format_sae

    sae = make(rule, prefixes)
    adapter = saebench_adapter(sae, model_name="pythia-160m-deduped", layer=8)
    name, loaded, _ = load_and_format_sae("ours", adapter, "cpu")
    assert check_decoder_norms(loaded.W_dec.data) and loaded is adapter
    x = random_batch(dtype=torch.float32).reshape(4, 16, 24)
    x[:, 12:] = 0
    pooled = get_sae_meaned_activations({"class": x}, loaded, 2)["class"]
    torch.testing.assert_close(pooled, sae.encode(x[:, :12]).mean(1))
