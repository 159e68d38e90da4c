"""Files as other libraries write them, of every version that is read: each agrees with its own forward, written out
here; what could change the function and is not known is refused by its name."""

import json
import zipfile

import numpy as np
import pytest
import torch
from random_saes import random_batch
from safetensors.torch import save_file

import masksae
from masksae import SAE, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from masksae.errors import CheckpointError, ConfigError, MasksaeError
from masksae.saes import formats

D, F = 24, 96
X = random_batch(d=D, dtype=torch.float32)

VERSION_2 = {  # what the configuration of training left in cfg.json
    "model_name": "pythia-70m-deduped", "hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": 3,
    "hook_point_head_index": None, "dataset_path": "x/y", "context_size": 128, "d_in": D, "d_sae": F,
    "expansion_factor": 4, "dtype": "torch.float32", "device": "cuda", "l1_coefficient": 1e-3, "lp_norm": 1,
    "use_ghost_grads": False, "b_dec_init_method": "zeros", "mse_loss_normalization": None, "noise_scale": 0.0,
    "feature_sampling_method": None, "feature_reinit_scale": 0.2, "resample_batches": 1028, "tokens_per_buffer": 2**26,
    "normalize_sae_decoder": True, "finetuning_method": None, "scale_sparsity_penalty_by_decoder_norm": False,
    "prepend_bos": False, "normalize_activations": False, "sae_lens_training_version": None,
}  # fmt: skip
VERSION_6 = {
    "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post"},
}  # fmt: skip


def weights(seed=0, norms=True) -> dict:
    """Random W_enc, b_enc, W_dec, b_dec; decoder rows of norm .5 to 1.5 or, without `norms`, of 1."""
    draw = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=draw), dim=1)
    scale = 0.5 + torch.rand(F, 1, generator=draw) if norms else 1.0
    W_enc, b_enc = torch.randn(D, F, generator=draw) / 3, 0.1 * torch.randn(F, generator=draw)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec * scale, "b_dec": 0.3 * torch.randn(D, generator=draw)}


def saelens(folder, record, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(record))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def kept(h, k):
    """The k largest of each row, as far as they are positive."""
    edge = h.sort(dim=1, descending=True).values[:, k - 1 : k]
    return h.relu() * (h >= edge)


