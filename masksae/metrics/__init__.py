"""Scores of SAEs: one file a metric, pure functions on arrays. How an SAE was trained is not known here."""

from masksae.metrics import absorption, contexts, perturbation, probes, reconstruction, robustness, sparse_probing
from masksae.metrics.reconstruction import explained_variance

__all__ = [
    "absorption",
    "contexts",
    "explained_variance",
    "perturbation",
    "probes",
    "reconstruction",
    "robustness",
    "sparse_probing",
]
