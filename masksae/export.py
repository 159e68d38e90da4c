"""SAEs in the formats of SAELens and dictionary_learning, in and out, and as what SAEBench evaluates.

What a format keeps is the function x -> f -> x_hat, to rounding. What it has no field for (prefixes, training history, the threshold of
a TopK SAE) goes into a `masksae` entry of its JSON file, so that our own exports come back as they were. What a format cannot hold, or
this class cannot, is refused with the reason.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from masksae.errors import CheckpointError, ConfigError, readable
from masksae.files import atomic_dir, save_tensors
from masksae.saes.config import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from masksae.saes.sae import SAE, SAE_FILES


@dataclass
class AdapterConfig:
    """What SAEBench asks of an SAE's `cfg`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str
    device: str = "cpu"
    hook_head_index: int | None = None
    context_size: int = 128
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None
    model_from_pretrained_kwargs: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class SAEBenchAdapter(nn.Module):
    """An SAE as SAEBench's evaluations take it: parameters as attributes, `cfg`, and a `to` that keeps `device` and `dtype` true."""

    def __init__(self, sae: SAE, cfg: AdapterConfig):
        super().__init__()
        self.sae, self.cfg = sae, cfg
        self.device, self.dtype = sae.device, sae.dtype

    def __getattr__(self, name: str):
        if name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            return getattr(super().__getattr__("sae"), name)
        return super().__getattr__(name)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def decode(self, f: Tensor) -> Tensor:
        return self.sae.decode(f)

    def forward(self, x: Tensor) -> Tensor:
        return self.sae(x)

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)
        self.device, self.dtype = self.sae.device, self.sae.dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether all decoder rows have norm 1, as SAEBench's metrics assume."""
        tolerance = 1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5
        return bool((self.W_dec.norm(dim=1) - 1).abs().max() < tolerance)


def load_sae(folder) -> SAE:
    """Read an SAE in the form of SAELens, dictionary_learning or masksae, told by its files. Raises ConfigError, CheckpointError.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_sae(SAE(SAEConfig(4, 16, TopK(2))).to_saelens(f"{folder}/sae")).config.n_latents
    16
    """

    folder = Path(folder)
    readers = {"sae_weights.safetensors": load_saelens, "ae.pt": load_dictionary_learning, "sae.safetensors": SAE.load}
    for file, read in readers.items():
        if (folder / file).is_file():
            return read(folder)
    raise ConfigError(f"{folder} holds none of {', '.join(readers)}. Give the folder of one SAE.")


SAELENS_VERSION = "6.54.12"
"""Version that the written `cfg.json` names; without one the folder would be read as an older format."""

TRAINERS = {
    BatchTopK: ("BatchTopKTrainer", "BatchTopKSAE"),
    TopK: ("TopKTrainer", "AutoEncoderTopK"),
    JumpReLU: ("JumpReluTrainer", "JumpReluAutoEncoder"),
    Gated: ("GatedSAETrainer", "GatedAutoEncoder"),
    ReLU: ("StandardTrainerAprilUpdate", "AutoEncoder"),
}

MATRYOSHKA_TRAINER = ("MatryoshkaBatchTopKTrainer", "MatryoshkaBatchTopKSAE")