def assert_computes(sae, f, x_hat):
    """The same latents, as often, and the same reconstruction."""
    torch.testing.assert_close(sae.encode(X), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(X), x_hat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "told",
    [
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": 8}, "normalize_activations": "none"},
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}},
        {"architecture": "topk", "k": 8, "apply_b_dec_to_input": True},
    ],
)
def test_topk_is_topk_wherever_its_k_stands(told, tmp_path):
    w = weights()
    sae = masksae.load_sae(saelens(tmp_path / "sae", VERSION_2 | told, w))
    f = kept((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 8)
    assert sae.config.selection == TopK(8) and (sae.encode(X) > 0).sum(1).max() == 8
    assert_computes(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert sae.origin == {
        "model_name": "pythia-70m-deduped", "hook_name": "blocks.3.hook_resid_post", "prepend_bos": False,
    }  # fmt: skip


def test_topk_without_a_k_is_asked_for_it(tmp_path):
    for told in ({"activation_fn_str": "topk"}, {"architecture": "topk"}):
        with pytest.raises(ConfigError, match="cfg.json is a topk that states no k. Write the number") as found:
            masksae.load_sae(saelens(tmp_path / "sae", VERSION_2 | told, weights()))
        assert "damaged" not in str(found.value)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_the_scaling_factor_of_finetuning(name, tmp_path):
    w, record = weights(), VERSION_2 | {"finetuning_scaling_factor": True, "activation_fn_str": "relu"}
    scale = 1 + 4 * torch.rand(F, generator=torch.Generator().manual_seed(1))
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, w | {name: scale}))
    f = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() * scale
    assert_computes(sae, f * w["W_dec"].norm(dim=1), f @ w["W_dec"] + w["b_dec"])
    top = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    sae = masksae.load_sae(saelens(tmp_path / "sae", record | top, w | {name: scale}))
    f = kept((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 4)
    assert_computes(sae, f, (f * scale) @ w["W_dec"] + w["b_dec"])
    del record["finetuning_scaling_factor"]
    with pytest.raises(ConfigError, match="finetuning_scaling_factor is not true. Set it"):
        masksae.load_sae(saelens(tmp_path / "sae", record, w | {name: scale}))
    masksae.load_sae(saelens(tmp_path / "sae", record, w | {name: torch.ones(F)}))  # once written by all


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalize_activations": True}, "normalize_activations = True .* expected 'none'"),
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in'"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str = 'tanh-relu' .* expected 'relu'"),
        ({"activation_fn_kwargs": {"k": 8, "signed": True}}, "activation_fn_kwargs.signed is not known"),
        ({"output_scale": 2.0, "whitening": "zca"}, "output_scale, whitening is not known here, and could change"),
        ({"architecture": "jumprelu_transcoder"}, "'jumprelu_transcoder'. What can be read: topk, jumprelu, batchtopk"),
    ],
)
def test_what_saelens_does_at_run_time_is_refused(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        masksae.load_sae(saelens(tmp_path / "sae", VERSION_6 | {"architecture": "standard"} | changes, weights()))


def test_tensors_that_are_not_known_are_refused(tmp_path):
    record = VERSION_6 | {"architecture": "standard"}
    with pytest.raises(ConfigError, match="W_skip is not known here, and could change what the SAE computes"):
        masksae.load_sae(saelens(tmp_path / "sae", record, weights() | {"W_skip": torch.eye(D)}))
    sae = SAE(SAEConfig(D, F, ReLU(0.1)))
    folder = sae.to_dictionary_learning(tmp_path / "theirs")
    torch.save(torch.load(folder / "ae.pt") | {"gain": torch.ones(F)}, folder / "ae.pt")
    with pytest.raises(ConfigError, match="ae.pt: gain is not known"):
        masksae.load_sae(folder)


def test_heads_come_as_one_vector(tmp_path):
    w = weights()
    record = VERSION_6 | {"architecture": "standard", "reshape_activations": "hook_z"}
    f = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, w))
    assert_computes(sae, f * w["W_dec"].norm(dim=1), f @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("widths", [[], [16, 48], [16, 48, F]])
def test_a_checkpoint_of_saelens_batchtopk(rescaled, widths, tmp_path):
    """As it stands during training: its threshold in double precision, norms in the decoder."""
    w = weights() | {"topk_threshold": torch.tensor(0.4, dtype=torch.float64)}
    record = VERSION_6 | {
        "architecture": "matryoshka_batchtopk" if widths else "batchtopk", "k": 6.5, "topk_threshold_lr": 0.01,
        "rescale_acts_by_decoder_norm": rescaled, "aux_loss_coefficient": 1.0, "decoder_init_norm": 0.1,
        "use_sparse_activations": True, **({"matryoshka_widths": widths} if widths else {}),
    }  # fmt: skip
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, w))
    norm = w["W_dec"].norm(dim=1) if rescaled else torch.ones(F)
    h = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    f = h.relu() * (h > 0.4)
    assert_computes(sae, f, (f / norm) @ w["W_dec"] + w["b_dec"])
    assert sae.config.selection == BatchTopK(6.5) and sae.dtype == torch.float32
    assert sae.config.group_sizes == ((16, 32, 48) if widths else (F,))
    w["topk_threshold"].zero_()
    with pytest.raises(ConfigError, match="threshold is 0, expected a number above 0"):
        masksae.load_sae(saelens(tmp_path / "sae", record, w))


def test_a_finished_batchtopk_of_saelens_has_its_k_and_its_groups(tmp_path):
    w = weights(norms=False) | {"threshold": torch.full((F,), 0.4)}
    details = {"k": 6, "matryoshka_widths": [32, F], "rescale_acts_by_decoder_norm": True}
    told = {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": details}
    record = VERSION_6 | {"architecture": "jumprelu", "metadata": VERSION_6["metadata"] | told}
    h = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = h.relu() * (h > 0.4)
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, w))
    assert_computes(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert sae.config.selection == BatchTopK(6) and sae.config.group_sizes == (32, 64)
    again = sae.to_saelens(tmp_path / "again")
    written = json.loads((again / "cfg.json").read_text())["metadata"]
    assert written["training_architecture"] == "matryoshka_batchtopk"
    assert written["training_architecture_details"] == {"k": 6, "matryoshka_widths": [32, F]}
    w["threshold"][3] = 0.2  # finetuned since: no one threshold
    f = h.relu() * (h > w["threshold"])
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, w))
    assert_computes(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert isinstance(sae.config.selection, JumpReLU)


def test_a_float32_threshold_keeps_its_digits_beside_bfloat16(tmp_path):
    """In bfloat16 thresholds of 1.003 would be 1."""
    w = {name: tensor.bfloat16() for name, tensor in weights(norms=False).items()}
    w["threshold"] = torch.full((F,), 1.003)
    record = VERSION_6 | {"architecture": "jumprelu", "dtype": "bfloat16"}
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, w))
    exact = {name: tensor.double() for name, tensor in w.items()}
    h = (X.double() - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]
    assert torch.equal(sae.encode(X) > 0, h > 1.003) and sae.thresholds.dtype == torch.float32
    assert ((h > 1.003) != (h > 1)).any()  # as it would be in bfloat16
    del w["threshold"]
    half = masksae.load_sae(saelens(tmp_path / "sae", record | {"architecture": "standard"}, w))
    assert half.dtype == torch.bfloat16


