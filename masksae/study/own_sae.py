"""Somebody's own SAE in a run's place: `sae = OwnSAE("laptop", "MY_SAE", out="report")`, then `evaluate(sae,
["absorption"])`.

The profile says whose activations the SAE reads and on which text and tasks it is scored; it is scored by the very
functions that score a run's SAEs, as trained and at matched clean L0. Nothing is trained here.
"""

import sys
from pathlib import Path

from masksae import cache
from masksae.errors import ConfigError, MasksaeError, OutputError, nearest
from masksae.export import load_sae
from masksae.metrics.reconstruction import calibrated_threshold, reconstruction
from masksae.parallel import once
from masksae.study.inputs import Inputs
from masksae.study.scores.absorption import absorption_scores, context_scores
from masksae.study.scores.perturbation import concept_scores
from masksae.study.scores.probing import ood_scores, probing_scores
from masksae.study.scores.reconstruction import reconstruction_scores
from masksae.study.scores.robustness import robustness_scores
from masksae.study.store import Entry, Subject

SCORERS = {
    "reconstruction": reconstruction_scores,
    "absorption": absorption_scores,
    "contexts": context_scores,
    "probing": probing_scores,
    "ood": ood_scores,
    "perturbation": concept_scores,
    "robustness": robustness_scores,
}
METRICS = tuple(SCORERS)
"""What can be scored, in the order of the notebooks."""


class OwnSAE(Subject):
    """A profile's inputs with one SAE from a folder.

    name  what it is called; None: the folder's name
    l0    matched clean L0; None: the SAE's own k or target, or else the L0 that it has
    out   where results go

    Raises ConfigError for an SAE of another width and an l0 that it cannot have, CheckpointError, OutputError.
    """

    def __init__(self, profile, folder, *, out, name: str | None = None, l0: float | None = None):
        self.folder, self.sae, self._l0 = Path(folder), load_sae(folder), l0
        self.name = name or self.folder.resolve().name
        super().__init__(Inputs(profile, out), self.name, [])
        if self.sae.config.d_model != self.width:
            raise ConfigError(
                f"The SAE in {folder} reads width {self.sae.config.d_model}, {self.profile.model.source} has "
                f"{self.width}. Name the profile of its model."
            )
        self._check_l0()
        self.sae.to(self.device)
        self.entries = [self._entry()]

    def _check_l0(self) -> None:
        l0, latents, rule = self._l0, self.sae.config.n_latents, self.sae.config.selection
        if l0 is not None and not 0 < l0 <= latents:
            raise ConfigError(
                f"l0 is {l0}, expected a number above 0, up to the {latents} latents of this SAE. Or leave it out."
            )
        if l0 is not None and rule.keeps_k_per_token and l0 != rule.goal:
            raise ConfigError(
                f"l0 is {l0}, and this SAE keeps its k = {rule.goal} latents of every token. Leave l0 out."
            )

    @once
    def k(self) -> float:
        """The clean L0 at which matched scores are taken."""
        return self._l0 or self.sae.config.selection.goal or round(reconstruction(self.sae, self.held_out).l0, 1)

    def check_reach(self) -> None:
        """If no threshold gives clean L0 = k: ConfigError if that k was asked for, a line on stderr if it is the SAE's
        own."""
        if self.sae.config.selection.keeps_k_per_token:
            return
        threshold = calibrated_threshold(self.sae, self.held_out, self.k)
        reached = reconstruction(self.sae, self.held_out, threshold=threshold).l0
        if abs(reached / self.k - 1) > 0.01:
            told = f"no threshold of this SAE gives L0 {self.k:g} on the clean text; the nearest is {reached:.4g}"
            if self._l0 is not None:
                raise ConfigError(f"l0 is {self.k:g}, and {told}. Give another, or leave l0 out.")
            print(f"masksae: {told}, and matched scores are taken there.", file=sys.stderr, flush=True)

    def _entry(self) -> Entry:
        row = {"sae": self.name, "arm": self.name, "p": 0.0, "grid": self.name, "k": self.k, "seed": 0}
        weights = cache.fingerprint(value for _, value in sorted(self.sae.state_dict().items()))
        recipe = [self.identity(self.profile.model, self.profile.text), self.sae.config.to_dict(), weights, self.k]
        return Entry(row | {"architecture": self.sae.config.architecture}, recipe, lambda: self.sae)

    def latents_of(self, row: dict) -> int:
        return self.sae.config.n_latents


def evaluate(own: OwnSAE, metrics: list[str]) -> dict[str, list[dict]]:
    """Rows of each metric, as trained and at matched clean L0, each written to `NAME.json` in the SAE's `results` as it
    comes.

    A metric that cannot be taken has one row, {"sae": name, "failed": why}, and the others are taken all the same.
    Raises ConfigError for an unknown metric, and the first reason if no metric can be taken.
    """
    for metric in metrics:
        if metric not in SCORERS:
            raise ConfigError(f"There is no metric {metric!r}.{nearest(metric, METRICS)}")
    own.check_reach()
    scores, errors = {}, []
    for metric in (each for each in METRICS if each in metrics):
        try:
            scores[metric] = SCORERS[metric](own)
        except OutputError:
            raise
        except MasksaeError as error:
            errors.append(error)
            scores[metric] = [{"sae": own.name, "failed": str(error)}]
            print(f"masksae: {metric} cannot be taken: {error}", file=sys.stderr, flush=True)
        own.save_result(metric, scores[metric])
    if len(errors) == len(scores):
        raise errors[0]
    return scores


def failed(scores: dict[str, list[dict]]) -> dict[str, str]:
    """Why, for each metric of `evaluate` that could not be taken.

    >>> failed({"reconstruction": [{"sae": "a", "l0": 3}], "absorption": [{"sae": "a", "failed": "too few letters"}]})
    {'absorption': 'too few letters'}
    """
    return {metric: rows[0]["failed"] for metric, rows in scores.items() if rows and "failed" in rows[0]}
