"""The files of other libraries: what they call things, and SAEs written in and read from them.

    SAELens               cfg.json, sae_weights.safetensors (versions 2 to 6, finished SAEs and checkpoints)
    dictionary_learning   config.json, ae.pt
    sparsify              cfg.json, sae.safetensors
    Gemma Scope           params.npz (or params.safetensors and config.json, the second)

What a format keeps is the function x -> x_hat, to rounding, and of a latent its direction: rows of norm 1 where that
does not change what is selected. What SAELens and dictionary_learning have no field for (prefixes, training history,
the threshold of a TopK SAE) goes into a `masksae` entry of their JSON file, so that our own exports come back as they
were. A key or a tensor that could change the function and is not known here is refused, and so is what a format cannot
hold, or our SAEs cannot. What is computed with is the widest type of a file's tensors, so that thresholds in float32
beside weights in bfloat16 keep their digits.
"""

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masksae.errors import CheckpointError, ConfigError, readable
from masksae.files import atomic_dir, save_tensors
from masksae.memory import available_bytes
from masksae.saes.config import SAEConfig
from masksae.saes.rules import BatchTopK, Gated, JumpReLU, Ranked, ReLU, Selection, TopK
from masksae.saes.sae import SAE, SAE_FILES


@dataclass(frozen=True)
class Peer:
    """What an SAE of some rule is in another library."""

    rule: type[Selection]
    name: str
    """Architecture of SAELens, class of dictionary_learning."""
    tensors: dict[str, str]
    """Their tensors -> ours; `.T` for transposed."""
    trainer: str = ""
    """Trainer of dictionary_learning."""
    prefixed: bool = False
    """It is what an SAE with prefixes becomes, and stores the sizes of their groups."""


DIRECT = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
JUMP = DIRECT | {"threshold": "thresholds"}
ENCODER = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc"}
LINEAR = ENCODER | {"decoder.weight": "W_dec.T", "b_dec": "b_dec"}

