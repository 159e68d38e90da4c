"""Model loading from a folder, the gate on a page of English, and errors for what cannot be loaded."""

import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

from masksae import models
from masksae.errors import ConfigError, SourceError


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_local_folder_gives_the_same_model(folder):
    loaded = models.load_model(str(folder))
    ids = torch.tensor([[0, 5, 6, 7]])
    torch.testing.assert_close(loaded.model(ids).logits, tiny_model("llama")(ids).logits)
    assert loaded.tokenizer.decode(loaded.tokenizer("a page", add_special_tokens=False)["input_ids"]) == "a page"
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
    assert "tiny" in loaded.note


def test_token_ids(folder):
    tokenizer = models.load_model(str(folder)).tokenizer
    assert models.token_id(tokenizer, "<mask>") == 1
    with pytest.raises(ConfigError, match=r"'<\|mask\|>' is not a token.*<mask>"):
        models.token_id(tokenizer, "<|mask|>")


def test_the_page_is_scored_as_transformers_scores_it(folder):
    loaded = models.load_model(str(folder))
    ids = [0, *loaded.tokenizer(models.PAGE.read_text(), add_special_tokens=False)["input_ids"]]
    logits = loaded.model(torch.tensor([ids])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert models.page_loss(loaded.model, loaded.tokenizer) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_cannot_read_is_refused(folder):
    loaded = models.load_model(str(folder))
    with pytest.raises(SourceError, match=r"nats per token on a page of English.*read wrongly"):
        models.check_reads_english(loaded.model, loaded.tokenizer, "random")


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'smollm2-135m'"):
        models.load_model("smollm2-135")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SourceError, match="Cannot load the model"):
        models.load_model(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    with pytest.raises(SourceError, match="Cannot load the model"):
        models.load_model(str(folder))


def test_hub_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"Cannot load the model 'hub:nobody/nothing'.*local folder"):
        models.load_model("hub:nobody/nothing")