def to_saelens(sae: SAE, folder, *, model_name: str = "", hook_name: str = "", **metadata) -> Path:
    """Write `sae_weights.safetensors` and `cfg.json`, for `sae_lens.SAE.load_from_disk`; `metadata` is added to the file's own.

    BatchTopK (Matryoshka too) and JumpReLU become "jumprelu", TopK "topk", ReLU "standard", Gated "gated".
    """
    rule = sae.config.selection
    kind, extra = type(rule), {}
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "b_enc": sae.b_enc}
    architecture = {TopK: "topk", ReLU: "standard", Gated: "gated"}.get(kind, "jumprelu")
    if kind is BatchTopK:
        tensors["threshold"] = sae.threshold.clamp(min=0).expand(sae.config.n_latents)
    elif kind is JumpReLU:
        tensors["threshold"] = sae.thresholds
    elif kind is Gated:
        tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": sae.b_mag, "r_mag": sae.r_mag}
    elif kind is TopK:
        extra = {"k": rule.k, "rescale_acts_by_decoder_norm": False}
    record = {
        "architecture": architecture, "d_in": sae.config.d_model, "d_sae": sae.config.n_latents,
        "dtype": str(sae.dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": rule.centred,
        "normalize_activations": "none", "reshape_activations": "none", **extra,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, "model_name": model_name, "hook_name": hook_name,
            "hook_head_index": None, "prepend_bos": True, **metadata, "masksae": _own(sae),
        },
    }  # fmt: skip
    with atomic_dir(folder, SAE_FILES) as tmp:
        save_tensors(_plain(tensors), tmp / "sae_weights.safetensors")
        (tmp / "cfg.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def _from_file(load):
    """A loader whose every complaint about a file is one of ours."""

    @functools.wraps(load)
    def checked(folder, *, device=None) -> SAE:
        with readable(folder):
            return load(folder, device=device)

    return checked


@_from_file
def load_saelens(folder, *, device=None) -> SAE:
    """Read a SAELens folder: standard, topk, jumprelu or gated, without run-time normalisation. Raises ConfigError, CheckpointError.

    Decoder rows are made unit where that does not change what is selected; a bias that the encoder's input lacks, or has against our
    convention, is folded into `b_enc`.

    >>> import tempfile
    >>> from masksae import TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_saelens(sae.to_saelens(f"{folder}/sae"))
    >>> torch.equal(again.W_dec, sae.W_dec)
    True
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    record = _json(folder / "cfg.json")
    tensors = _read(folder / "sae_weights.safetensors", load_file)
    architecture = record.get("architecture")
    for key, fine in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if record.get(key, fine) not in (fine, None):
            raise ConfigError(
                f"{folder}: {key} = {record[key]!r} is done at run time and cannot be folded into weights. Fold or undo it with SAELens first."
            )
    metadata = record.get("metadata", {})
    rule = {
        "standard": lambda: ReLU(None),
        "gated": lambda: Gated(None),
        "topk": lambda: TopK(int(record["k"])),
        "jumprelu": lambda: JumpReLU(None),
    }.get(architecture)
    if rule is None:
        known = "standard, topk, jumprelu, gated"
        raise ConfigError(f"{folder} holds a SAELens {architecture!r}. What can be read: {known}.")
    own = metadata.get("masksae")
    config = SAEConfig.from_dict(own["config"]) if own else SAEConfig(record["d_in"], record["d_sae"], rule())
    sae = SAE(config).to(_dtype(record.get("dtype", "float32"), folder))
    names = {"b_gate": "b_enc", "threshold": "thresholds"}
    state = {names.get(name, name): value for name, value in tensors.items()}
    if isinstance(config.selection, TopK):
        state.pop("thresholds", None)
    applied = record.get("apply_b_dec_to_input", True)
    if applied != config.selection.centred:
        state["b_enc"] = state["b_enc"] + (-1 if applied else 1) * state["b_dec"] @ state["W_enc"]
    fold = architecture != "topk" or record.get("rescale_acts_by_decoder_norm")
    return _filled(sae, state, own, folder, fold).to(device)


def to_dictionary_learning(sae: SAE, folder, *, model_name: str = "", layer: int = 0, **metadata) -> Path:
    """Write `ae.pt` and `config.json`, for the library's `from_pretrained` and for SAEBench's loaders; `metadata` goes to "trainer". Raises
    ConfigError for a fractional k, which the library keeps as an integer."""
    rule, kind = sae.config.selection, type(sae.config.selection)
    if isinstance(rule, TopK) and rule.k != int(rule.k):
        raise ConfigError(
            f"dictionary_learning keeps k as an integer, and this SAE has k = {rule.k:g}. Export it with to_saelens, or train with a whole k."
        )
    matryoshka = kind is BatchTopK and bool(sae.config.prefixes)
    trainer, dictionary = MATRYOSHKA_TRAINER if matryoshka else TRAINERS[kind]
    state = {theirs: _of(sae, ours) for theirs, ours in _dl_names(dictionary).items()}
    if isinstance(rule, TopK):
        state |= {"k": torch.tensor(rule.k, dtype=torch.int), "threshold": sae.threshold.detach()}
    if matryoshka:
        state["group_sizes"] = torch.tensor(sae.config.group_sizes)
    record = {
        "trainer": {
            "trainer_class": trainer, "dict_class": dictionary, "activation_dim": sae.config.d_model, "dict_size": sae.config.n_latents,
            "k": getattr(rule, "k", None), "layer": layer, "lm_name": model_name, "submodule_name": f"resid_post_layer_{layer}",
            "seed": sae.config.seed, **metadata,
        },
        "buffer": {},
        "masksae": _own(sae),
    }  # fmt: skip
    with atomic_dir(folder, SAE_FILES) as tmp:
        torch.save(_plain(state), tmp / "ae.pt")
        (tmp / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


@_from_file
def load_dictionary_learning(folder, *, device=None) -> SAE:
    """Read a dictionary_learning folder (`ae.pt`, `config.json`) of one of its six classes; decoder rows are made unit. Loads weights
    only: a file that would run code is refused. Raises ConfigError, CheckpointError.

    >>> import tempfile
    >>> from masksae import TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_dictionary_learning(sae.to_dictionary_learning(f"{folder}/sae"))
    >>> torch.equal(again.W_dec, sae.W_dec)
    True
    """
    folder = Path(folder)
    record = _json(folder / "config.json")
    state = _read(folder / "ae.pt", lambda path: torch.load(path, map_location="cpu", weights_only=True))
    dictionary = record.get("trainer", {}).get("dict_class")
    known = [MATRYOSHKA_TRAINER[1], *(name for _, name in TRAINERS.values())]
    if dictionary not in known:
        raise ConfigError(f"{folder} holds a dictionary_learning {dictionary!r}. What can be read: {', '.join(known)}.")
    names = _dl_names(dictionary)
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"{folder}/ae.pt lacks {', '.join(missing)} of a {dictionary}. Is it this config.json's?")
    tensors = {ours.removesuffix(".T"): _turned(state[theirs], ours) for theirs, ours in names.items()}
    n, d = tensors["W_dec"].shape
    k = int(state.get("k", record["trainer"].get("k") or 1))
    rules = {"AutoEncoderTopK": TopK(k), "JumpReluAutoEncoder": JumpReLU(None)}
    rules |= {"GatedAutoEncoder": Gated(None), "AutoEncoder": ReLU(None)}
    groups = state["group_sizes"].tolist() if "group_sizes" in state else []
    prefixes = tuple((size + 1e-6) / n for size in groups)  # rounding down gives the sizes back
    own = record.get("masksae")
    found = SAEConfig(d, n, rules.get(dictionary, BatchTopK(k)), prefixes)
    config = SAEConfig.from_dict(own["config"]) if own else found
    sae = SAE(config).to(tensors["W_dec"].dtype)
    if "threshold" in state and isinstance(config.selection, TopK):
        tensors["threshold"] = state["threshold"].to(sae.dtype)
    return _filled(sae, tensors, own, folder, not isinstance(config.selection, TopK)).to(device)


def _dl_names(dictionary: str) -> dict[str, str]:
    """Their state-dict keys -> our parameters, `.T` for transposed."""
    linear = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
    direct = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    gated = {"decoder_bias": "b_dec", "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag"}
    return {
        "MatryoshkaBatchTopKSAE": direct,
        "JumpReluAutoEncoder": direct | {"threshold": "thresholds"},
        "AutoEncoder": linear | {"bias": "b_dec"},
        "GatedAutoEncoder": {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T"} | gated,
    }.get(dictionary, linear | {"b_dec": "b_dec"})


def _of(sae: SAE, name: str) -> Tensor:
    return _turned(getattr(sae, name.removesuffix(".T")), name)


def _turned(tensor: Tensor, name: str) -> Tensor:
    return tensor.t() if name.endswith(".T") else tensor


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _dtype(name: str, folder) -> torch.dtype:
    """The float type that SAELens calls "float32" or "torch.float32". Raises ConfigError."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{folder}: dtype {name!r} is no type of floats. Known: float32, float64, bfloat16, float16.")
    return found