def theirs(folder, dict_class, tensors, **trainer):
    folder.mkdir(exist_ok=True)
    record = {"trainer": {"dict_class": dict_class, "lr": 1e-3} | trainer, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(record))
    torch.save(tensors, folder / "ae.pt")
    return folder


def linear(w):
    named = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    return named | {"b_dec": w["b_dec"]}


def test_a_batchtopk_of_dictionary_learning_needs_its_threshold(tmp_path):
    w, k = weights(norms=False), {"k": torch.tensor(4, dtype=torch.int)}
    for told, words in (({}, "missing"), ({"threshold": torch.tensor(-1.0)}, "-1")):
        folder = theirs(tmp_path / "sae", "BatchTopKSAE", linear(w) | k | told, k=4)
        with pytest.raises(ConfigError, match=f"ae.pt: threshold is {words}, expected a number above 0.* Train past"):
            masksae.load_sae(folder)
    found = theirs(tmp_path / "sae", "BatchTopKSAE", linear(w) | k | {"threshold": torch.tensor(0.4)}, layer=4)
    h = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = h.relu() * (h > 0.4)
    sae = masksae.load_sae(found / "ae.pt")  # the file will do
    assert_computes(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert sae.config.selection == BatchTopK(4) and sae.origin == {"hook_name": "blocks.4.hook_resid_post"}
    top = theirs(tmp_path / "top", "AutoEncoderTopK", linear(w) | k | {"threshold": torch.tensor(-1.0)})
    assert (masksae.load_sae(top).encode(X) > 0).sum(1).max() == 4  # which ranks, whatever stands there


def test_an_sae_without_a_threshold_is_not_written_on(tmp_path):
    for write in ("to_saelens", "to_dictionary_learning"):
        with pytest.raises(ConfigError, match=r"no inference threshold yet \(found -1\).* set sae.threshold"):
            getattr(SAE(SAEConfig(D, F, BatchTopK(4))), write)(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def sparsify(folder, tensors, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": 5,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(record | changes))
    save_file(tensors, folder / "sae.safetensors")
    return folder


def test_sparsify(tmp_path):
    w = weights(norms=False)
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    tensors |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    folder = sparsify(tmp_path / "run/layers.3", tensors)
    (tmp_path / "run/config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "k": 5}))
    f = kept(((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), 5)
    sae = masksae.load_sae(folder)
    assert_computes(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert sae.config == SAEConfig(D, F, TopK(5))
    assert sae.origin == {"model_name": "EleutherAI/pythia-70m", "hook_name": "layers.3"}
    for changes, words in [
        ({"transcode": True}, "transcode = True, expected False"),
        ({"skip_connection": True}, "skip_connection = True, expected False"),
        ({"signed": True}, "signed = True, expected False"),
        ({"activation": "groupmax"}, "activation = 'groupmax', expected 'topk'"),
        ({"jumprelu": True}, "jumprelu is not known"),
        ({"k": None}, "states no k"),
    ]:
        with pytest.raises(ConfigError, match=words):
            masksae.load_sae(sparsify(folder, tensors, **changes))
    with pytest.raises(ConfigError, match="W_skip is not known"):
        masksae.load_sae(sparsify(folder, tensors | {"W_skip": torch.eye(D)}))
    with pytest.raises(CheckpointError, match=r"W_dec has shape \(96, 24\), expected \(64, 24\)"):
        masksae.load_sae(sparsify(folder, tensors, num_latents=64))


GEMMA = "models--google--gemma-scope-2b-pt-res/snapshots/abc/layer_12/width_16k/average_l0_82"


def gemma_scope(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "params.npz", **arrays)
    return folder


def test_gemma_scope(tmp_path):
    """JumpReLU on x itself; where it was trained is told by its path."""
    w = weights() | {"threshold": 0.2 + torch.rand(F, generator=torch.Generator().manual_seed(2))}
    arrays = {name: tensor.numpy() for name, tensor in w.items()}
    h = X @ w["W_enc"] + w["b_enc"]
    f = h.relu() * (h > w["threshold"])
    sae = masksae.load_sae(gemma_scope(tmp_path / GEMMA, arrays))
    assert_computes(sae, f * w["W_dec"].norm(dim=1), f @ w["W_dec"] + w["b_dec"])
    assert sae.origin == {"model_name": "google/gemma-2-2b", "hook_name": "blocks.12.hook_resid_post"}
    assert masksae.load_sae(gemma_scope(tmp_path / "mine", arrays)).origin == {}
    with pytest.raises(ConfigError, match="is a transcoder"):
        masksae.load_sae(gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders", arrays))
    second = tmp_path / "second"
    second.mkdir()
    save_file({name.replace("W_", "w_"): tensor for name, tensor in w.items()}, second / "params.safetensors")
    told = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output"}
    (second / "config.json").write_text(json.dumps(told | {"l0": 82}))
    sae = masksae.load_sae(second)
    assert_computes(sae, f * w["W_dec"].norm(dim=1), f @ w["W_dec"] + w["b_dec"])
    assert sae.origin == {"model_name": "gemma-3-270m-pt", "hook_name": "model.layers.5.output"}


def test_params_are_read_without_pickles_and_within_the_memory(tmp_path, monkeypatch):
    arrays = {name: tensor.numpy() for name, tensor in weights().items()} | {"threshold": np.zeros(F, np.float32)}

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    with pytest.raises(CheckpointError, match="params.npz cannot be read: .*allow_pickle=False"):
        masksae.load_sae(gemma_scope(tmp_path / "a", arrays | {"threshold": np.array([Hostile()], object)}))
    assert not (tmp_path / "owned").exists()
    folder = gemma_scope(tmp_path / "b", arrays | {"W_dec": np.zeros((10_000, 1000), np.float32)})
    assert (folder / "params.npz").stat().st_size < 10**6  # packed; it states 40 MB
    monkeypatch.setattr(formats, "available_bytes", lambda device: 50_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ConfigError, match="unpacks to 0.0 GB and is held twice .* 0.1 GB are free"):
        masksae.load_sae(folder)


def test_model_and_hook_point_go_along_through_every_form(tmp_path):
    record = VERSION_6 | {"architecture": "topk", "k": 4}
    record["metadata"] = record["metadata"] | {"hook_name": "blocks.3.hook_mlp_out", "prepend_bos": False}
    sae = masksae.load_sae(saelens(tmp_path / "sae", record, weights(norms=False)))
    for number, write in enumerate(("to_saelens", "save", "to_dictionary_learning", "save", "to_saelens")):
        sae = masksae.load_sae(getattr(sae, write)(tmp_path / str(number)))
        assert sae.origin["model_name"] == "gpt2-small" and sae.origin["hook_name"] == "blocks.3.hook_mlp_out"
    told = json.loads((tmp_path / "0/cfg.json").read_text())["metadata"]
    assert (told["model_name"], told["prepend_bos"]) == ("gpt2-small", False)
    trainer = json.loads((tmp_path / "2/config.json").read_text())["trainer"]
    assert (trainer["lm_name"], trainer["layer"], trainer["submodule_name"]) == ("gpt2-small", 3, "mlp_out_layer_3")
    sae.to_saelens(tmp_path / "other", model_name="gpt2", hook_name="blocks.4.hook_resid_post")
    assert masksae.load_sae(tmp_path / "other").origin["hook_name"] == "blocks.4.hook_resid_post"


def test_tensors_that_share_memory_are_saved(tmp_path):
    sae = SAE(SAEConfig(D, D, TopK(4))).requires_grad_(False)
    sae.b_dec += torch.arange(D)
    sae.b_enc = sae.b_dec
    again = masksae.load_sae(sae.save(tmp_path / "sae"))
    assert torch.equal(again.b_enc, sae.b_dec) and torch.equal(again(X), sae(X))
    assert torch.equal(masksae.load_sae(sae.to_saelens(tmp_path / "lens"))(X), sae(X))


def test_no_complaint_tells_to_delete_somebodys_folder(tmp_path):
    folder = SAE(SAEConfig(D, F, TopK(4))).save(tmp_path / "sae")
    (folder / "config.json").unlink()
    with pytest.raises(MasksaeError, match="config.json is missing") as found:
        masksae.load_sae(folder)
    broken = saelens(tmp_path / "lens", VERSION_6 | {"architecture": "topk", "k": [4]}, weights())
    with pytest.raises(MasksaeError, match="Restore it from a copy") as other:
        masksae.load_sae(broken)
    assert "elete" not in f"{found.value}{other.value}"
