"""A model of one's own, from a profile of a dozen lines: other architectures, hook points and tokenizers; what cannot
work says why."""

import random

import pytest
import torch
import yaml
from tiny_project import byte_tokenizer, tiny_model

from masksae import Run, load_profile
from masksae.app.plan import Plan, record
from masksae.data import models
from masksae.errors import ConfigError, DataError, SourceError
from masksae.study.scores import absorption, reconstruction

WORDS = "the cat sat on a mat while seven dogs ran past it and nobody saw them".split()


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder of the reader's own with a page of text, and a cache of its own; blanks and letters beyond ASCII in its
    path."""
    root = tmp_path / "mein Größen-Projekt ünï"
    root.mkdir()
    draw = random.Random(0)
    lines = [f'{{"text": "{" ".join(draw.choices(WORDS, k=60))}"}}\n' for _ in range(150)]
    (root / "text.jsonl").write_text("".join(lines))
    monkeypatch.setenv("MASKSAE_CACHE", str(root / "cache"))
    monkeypatch.chdir(root)
    return root


def own(project, model, tokenizer=None, **keys):
    """Save a model and write a profile of nothing but what is needed."""
    model.save_pretrained(project / "model")
    (tokenizer or byte_tokenizer()).save_pretrained(project / "model")
    profile = {
        "name": "mine",
        "model": {"source": "model", "block": 1, "mask_token": "<mask>", "bos_token": "<bos>"} | keys,
        "text": {"sources": ["text.jsonl"], "block_length": 32, "train_tokens": 6400, "held_out_tokens": 320},
        "training": {"batch_size": 128, "lr": 0.003},
        "saes": [{"name": "b4", "selection": {"rule": "batch_topk", "k": 4}, "n_latents": 64}],
        "blocks": [{"pairs": [0]}],
        "evaluation": {"ce_tokens": 320},
        "contexts": {"tokens": 320},
    }
    (project / "mine.yaml").write_text(yaml.safe_dump(profile))
    return Run("mine.yaml")


def test_a_profile_of_a_dozen_lines_lives_on_one_text_file_of_200_k_tokens(project):
    """Neither sizes nor shares are named: held-out and context text follow what is trained on."""
    draw = random.Random(1)
    paragraphs = (" ".join(draw.choices(WORDS, k=draw.randint(20, 200))) for _ in range(450))
    (project / "book.txt").write_text("\n\n".join(paragraphs)[:200_000])
    run = own(project, tiny_model("llama"))
    text = {"sources": ["book.txt"], "train_tokens": 60_000}
    raw = run.profile.model_dump(mode="json", exclude_defaults=True, include={"name", "model", "saes"}) | {"text": text}
    (project / "mine.yaml").write_text(yaml.safe_dump(raw))
    run = Run("mine.yaml")
    tokens = {split: 128 * len(blocks) for split, blocks in run.blocks.items()}
    assert tokens["train"] >= 60_000 and tokens["held_out"] > 5_000 and tokens["contexts"] > 12_000  # less what repeats
    assert record(Plan(run.profile), "cpu")["text_tokens"] < 100_000


def test_text_without_words_has_no_contexts_and_says_so(project):
    run = own(project, tiny_model("llama"))
    draw = random.Random(0)
    lines = [f'{{"text": "{"".join(draw.choices("0123456789 .,", k=300))}"}}\n' for _ in range(150)]
    (project / "text.jsonl").write_text("".join(lines))
    assert len(run.held_out) > 0
    with pytest.raises(DataError, match="no word that a parent could be told of"):
        absorption.context_sample(run)


def gpt2():
    """Learned positions, tied embeddings, blocks at transformer.h."""
    import transformers as tr

    torch.manual_seed(0)
    config = tr.GPT2Config(vocab_size=128, n_embd=16, n_layer=3, n_head=2, n_positions=64, tie_word_embeddings=True)
    return tr.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("block", [1, "model.layers.1.mlp", "model.embed_tokens"])
def test_a_dozen_lines_train_and_score(project, block):
    run = own(project, tiny_model("llama"), block=block)
    assert set(run.saes) == {"unmasked-b4-s0", "kept-b4-s0"}
    assert run.width == 16 and all(sae.history[-1]["explained_variance"] > 0 for sae in run.saes.values())
    if block != "model.embed_tokens":  # zeros there do no harm to a random model, and that is refused
        row = run.scored(reconstruction.reconstruction_scores)[0]
        assert row["ev_centred"] > 0 and row["ce_original"] > 0
    assert ("layers.1.mlp" in run.profile.model.place) == (block == "model.layers.1.mlp")


def test_tied_weights_learned_positions_and_no_bos(project, capsys):
    run = own(project, gpt2(), block=0, bos_token=None)
    assert run.bos_id is None and "tokenizer has a BOS token, <bos>" in capsys.readouterr().err
    assert len(run.saes) == 2
    assert len(run.held_out) == 32 * len(run.ids("held_out"))  # no position is left out


def test_a_tokenizer_without_bos_asks_nothing(project, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    run = own(project, gpt2(), tokenizer, block=0, bos_token=None)
    assert run.bos_id is None and "BOS" not in capsys.readouterr().err


def test_a_mask_token_that_is_not_there_names_the_special_ones(project):
    with pytest.raises(ConfigError, match="'<pad>' is not a token of this model.*Known: .*<bos>.*<mask>"):
        own(project, tiny_model("llama"), mask_token="<pad>").saes


def test_a_model_larger_than_memory_is_refused_before_it_is_read(project, monkeypatch):
    run = own(project, tiny_model("llama"))
    monkeypatch.setattr(models, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(models, "_from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match=r"weights of 'model' need 0\.0 GB on cpu as float32.*bfloat16"):
        run.language_model


def test_a_model_whose_library_is_missing_says_which(project):
    run = own(project, tiny_model("llama"))
    config = project / "model/config.json"
    quantised = '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},'
    config.write_text(config.read_text().replace("{", quantised, 1))
    with pytest.raises(SourceError, match="Cannot load the model 'model': "):
        run.language_model


def test_an_encoder_is_no_language_model(project):
    import transformers as tr

    small = tr.T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(SourceError, match="Cannot load the model"):
        own(project, tr.T5ForConditionalGeneration(small)).language_model


def test_needed_keys_are_named_all_at_once(project):
    (project / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(ConfigError, match="(?s)model: missing.*text: missing.*saes: missing") as caught:
        load_profile("mine.yaml")
    assert str(caught.value).count("missing") == 3


def test_training_is_sized_by_the_run(project):
    training = own(project, tiny_model("llama")).profile.training
    short, long = training.config(100), training.config(100_000)
    assert (short.warmup, short.threshold_start, short.threshold_ema) == (10, 33, 0.9)
    assert (long.warmup, long.threshold_start, long.threshold_ema) == (1000, 1000, 0.999)
