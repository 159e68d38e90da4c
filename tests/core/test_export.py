"""Formats of other libraries: what we write we read back as it was; what cannot be held is refused. The libraries
themselves: test_peers_exchange.py."""

import json
from pathlib import Path

import pytest
import torch
from random_saes import ALL_RULES, random_batch, random_sae
from safetensors.torch import load_file, save_file

import masksae
from masksae import BatchTopK, Gated, JumpReLU, ReLU, TopK, load_dictionary_learning, load_saelens
from masksae.errors import CheckpointError, ConfigError, OutputError
from masksae.export import saebench_adapter

every_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
FORMATS = [("to_saelens", load_saelens), ("to_dictionary_learning", load_dictionary_learning)]


def make(rule, prefixes=(), dtype=torch.float32):
    sae = random_sae(rule, prefixes, dtype=dtype).requires_grad_(False)
    if rule.estimates_threshold:
        sae.threshold.fill_(0.4)
    if not rule.unit_rows:
        sae.normalise_()
    sae.history = [{"step": 0, "loss": 1.0}]
    return sae


@every_rule
@pytest.mark.parametrize("write, load", FORMATS, ids=["saelens", "dictionary_learning"])
@pytest.mark.parametrize("prefixes", [(), (0.25, 0.75)], ids=["plain", "matryoshka"])
def test_round_trip(rule, write, load, prefixes, tmp_path):
    sae, x = make(rule, prefixes), random_batch(dtype=torch.float32)
    again = load(getattr(sae, write)(tmp_path / "sae"))
    assert again.config == sae.config and again.history == sae.history and again.threshold == sae.threshold
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
    three = x.reshape(8, 8, 24)
    assert torch.equal(again.encode(three), sae.encode(three))


@every_rule
@pytest.mark.parametrize("write, load", FORMATS, ids=["saelens", "dictionary_learning"])
def test_without_our_own_entry_the_function_is_the_same(rule, write, load, tmp_path):
    """As if another trainer had written it, and with decoder rows of other norms where those may be folded."""
    sae, x = make(rule), random_batch(dtype=torch.float32)
    if not rule.ranked:
        sae.W_dec *= 0.5 + torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
    folder = getattr(sae, write)(tmp_path / "sae")
    file = folder / ("cfg.json" if write == "to_saelens" else "config.json")
    record = json.loads(file.read_text())
    (record["metadata"] if write == "to_saelens" else record).pop("masksae")
    file.write_text(json.dumps(record))
    again = load(folder)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.encode(x), sae.encode(x) * sae.W_dec.norm(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(96))
    if not rule.ranked:
        with pytest.raises(ConfigError, match="trained elsewhere"):
            masksae.train(
                [again.config],
                masksae.ActivationStream.from_array(x, batch_size=8, seed=0),
                masksae.TrainConfig(steps=9, warmup=1, threshold_start=1),
            )


@pytest.mark.parametrize("shares", [(0.3, 0.7), (0.07, 0.23, 0.7), (29 / 96, 67 / 96)])
def test_group_sizes_of_a_foreign_matryoshka_come_back_exactly(shares, tmp_path):
    sae = make(BatchTopK(4), shares)
    folder = sae.to_dictionary_learning(tmp_path / "sae")
    record = json.loads((folder / "config.json").read_text())
    del record["masksae"]
    (folder / "config.json").write_text(json.dumps(record))
    assert load_dictionary_learning(folder).config.group_sizes == sae.config.group_sizes


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize(
    "rule", [ReLU(0.1), JumpReLU(4.0, initial_threshold=0.3), Gated(0.1)], ids=["standard", "jumprelu", "gated"]
)
def test_either_convention_for_the_input_bias(rule, applied, tmp_path):
    folder = make(rule).to_saelens(tmp_path / "sae")
    record = json.loads((folder / "cfg.json").read_text())
    record["apply_b_dec_to_input"] = applied
    record["metadata"].pop("masksae")
    (folder / "cfg.json").write_text(json.dumps(record))
    w, x = load_file(folder / "sae_weights.safetensors"), random_batch(dtype=torch.float32)
    pre = (x - w["b_dec"] * applied) @ w["W_enc"] + w.get("b_enc", torch.zeros(()))
    f = torch.relu(pre) * (pre > w.get("threshold", torch.zeros(())))
    if isinstance(rule, Gated):
        products = (x - w["b_dec"] * applied) @ w["W_enc"]
        f = torch.relu(products * w["r_mag"].exp() + w["b_mag"]) * (products + w["b_gate"] > 0)
    torch.testing.assert_close(load_saelens(folder)(x), f @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write, load", FORMATS, ids=["saelens", "dictionary_learning"])
def test_a_threshold_without_a_field_is_added_to_the_latents_own(write, load, tmp_path):
    """As of the SAEs that `metrics.controls` makes. Where the latents have none, it is refused."""
    sae, x = make(JumpReLU(4.0, initial_threshold=0.3)), random_batch(dtype=torch.float32)
    sae.threshold.fill_(0.5)
    folder = getattr(sae, write)(tmp_path / "sae")
    file = folder / ("cfg.json" if write == "to_saelens" else "config.json")
    for _ in ("with our entry", "without"):
        again = load(folder)
        assert (again.encode(x) > 0).any() and again.threshold == 0
        torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
        record = json.loads(file.read_text())
        (record["metadata"] if write == "to_saelens" else record).pop("masksae", None)
        file.write_text(json.dumps(record))
    for rule in (ReLU(0.1), Gated(0.1)):
        sae = make(rule)
        sae.threshold.fill_(0.5)
        with pytest.raises(ConfigError, match="threshold of 0.5, which other libraries have no field for"):
            getattr(sae, write)(tmp_path / "other")


def test_the_layer_is_told_only_where_it_is_known(tmp_path):
    for layer, name in ((None, ""), (7, "resid_post_layer_7")):
        folder = make(TopK(4)).to_dictionary_learning(tmp_path / "sae", layer=layer)
        trainer = json.loads((folder / "config.json").read_text())["trainer"]
        assert (trainer["layer"], trainer["submodule_name"]) == (layer, name)


def test_saelens_topk_that_ranks_by_decoder_norm(tmp_path):
    folder = make(TopK(4)).to_saelens(tmp_path / "sae")
    w = load_file(folder / "sae_weights.safetensors")
    w["W_dec"] *= 0.2 + 3 * torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
    save_file(w, folder / "sae_weights.safetensors")
    record = json.loads((folder / "cfg.json").read_text())
    record["rescale_acts_by_decoder_norm"] = True
    record["metadata"].pop("masksae")
    (folder / "cfg.json").write_text(json.dumps(record))
    x, norm = random_batch(dtype=torch.float32), w["W_dec"].norm(dim=1)
    scores = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    value, index = scores.topk(4, dim=1)
    f = torch.zeros_like(scores).scatter(1, index, value.relu())
    torch.testing.assert_close(load_saelens(folder).encode(x), f, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_held_is_refused_with_the_reason(tmp_path):
    folder = make(ReLU(0.1)).to_saelens(tmp_path / "a")
    good = json.loads((folder / "cfg.json").read_text())
    for changes, words in [
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm' is done at run time"),
        ({"reshape_activations": "heads"}, "reshape_activations"),
        ({"architecture": "temporal"}, "'temporal'. What can be read: topk"),
    ]:
        (folder / "cfg.json").write_text(json.dumps(good | changes))
        with pytest.raises(ConfigError, match=words):
            load_saelens(folder)
    folder = make(BatchTopK(4)).to_dictionary_learning(tmp_path / "b")
    good = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"trainer": good["trainer"] | {"dict_class": "IdentityDict"}}))
    with pytest.raises(ConfigError, match="'IdentityDict'"):
        load_dictionary_learning(folder)
    (folder / "config.json").write_text(
        json.dumps({"trainer": good["trainer"] | {"dict_class": "JumpReluAutoEncoder"}})
    )
    with pytest.raises(CheckpointError, match="lacks W_enc"):
        load_dictionary_learning(folder)


