"""The files of SAELens and dictionary_learning, written from and read into an SAE's configuration, state and history.

What a format keeps is the function x -> f -> x_hat, to rounding. What it has no field for (prefixes, training history,
the threshold of a TopK SAE) goes into a `masksae` entry of its JSON file, so that our own exports come back as they
were. What a format cannot hold, or our SAEs cannot, is refused with the reason. What a rule's tensors are called
elsewhere, the rule says (`saes/rules.py`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from masksae.errors import CheckpointError, ConfigError
from masksae.files import atomic_dir, save_tensors
from masksae.saes.config import SAEConfig
from masksae.saes.rules import SELECTIONS, Peer, Selection

SAE_FILES = ("sae.safetensors", "config.json", "sae_weights.safetensors", "cfg.json", "ae.pt")
"""What the folder of one SAE may hold, in our form, SAELens' and dictionary_learning's: such a folder may be written
over."""

SAELENS_VERSION = "6.54.12"
"""Version that the written `cfg.json` names; without one the folder would be read as an older format."""


class Read(NamedTuple):
    """An SAE out of a foreign file."""

    config: SAEConfig
    state: dict[str, Tensor]
    """Parameters and buffers by our names, as far as the file has them."""
    dtype: torch.dtype
    history: list[dict]
    fold: bool
    """Decoder rows may have other norms than 1, and may be given norm 1."""


def write_saelens(folder, config: SAEConfig, state: dict[str, Tensor], history: list[dict], *, model_name: str = "",
                  hook_name: str = "", **metadata) -> Path:  # fmt: skip
    """Write `sae_weights.safetensors` and `cfg.json`, for `sae_lens.SAE.load_from_disk`; `metadata` is added to the
    file's own.

    BatchTopK (Matryoshka too) and JumpReLU become "jumprelu", TopK "topk", ReLU "standard", Gated "gated". Raises
    ConfigError for a rule that SAELens does not have.
    """
    rule = config.selection
    if rule.saelens is None:
        raise _unknown_there(rule, "SAELens")
    state = _own_thresholds(rule, state)
    tensors, settings = rule.to_saelens(state)
    record = {
        "architecture": rule.saelens.name, "d_in": config.d_model, "d_sae": config.n_latents,
        "dtype": str(state["W_dec"].dtype).removeprefix("torch."), "device": "cpu",
        "apply_b_dec_to_input": rule.centred,
        "normalize_activations": "none", "reshape_activations": "none", **settings,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, "model_name": model_name,
            "hook_name": hook_name, "hook_head_index": None, "prepend_bos": True, **metadata,
            "masksae": _own(config, state, history),
        },
    }  # fmt: skip
    with atomic_dir(folder, SAE_FILES) as tmp:
        save_tensors(_plain(tensors), tmp / "sae_weights.safetensors")
        (tmp / "cfg.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def read_saelens(folder: Path) -> Read:
    """What `masksae.load_saelens` reads: a bias that the encoder's input lacks, or has against our convention, is
    folded into `b_enc`."""
    from safetensors.torch import load_file

    record = _json(folder / "cfg.json")
    tensors = _read(folder / "sae_weights.safetensors", load_file)
    for key in ("normalize_activations", "reshape_activations"):
        if record.get(key, "none") not in ("none", None):
            raise ConfigError(
                f"{folder}: {key} = {record[key]!r} is done at run time and cannot be folded into weights. "
                "Fold or undo it with SAELens first."
            )
    architecture, own = record.get("architecture"), record.get("metadata", {}).get("masksae")
    known = {r.saelens.name: r for r in SELECTIONS.values() if r.saelens and not r.saelens.written_only}
    if architecture not in known:
        raise ConfigError(f"{folder} holds a SAELens {architecture!r}. What can be read: {', '.join(known)}.")
    if own:
        config = SAEConfig.from_dict(own["config"])
    else:
        config = SAEConfig(record["d_in"], record["d_sae"], known[architecture].foreign(record.get("k")))
    rule = config.selection
    state = {ours: tensors[theirs] for theirs, ours in rule.saelens.tensors.items() if theirs in tensors}
    applied = record.get("apply_b_dec_to_input", True)
    if applied != rule.centred:
        state = rule.shifted(state, (-1 if applied else 1) * state["b_dec"] @ state["W_enc"])
    fold = not rule.ranked or bool(record.get("rescale_acts_by_decoder_norm"))
    return _with_own(Read(config, state, _dtype(record.get("dtype", "float32"), folder), [], fold), own)


def write_dictionary_learning(folder, config: SAEConfig, state: dict[str, Tensor], history: list[dict], *,
                              model_name: str = "", layer: int | None = None, **metadata) -> Path:  # fmt: skip
    """Write `ae.pt` and `config.json`, for the library's `from_pretrained` and for SAEBench's loaders; `metadata` goes
    to "trainer". Raises ConfigError for a fractional k, which the library keeps as an integer, and for a rule that it
    does not have."""
    rule, k = config.selection, getattr(config.selection, "k", None)
    if not rule.dictionary_learning:
        raise _unknown_there(rule, "dictionary_learning")
    if k is not None and k != int(k):
        raise ConfigError(
            f"dictionary_learning keeps k as an integer, and this SAE has k = {k:g}. Export it "
            "with to_saelens, or train with a whole k."
        )
    peer, state = _dictionary(config), _own_thresholds(rule, state)
    tensors = {theirs: _turned(state[ours.removesuffix(".T")], ours) for theirs, ours in peer.tensors.items()}
    if k is not None:
        tensors["k"] = torch.tensor(k, dtype=torch.int)
    if rule.estimates_threshold:
        tensors["threshold"] = state["threshold"]
    if peer.prefixed:
        tensors["group_sizes"] = torch.tensor(config.group_sizes)
    record = {
        "trainer": {
            "trainer_class": peer.trainer, "dict_class": peer.name, "activation_dim": config.d_model,
            "dict_size": config.n_latents, "k": k, "layer": layer, "lm_name": model_name,
            "submodule_name": "" if layer is None else f"resid_post_layer_{layer}", "seed": config.seed, **metadata,
        },
        "buffer": {},
        "masksae": _own(config, state, history),
    }  # fmt: skip
    with atomic_dir(folder, SAE_FILES) as tmp:
        torch.save(_plain(tensors), tmp / "ae.pt")
        (tmp / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def read_dictionary_learning(folder: Path) -> Read:
    """What `masksae.load_dictionary_learning` reads."""
    record = _json(folder / "config.json")
    tensors = _read(folder / "ae.pt", lambda path: torch.load(path, map_location="cpu", weights_only=True))
    name, own = record.get("trainer", {}).get("dict_class"), record.get("masksae")
    known = {p.name: (r, p) for r in SELECTIONS.values() for p in r.dictionary_learning if not p.written_only}
    if name not in known:
        raise ConfigError(f"{folder} holds a dictionary_learning {name!r}. What can be read: {', '.join(known)}.")
    rule, peer = known[name]
    if own:
        config = SAEConfig.from_dict(own["config"])
        peer = next((mine for mine in config.selection.dictionary_learning if mine.name == name), peer)
    missing = [theirs for theirs in peer.tensors if theirs not in tensors]
    if missing:
        raise CheckpointError(f"{folder}/ae.pt lacks {', '.join(missing)} of a {name}. Is it this config.json's?")
    state = {ours.removesuffix(".T"): _turned(tensors[theirs], ours) for theirs, ours in peer.tensors.items()}
    if not own:
        n, d = state["W_dec"].shape
        groups = tensors["group_sizes"].tolist() if "group_sizes" in tensors else []
        prefixes = tuple((size + 1e-6) / n for size in groups)  # rounding down gives the sizes back
        k = tensors.get("k", record["trainer"].get("k") or 1)
        config = SAEConfig(d, n, rule.foreign(k), prefixes)
    if "threshold" in tensors and config.selection.estimates_threshold:
        state["threshold"] = tensors["threshold"]
    return _with_own(Read(config, state, state["W_dec"].dtype, [], not config.selection.ranked), own)


def _dictionary(config: SAEConfig) -> Peer:
    """What an SAE is in dictionary_learning: a class for prefixes if its rule has one there."""
    peers = config.selection.dictionary_learning
    return next((peer for peer in peers if peer.prefixed == bool(config.prefixes)), peers[0])


def _unknown_there(rule: Selection, library: str) -> ConfigError:
    name = type(rule).__name__
    return ConfigError(f"{library} has nothing that computes what {name} does. Use `SAE.save`, or name it in {name}.")


def _own_thresholds(rule: Selection, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State without an inference threshold where the other library has no field for one, which changes no latent: it is
    added to the latents' own. Raises ConfigError for a rule that has none."""
    if rule.estimates_threshold or not state["threshold"]:
        return state
    if "thresholds" not in state:
        raise ConfigError(
            f"This SAE of {type(rule).__name__} cuts its latents at a threshold of {state['threshold'].item():.4g}, "
            "which other libraries have no field for. Use `SAE.save`, or set sae.threshold to 0."
        )
    return state | {
        "thresholds": state["thresholds"] + state["threshold"],
        "threshold": torch.zeros_like(state["threshold"]),
    }


def _own(config: SAEConfig, state: dict[str, Tensor], history: list[dict]) -> dict:
    """What only we know: the entry `masksae`."""
    return {"config": config.to_dict(), "threshold": state["threshold"].item(), "history": history}


def _with_own(found: Read, own: dict | None) -> Read:
    """With the threshold and the history of our own entry, if there is one: then decoder rows are as they were."""
    if not own:
        return found
    threshold = torch.tensor(own["threshold"], dtype=found.dtype)
    return found._replace(state=found.state | {"threshold": threshold}, history=own["history"], fold=False)


def _turned(tensor: Tensor, name: str) -> Tensor:
    return tensor.t() if name.endswith(".T") else tensor


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def _dtype(name: str, folder) -> torch.dtype:
    """The float type that SAELens calls "float32" or "torch.float32". Raises ConfigError."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{folder}: dtype {name!r} is no type of floats. Known: float32, float64, bfloat16, float16.")
    return found


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Give the folder that holds it.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error


def _read(path: Path, load: Callable[[Path], dict]) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Give the folder that holds it.")
    try:
        return load(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