def _own(sae: SAE) -> dict:
    return {"config": sae.config.to_dict(), "threshold": sae.threshold.item(), "history": sae.history}


@torch.no_grad()
def _filled(sae: SAE, tensors: dict[str, Tensor], own: dict | None, folder, fold: bool) -> SAE:
    """Put tensors into an SAE, with unit rows if that may be done. Raises CheckpointError."""
    for name, target in sae.state_dict(keep_vars=True).items():
        if name in tensors:
            if tensors[name].shape != target.shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {tuple(tensors[name].shape)}, its configuration says {tuple(target.shape)}."
                )
            target.copy_(tensors[name])
        elif name not in ("threshold", "tokens_since_fired"):
            raise CheckpointError(f"{folder} lacks the tensor {name}. Is it complete?")
    if own:
        sae.threshold.fill_(own["threshold"])
        sae.history = own["history"]
    elif fold:
        sae.normalise_()
    return sae.requires_grad_(False)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Give the folder that holds it.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error


def _read(path: Path, load) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Give the folder that holds it.")
    try:
        return load(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def saebench_adapter(sae: SAE, *, model_name: str, layer: int, hook_name: str | None = None) -> SAEBenchAdapter:
    """`sae` for SAEBench: `run_eval(config, [(name, adapter)], ...)`. `model_name` and `hook_name` are TransformerLens's."""
    cfg = AdapterConfig(
        model_name, sae.config.d_model, sae.config.n_latents, layer, hook_name or f"blocks.{layer}.hook_resid_post",
        architecture=("matryoshka_" if sae.config.prefixes else "") + type(sae.config.selection).__name__.lower(),
        dtype=str(sae.dtype).removeprefix("torch."), device=str(sae.device),
    )  # fmt: skip
    return SAEBenchAdapter(sae, cfg)