def test_a_fractional_k_is_not_cut(tmp_path):
    with pytest.raises(ConfigError, match="keeps k as an integer, and this SAE has k = 2.5"):
        make(BatchTopK(2.5)).to_dictionary_learning(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert load_dictionary_learning(make(BatchTopK(2.0)).to_dictionary_learning(tmp_path / "b")).config.selection.k == 2
    assert load_saelens(make(BatchTopK(2.5)).to_saelens(tmp_path / "c")).config.selection.k == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_types_by_either_of_saelens_names(dtype, tmp_path):
    folder = make(TopK(4)).to(dtype).to_saelens(tmp_path / "sae")
    record = json.loads((folder / "cfg.json").read_text())
    assert f"torch.{record['dtype']}" == str(dtype)
    for name in (record["dtype"], str(dtype)):
        (folder / "cfg.json").write_text(json.dumps(record | {"dtype": name}))
        assert load_saelens(folder).dtype == dtype
    for name in ("float31", "int64", "nn", None):
        (folder / "cfg.json").write_text(json.dumps(record | {"dtype": name}))
        with pytest.raises(ConfigError, match="is no type of floats. Known: float32"):
            load_saelens(folder)


def test_damaged_missing_and_hostile_files(tmp_path):
    with pytest.raises(CheckpointError, match="cfg.json is missing"):
        load_saelens(tmp_path)
    folder = make(TopK(4)).to_saelens(tmp_path / "a")
    weights = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_saelens(folder)

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    folder = make(Gated(0.1)).to_dictionary_learning(tmp_path / "b")
    torch.save({"encoder.weight": Hostile()}, folder / "ae.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_dictionary_learning(folder)
    assert not (tmp_path / "owned").exists()


@every_rule
def test_adapter_has_what_saebench_asks_for(rule):
    sae, x = make(rule, (0.5, 0.5)), random_batch(dtype=torch.float32)
    adapter = saebench_adapter(sae, model_name="pythia-160m-deduped", layer=8)
    assert adapter.cfg.hook_name == "blocks.8.hook_resid_post" and adapter.cfg.to_dict()["d_sae"] == 96
    assert adapter.W_enc.shape == (24, 96) and adapter.W_dec.shape == (96, 24) and adapter.b_dec.shape == (24,)
    assert torch.equal(adapter(x), sae(x)) and torch.equal(adapter.decode(adapter.encode(x)), sae(x))
    assert adapter.check_decoder_norms()
    adapter.to(dtype=torch.float64)
    assert adapter.dtype == torch.float64 == adapter.W_dec.dtype and adapter.cfg.dtype == "float64"
    adapter.W_dec.data *= 2
    assert not adapter.check_decoder_norms()


@pytest.mark.parametrize("write", ["save", "to_saelens", "to_dictionary_learning"])
def test_an_sae_is_written_over_an_sae_and_over_nothing_else(write, tmp_path):
    sae, model = make(TopK(2)), tmp_path / "model"
    for other in ("save", "to_saelens", write):
        getattr(sae, other)(tmp_path / "sae")
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("weights of a week")
    with pytest.raises(OutputError, match="model holds model.safetensors, and writing there would delete it"):
        getattr(sae, write)(model)
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "model.safetensors"]