SAELENS = [
    Peer(TopK, "topk", DIRECT),
    Peer(JumpReLU, "jumprelu", JUMP),
    Peer(BatchTopK, "jumprelu", DIRECT | {"threshold": "threshold"}),
    Peer(BatchTopK, "batchtopk", DIRECT | {"topk_threshold": "threshold"}),
    Peer(BatchTopK, "matryoshka_batchtopk", DIRECT | {"topk_threshold": "threshold"}),
    Peer(ReLU, "standard", DIRECT),
    Peer(
        Gated,
        "gated",
        {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec", "b_gate": "b_enc", "b_mag": "b_mag", "r_mag": "r_mag"},
    ),
]
"""Architectures of SAELens. An SAE is written as the first of its rule, and a file read as the first of its name; a
rule of one's own is appended: `SAELENS.append(Peer(Mine, "jumprelu", DIRECT | {"threshold": "cut"}))`."""

DICTIONARY_LEARNING = [
    Peer(
        ReLU, "AutoEncoder", ENCODER | {"decoder.weight": "W_dec.T", "bias": "b_dec"}, "StandardTrainerAprilUpdate"
    ),
    Peer(
        Gated,
        "GatedAutoEncoder",
        {
            "encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec",
            "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag",
        },
        "GatedSAETrainer",
    ),
    Peer(TopK, "AutoEncoderTopK", LINEAR, "TopKTrainer"),
    Peer(BatchTopK, "BatchTopKSAE", LINEAR, "BatchTopKTrainer"),
    Peer(BatchTopK, "MatryoshkaBatchTopKSAE", DIRECT, "MatryoshkaBatchTopKTrainer", prefixed=True),
    Peer(JumpReLU, "JumpReluAutoEncoder", JUMP, "JumpReluTrainer"),
]  # fmt: skip
"""Classes of dictionary_learning, in the same way."""

SPARSIFY = Peer(TopK, "topk", ENCODER | {"W_dec": "W_dec", "b_dec": "b_dec"})
GEMMA_SCOPE = Peer(JumpReLU, "jump_relu", JUMP)

SAELENS_VERSION = "6.54.12"
"""Version that the written `cfg.json` names; without one the folder would be read as an older format."""

SAELENS_KEYS = {
    "architecture", "d_in", "d_sae", "dtype", "k", "activation_fn", "activation_fn_str", "activation_fn_kwargs",
    "apply_b_dec_to_input", "finetuning_scaling_factor", "normalize_activations", "reshape_activations",
    "rescale_acts_by_decoder_norm", "matryoshka_widths",
}  # fmt: skip
"""Keys of `cfg.json` that decide what an SAE computes, all of which are read. `hook_z` reshapes heads into the one
vector that an SAE takes here."""

SAELENS_TRAINING = re.compile(
    r"(adam|autocast|aux|cached|checkpoint|compile|context|dataset|dead|device|eval|hook|is|jumprelu|l0|l1|llm|log|"
    r"logger|lp|lr|metadata|model|mse|n|neuronpedia|prefetch|prepend|resume|run|sae|save|seed|seqpos|sequence|store|"
    r"streaming|total|train|training|verbose|wandb)(_\w+)?|act_store_device|activations_mixing_fraction|"
    r"b_dec_init_method|decoder_(heuristic_|orthogonal_)?init(_norm)?|disable_concat_sequences|exclude_special_tokens|"
    r"expansion_factor|feature_(reinit_scale|sampling_method|sampling_window)|finetuning_(method|tokens)|"
    r"from_pretrained_path|init_encoder_as_decoder_transpose|noise_scale|normalize_sae_decoder|output_path|"
    r"pre_act_loss_coefficient|resample_batches|scale_sparsity_penalty_by_decoder_norm|target_l0|tokens_per_buffer|"
    r"topk_threshold_lr|"
    r"use_(cached_activations|chat_formatting|ghost_grads|matryoshka_aux_loss|sparse_activations)"
)
"""Keys of the configurations of training that versions 2 to 6 also wrote there: none is read at inference."""

SPARSIFY_KEYS = {
    "activation": "topk", "signed": False, "transcode": False, "skip_connection": False, "d_in": None, "k": None,
    "num_latents": None, "expansion_factor": None, "normalize_decoder": None, "multi_topk": None, "naive_decoder": None,
}  # fmt: skip
"""Keys of sparsify's `cfg.json` with the one value that can be read; None: any (the last three are of training)."""

NAMED = ("model_name", "hook_name", "prepend_bos")
"""What SAELens' metadata say of the activations, as `SAE.origin` has it."""


def write_saelens(folder, sae: SAE, **metadata) -> Path:
    """Write `sae_weights.safetensors` and `cfg.json`, for `sae_lens.SAE.load_from_disk`; `metadata` ("model_name",
    "hook_name", ...) is added to the file's own, in place of what `SAE.origin` says.

    BatchTopK (Matryoshka too) and JumpReLU become "jumprelu", TopK "topk", ReLU "standard", Gated "gated". Raises
    ConfigError for a rule that SAELens does not have, and for an SAE without an inference threshold.
    """
    peer, state = _theirs(SAELENS, sae, "SAELens")
    config, k = sae.config, getattr(sae.config.selection, "k", None)
    if peer.tensors.get("threshold") == "threshold":
        state["threshold"] = state["threshold"].expand(config.n_latents)  # the one, for every latent
    told: dict = {"model_name": "", "hook_name": "", "prepend_bos": True} | sae.origin | metadata
    if peer.rule is BatchTopK:
        widths = np.cumsum(config.group_sizes).tolist() if config.prefixes else []
        told["training_architecture"] = "matryoshka_batchtopk" if widths else "batchtopk"
        told["training_architecture_details"] = {"k": k} | ({"matryoshka_widths": widths} if widths else {})
    record = {
        "architecture": peer.name, "d_in": config.d_model, "d_sae": config.n_latents,
        "dtype": str(sae.dtype).removeprefix("torch."), "device": "cpu",
        "apply_b_dec_to_input": config.selection.centred,
        "normalize_activations": "none", "reshape_activations": "none",
        **({"k": k, "rescale_acts_by_decoder_norm": False} if peer.name == "topk" else {}),
        "metadata": {
            "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, "hook_head_index": None, **told,
            "masksae": _own(sae, state),
        },
    }  # fmt: skip
    with atomic_dir(folder, SAE_FILES) as tmp:
        save_tensors(_plain(peer, state), tmp / "sae_weights.safetensors")
        (tmp / "cfg.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def load_saelens(folder, *, device=None) -> SAE:
    """Read a SAELens folder of any version since 2: standard, topk, batchtopk (matryoshka too), jumprelu or gated,
    without run-time normalisation. Raises ConfigError, CheckpointError.

    Decoder rows are made unit where that does not change what is selected, a `scaling_factor` of finetuning is folded
    into them; a bias that the encoder's input lacks, or has against our convention, is folded into `b_enc`.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_saelens(sae.to_saelens(f"{folder}/sae"))
    >>> torch.equal(again.W_dec, sae.W_dec)
    True
    """
    return _load(folder, _read_saelens, device)


def _read_saelens(folder: Path) -> SAE:
    from safetensors.torch import load_file

    record, tensors = _json(folder / "cfg.json"), _tensors(folder / "sae_weights.safetensors", load_file)
    file, told = folder / "cfg.json", record | (record.get("metadata") or {})
    _check_saelens(file, record)
    kwargs, own = record.get("activation_fn_kwargs") or {}, told.get("masksae")
    details = told.get("training_architecture_details") or {}
    top_k = "topk" in (record.get("activation_fn_str"), record.get("activation_fn"))
    name = "topk" if top_k else record.get("architecture", "standard")
    rule = BatchTopK if name == "jumprelu" and "k" in details and _is_batch_topk(told, tensors) else None
    peer = _peer(SAELENS, name, file, own, rule)
    if "topk_threshold" in tensors:
        tensors["topk_threshold"] = tensors["topk_threshold"].float()  # of double precision, whatever the weights are
    _fold_scale(file, record, tensors)
    widths = record.get("matryoshka_widths") or details.get("matryoshka_widths") or []
    sae = _sae(
        file, peer, tensors, own=own, k=kwargs.get("k", record.get("k", details.get("k"))), widths=widths,
        shape=(record.get("d_sae"), record.get("d_in")), dtype=_dtype(record.get("dtype", "float32"), folder),
        applied=record.get("apply_b_dec_to_input", True), unit=bool(record.get("rescale_acts_by_decoder_norm")),
    )  # fmt: skip
    sae.origin = {key: told[key] for key in NAMED if told.get(key) not in (None, "")}
    hook, layer = told.get("hook_name") or told.get("hook_point"), told.get("hook_layer", told.get("hook_point_layer"))
    return _named(sae, hook_name=hook and hook.replace("{layer}", str(layer)))


def _check_saelens(file: Path, record: dict) -> None:
    """Raise ConfigError for what SAELens does at run time and cannot be done here, and for what is not known."""
    unknown = [key for key in record if key not in SAELENS_KEYS and not SAELENS_TRAINING.fullmatch(key)]
    _refuse(file, unknown)
    kwargs = record.get("activation_fn_kwargs") or {}
    _refuse(file, [f"activation_fn_kwargs.{key}" for key, value in kwargs.items() if key != "k" and value])
    for key, known in {
        "normalize_activations": ("none", None, False),
        "reshape_activations": ("none", None, "hook_z"),
        "activation_fn": ("relu", "topk", None),
        "activation_fn_str": ("relu", "topk", None),
    }.items():
        if (value := record.get(key)) not in known:
            raise ConfigError(
                f"{file}: {key} = {value!r} is done at run time and is in no weight; expected {known[0]!r}. Fold or "
                "undo it with SAELens first."
            )


def _fold_scale(file: Path, record: dict, tensors: dict[str, Tensor]) -> None:
    """Multiply decoder rows by what finetuning scales latents with, which older versions call by either name."""
    scale = [tensors.pop(name) for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    if not scale or (scale[0] == 1).all():
        return
    if not record.get("finetuning_scaling_factor"):
        raise ConfigError(
            f"{file}: the weights hold a scaling_factor, and finetuning_scaling_factor is not true. Set it to true if "
            "latents are to be scaled, or take the tensor out."
        )
    tensors["W_dec"] = tensors["W_dec"] * scale[0][:, None]


def _is_batch_topk(told: dict, tensors: dict[str, Tensor]) -> bool:
    """Whether a "jumprelu" of SAELens is a BatchTopK SAE as we have them: one threshold, decoder rows of norm 1."""
    if told.get("training_architecture") not in ("batchtopk", "matryoshka_batchtopk"):
        return False
    norms, threshold = tensors["W_dec"].float().norm(dim=1), tensors["threshold"]
    return bool((threshold == threshold[0]).all() and threshold[0] > 0 and (norms - 1).abs().max() < 1e-2)


def write_dictionary_learning(folder, sae: SAE, *, model_name: str = "", layer: int | None = None, **metadata) -> Path:
    """Write `ae.pt` and `config.json`, for the library's `from_pretrained` and for SAEBench's loaders; `metadata` goes
    to "trainer". Without `model_name` and `layer` they are those of `SAE.origin`. Raises ConfigError for a fractional
    k, which the library keeps as an integer, for a rule that it does not have, and for an SAE without an inference
    threshold."""
    config, rule, k = sae.config, sae.config.selection, getattr(sae.config.selection, "k", None)
    peer, state = _theirs(DICTIONARY_LEARNING, sae, "dictionary_learning")
    if k is not None and k != int(k):
        raise ConfigError(
            f"dictionary_learning keeps k as an integer, and this SAE has k = {k:g}. Export it "
            "with to_saelens, or train with a whole k."
        )
    tensors = _plain(peer, state)
    if k is not None:
        tensors["k"] = torch.tensor(k, dtype=torch.int)
    if rule.estimates_threshold:
        tensors["threshold"] = state["threshold"].cpu().clone()
    if peer.prefixed:
        tensors["group_sizes"] = torch.tensor(config.group_sizes)
    hook = sae.origin.get("hook_name", "") if layer is None else f"blocks.{layer}.hook_resid_post"
    place = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_post|mlp_out|attn_out)", hook)
    record = {
        "trainer": {
            "trainer_class": peer.trainer, "dict_class": peer.name, "activation_dim": config.d_model,
            "dict_size": config.n_latents, "k": k, "layer": int(place[1]) if place else None,
            "lm_name": model_name or sae.origin.get("model_name", ""),
            "submodule_name": f"{place[2]}_layer_{place[1]}" if place else hook, "seed": config.seed, **metadata,
        },
        "buffer": {},
        "masksae": _own(sae, state),
    }  # fmt: skip
    with atomic_dir(folder, SAE_FILES) as tmp:
        torch.save(tensors, tmp / "ae.pt")
        (tmp / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def load_dictionary_learning(folder, *, device=None) -> SAE:
    """Read a dictionary_learning folder (`ae.pt`, `config.json`) of one of its six classes; decoder rows are made unit.
    Loads weights only: a file that would run code is refused. Raises ConfigError, also for a BatchTopK SAE that was
    saved before it had a threshold; CheckpointError.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_dictionary_learning(sae.to_dictionary_learning(f"{folder}/sae"))
    >>> torch.equal(again.W_dec, sae.W_dec)
    True
    """
    return _load(folder, _read_dictionary_learning, device)


def _read_dictionary_learning(folder: Path) -> SAE:
    record, file = _json(folder / "config.json"), folder / "ae.pt"
    tensors = _tensors(file, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    trainer, own = record.get("trainer") or {}, record.get("masksae")
    peer = _peer(DICTIONARY_LEARNING, trainer.get("dict_class"), folder / "config.json", own)
    if peer.rule.estimates_threshold and "threshold" in tensors:
        peer = Peer(peer.rule, peer.name, peer.tensors | {"threshold": "threshold"})
    k, groups = tensors.pop("k", trainer.get("k")), tensors.pop("group_sizes", torch.empty(0))
    sae = _sae(file, peer, tensors, own=own, k=k, widths=groups.cumsum(0).tolist())
    place, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    if found := re.fullmatch(r"(\w+)_layer_(\d+)", place):
        place = f"blocks.{found[2]}.hook_{found[1]}"
    elif not place and layer is not None:
        place = f"blocks.{layer}.hook_resid_post"
    return _named(sae, model_name=trainer.get("lm_name"), hook_name=place)


def _read_sparsify(folder: Path) -> SAE:
    """An SAE of EleutherAI's sparsify; the folder is called as the module that it reads, the one above may name the
    model."""
    from safetensors.torch import load_file

    file = folder / "cfg.json"
    record = _json(file)
    _refuse(file, [key for key in record if key not in SPARSIFY_KEYS])
    for key, known in SPARSIFY_KEYS.items():
        if known is not None and record.get(key, known) != known:
            raise ConfigError(
                f"{file}: {key} = {record[key]!r}, expected {known!r}: what it computes is no SAE of ours."
            )
    n = record.get("num_latents") or record["d_in"] * record["expansion_factor"]
    tensors = _tensors(folder / "sae.safetensors", load_file)
    sae = _sae(file, SPARSIFY, tensors, k=record.get("k"), shape=(n, record["d_in"]))
    above, name = folder.resolve().parent / "config.json", folder.resolve().name
    hook = name if re.search(r"\.\d+(\.|$)", name) else ""
    return _named(sae, model_name=_json(above).get("model") if hook and above.is_file() else "", hook_name=hook)


def _read_gemma_scope(folder: Path) -> SAE:
    """A JumpReLU SAE of Gemma Scope, or of the second; what it reads is told by its path."""
    from safetensors.torch import load_file

    path, config = folder.resolve().as_posix(), folder / "config.json"
    file = next(folder / name for name in ("params.npz", "params.safetensors") if (folder / name).is_file())
    record = _json(config) if config.is_file() else {}
    elsewhere = re.search(r"gemma-scope\S*transcoder", path) or record.get("hf_hook_point_out")
    if elsewhere or record.get("architecture", "jump_relu") != "jump_relu":
        raise ConfigError(f"{folder} is a transcoder, expected a JumpReLU SAE that reconstructs what it reads.")
    tensors = _tensors(file, _npz if file.suffix == ".npz" else load_file)
    sae = _sae(file, GEMMA_SCOPE, {re.sub("^w_", "W_", name): tensor for name, tensor in tensors.items()})
    model, hook = str(record.get("model_name", "")).replace("-v3-", "-3-"), record.get("hf_hook_point_in")
    scope, layer = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", path), re.search(r"layer_(\d+)", path)
    if scope:
        model = f"google/gemma-2-{scope[1]}{'-it' if scope[2] == 'it' else ''}"
        place = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}[scope[3]]
        hook = f"blocks.{layer[1]}.{place}" if layer else "hook_embed"
    return _named(sae, model_name=model, hook_name=hook)


def _npz(path: Path) -> dict[str, Tensor]:
    """Arrays of an .npz file: no pickles, and nothing that is larger than the memory, by the sizes that the archive's
    directory states; more than that is never unpacked."""
    with zipfile.ZipFile(path) as archive:
        size, free = sum(member.file_size for member in archive.infolist()), available_bytes("cpu")
    if free is not None and 2 * size > free:
        raise ConfigError(
            f"{path} unpacks to {size / 1e9:,.1f} GB and is held twice while it is read; {free / 1e9:.1f} GB are free. "
            "Use a machine with more memory, or a narrower SAE."
        )
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


READERS: dict[str, Callable[..., SAE]] = {
    "sae_weights.safetensors": _read_saelens,
    "ae.pt": _read_dictionary_learning,
    "params.npz": _read_gemma_scope,
    "params.safetensors": _read_gemma_scope,
    "sae.safetensors": SAE.load,
}
"""By the file that tells the form; sparsify's `sae.safetensors` has a `cfg.json` beside it."""

FILES = (*READERS, "cfg.json", "config.json")
"""All that is ever read of a folder."""


def load_folder(path) -> SAE:
    """The SAE of a folder, or of the file in it that holds its weights, in any of the forms. Raises ConfigError,
    CheckpointError."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    for file, read in READERS.items():
        if (folder / file).is_file():
            sparsify = file == "sae.safetensors" and (folder / "cfg.json").is_file()
            return _load(folder, _read_sparsify if sparsify else read)
    raise ConfigError(f"{folder} holds none of {', '.join(READERS)}. Give the folder of one SAE.")


def _load(folder, read: Callable[..., SAE], device=None) -> SAE:
    """What `read` makes of a folder; every complaint about its files is one of ours."""
    with readable(folder):
        return read(Path(folder)).to(device)


@torch.no_grad()
def _sae(
    file: Path, peer: Peer, tensors: dict[str, Tensor], *, k=None, widths=(), shape=(None, None),
    dtype: torch.dtype | None = None, applied: bool | None = None, unit: bool = False, own: dict | None = None,
) -> SAE:  # fmt: skip
    """The SAE of a foreign file.

    k, widths  what it says of latents per token, and of the sizes of nested dictionaries
    shape      (F, d) that it states, None where it does not
    dtype      that it states; what is computed with is at least that
    applied    the encoder reads x - b_dec; None: as our rule does
    unit       decoder rows may be made unit though the rule is ranked: it ranks what they are multiplied with
    own        our own entry: then configuration, threshold and decoder rows are as they were
    """
    if missing := [name for name in peer.tensors if name not in tensors]:
        raise CheckpointError(f"{file} lacks {', '.join(missing)} of a {peer.name}. Is it complete?")
    _refuse(file, sorted(tensors.keys() - peer.tensors))
    state = {ours.removesuffix(".T"): _turned(tensors[name], ours) for name, ours in peer.tensors.items()}
    dtype = reduce(torch.promote_types, ([dtype] if dtype else []) + [tensor.dtype for tensor in state.values()])
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    rows, columns = state["W_dec"].shape
    config = SAEConfig.from_dict(own["config"]) if own else SAEConfig(
        shape[1] or columns, shape[0] or rows, _foreign(peer, k, file), _prefixes(widths, rows)
    )  # fmt: skip
    rule = config.selection
    if applied is not None and applied != rule.centred:
        shift = (-1 if applied else 1) * state["b_dec"] @ state["W_enc"]
        state["b_enc"] = state["b_enc"] + shift
        if "b_mag" in state:  # a Gated SAE's magnitudes read the same products
            state["b_mag"] = state["b_mag"] + state["r_mag"].exp() * shift
    if own:
        state["threshold"] = torch.tensor(own["threshold"], dtype=dtype)
    elif rule.estimates_threshold and not rule.keeps_k_per_token:
        state["threshold"] = _inference_threshold(state.get("threshold"), rule, file)
    sae = SAE(config).to(dtype)
    for name, target in sae.state_dict(keep_vars=True).items():
        if name not in state:
            continue  # threshold and tokens_since_fired, which a file need not have
        if state[name].shape != target.shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(state[name].shape)}, expected {tuple(target.shape)}. Is it complete?"
            )
        target.copy_(state[name])
    sae.history = own["history"] if own else []
    return (sae.normalise_() if not own and (unit or not rule.ranked) else sae).requires_grad_(False)


def _foreign(peer: Peer, k, file: Path) -> Selection:
    """The rule of an SAE that another library trained."""
    rule: Any = peer.rule
    if not issubclass(peer.rule, Ranked):
        return rule(None)
    if k is None:
        raise ConfigError(f"{file} is a {peer.name} that states no k. Write the number of latents per token into it.")
    return rule(int(k) if float(k) == int(k) else float(k))


def _prefixes(widths, n: int) -> tuple[float, ...]:
    """Shares of the groups of n latents from the widths of nested dictionaries; the whole one need not be listed."""
    edges = [0, *widths] if not widths or widths[-1] == n else [0, *widths, n]
    return tuple((high - low + 1e-6) / n for low, high in zip(edges, edges[1:]))  # rounding down gives the sizes back


def _inference_threshold(found: Tensor | None, rule: Selection, file: Path) -> Tensor:
    """The one threshold of a file. Raises ConfigError for one that no training has set yet."""
    value = math.nan if found is None else found.flatten()[0].item()
    if not value > 0:
        raise ConfigError(
            f"{file}: threshold is {'missing' if found is None else f'{value:g}'}, expected a number above 0. This "
            f"{type(rule).__name__} SAE was saved before it had one for inference. Train past the step at which its "
            "trainer starts to follow it, or write the one at which it keeps k latents of a token into the file."
        )
    return torch.as_tensor(value, dtype=found.dtype if found is not None else None)


def _peer(peers: list[Peer], name, file: Path, own: dict | None, rule: type[Selection] | None = None) -> Peer:
    """What the file of an SAE calls `name`: of the rule of our own entry, or the first. Raises ConfigError."""
    rule = type(SAEConfig.from_dict(own["config"]).selection) if own else rule
    for peer in peers:
        if peer.name == name and rule in (None, peer.rule):
            return peer
    known = ", ".join(dict.fromkeys(peer.name for peer in peers))
    raise ConfigError(f"{file} tells of a {name!r}. What can be read: {known}.")


def _theirs(peers: list[Peer], sae: SAE, library: str) -> tuple[Peer, dict[str, Tensor]]:
    """What an SAE is in another library, with its state: an inference threshold that has no field there is added to the
    latents' own, which changes no latent. Raises ConfigError."""
    rule, state = sae.config.selection, sae.state_dict()
    name, mine = type(rule).__name__, [peer for peer in peers if peer.rule is type(rule)]
    if not mine:
        raise ConfigError(
            f"{library} has nothing that computes what {name} does. Use `SAE.save`, or name it in masksae.saes.formats."
        )
    peer = next((peer for peer in mine if peer.prefixed == bool(sae.config.prefixes)), mine[0])
    threshold = state["threshold"]
    if rule.estimates_threshold:
        if threshold < 0 and not rule.keeps_k_per_token:
            raise ConfigError(
                f"This SAE of {name} has no inference threshold yet (found {threshold:g}), and {library} would let "
                "every positive latent through. Train it past TrainConfig.threshold_start, or set sae.threshold."
            )
    elif threshold:
        if "thresholds" not in state:
            raise ConfigError(
                f"This SAE of {name} cuts its latents at a threshold of {threshold.item():.4g}, "
                "which other libraries have no field for. Use `SAE.save`, or set sae.threshold to 0."
            )
        state["thresholds"], state["threshold"] = state["thresholds"] + threshold, torch.zeros_like(threshold)
    return peer, state


def _own(sae: SAE, state: dict[str, Tensor]) -> dict:
    """What only we know: the entry `masksae`."""
    return {
        "config": sae.config.to_dict(),
        "threshold": state["threshold"].flatten()[0].item(),
        "history": sae.history,
    }


def _named(sae: SAE, **origin) -> SAE:
    """With what its file says of the activations, as far as it says something."""
    sae.origin |= {key: value for key, value in origin.items() if value}
    return sae


def _refuse(file: Path, unknown: list[str]) -> None:
    """Raise ConfigError for keys or tensors that are not known."""
    if unknown:
        raise ConfigError(
            f"{file}: {', '.join(unknown)} is not known here, and could change what the SAE computes. Fold it into the "
            "weights with the library that wrote it, or take it out if it means nothing."
        )


def _turned(tensor: Tensor, name: str) -> Tensor:
    return tensor.t() if name.endswith(".T") else tensor


def _plain(peer: Peer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names there, each with its own memory."""
    tensors = {theirs: _turned(state[ours.removesuffix(".T")], ours) for theirs, ours in peer.tensors.items()}
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def _dtype(name: str, folder) -> torch.dtype:
    """The float type that SAELens calls "float32" or "torch.float32". Raises ConfigError."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{folder}: dtype {name!r} is no type of floats. Known: float32, float64, bfloat16, float16.")
    return found


def _json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Give the folder that holds it.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no record. Restore it from a copy.")
    return record


def _tensors(path: Path, load: Callable[[Path], dict]) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Give the folder that holds it.")
    try:
        return dict(load(path))
    except ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
