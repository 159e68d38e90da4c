"""Sparse autoencoders trained on token-masked text, and the metrics that test what masking does to them.

Open companion to "Improving Robustness In Sparse Autoencoders via Masked Regularization" (arXiv 2604.06495). Names load
on first use, so `import masksae` takes a tenth of a second.
"""

import importlib

from masksae import provenance as provenance  # before anything else is loaded: it notes what the files say now

__version__ = "0.3.0"

_HOME = {
    "load_profile": "masksae.study.profile",
    "Profile": "masksae.study.profile",
    "mask_tokens": "masksae.masking",
    "ActivationStream": "masksae.activations",
    "MATRYOSHKA": "masksae.saes.config",
    "AuxK": "masksae.saes.config",
    "BatchTopK": "masksae.saes.rules",
    "C2R": "masksae.saes.penalties",
    "Gated": "masksae.saes.rules",
    "JumpReLU": "masksae.saes.rules",
    "OrtSAE": "masksae.saes.penalties",
    "ReLU": "masksae.saes.rules",
    "TopK": "masksae.saes.rules",
    "SAEConfig": "masksae.saes.config",
    "SAE": "masksae.saes.sae",
    "TrainConfig": "masksae.training.config",
    "train": "masksae.training.group",
    "load_snapshots": "masksae.training.group",
    "load_saelens": "masksae.saes.formats",
    "load_dictionary_learning": "masksae.saes.formats",
    "load_sae": "masksae.export",
    "load_model": "masksae.data.models",
    "mask_dataset": "masksae.plugins",
    "mask_inputs": "masksae.plugins",
    "activation_batches": "masksae.plugins",
    "Run": "masksae.study.run",
}

__all__ = ["export", "metrics", *_HOME]


def __getattr__(name: str):
    if name in ("export", "metrics"):
        return importlib.import_module(f"masksae.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'masksae' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted([*globals(), *__all__])
