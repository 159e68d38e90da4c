"""Scores of notebook 04: what an SAE that was never trained scores, and one that writes with permuted directions.

Every unmasked SAE that the claims are decided on gets two controls (`masksae.metrics.controls`), which the very
functions that score the run's SAEs score too, with the same words, probes and texts. A third control, an SAE whose
decoder stayed at its random start, is trained like any other: a grid with `frozen_decoder`, whose rows are added.
"""

from collections.abc import Callable

from masksae import provenance
from masksae.metrics.controls import permuted_decoder, random_like
from masksae.saes.sae import SAE
from masksae.study.scores.absorption import absorption_scores, context_scores
from masksae.study.scores.perturbation import concept_scores
from masksae.study.scores.probing import probing_scores
from masksae.study.scores.reconstruction import clean_scores
from masksae.study.store import Entry, Subject

CONTROLS = {
    "trained": "as trained",
    "frozen": "frozen decoder",
    "permuted": "permuted decoder",
    "random": "random weights",
}
"""In the order of how much training is left in them."""


def controls(run: Subject, arm: str, grid: str) -> Subject:
    """Controls in the place of a run's SAEs: two of each SAE of an arm and a grid."""
    trained = [entry for entry in run.entries if (entry.row["arm"], entry.row["grid"]) == (arm, grid)]
    return run.of([_control(run, entry, kind) for entry in trained for kind in ("permuted", "random")])


def _control(run: Subject, trained: Entry, kind: str) -> Entry:
    def load() -> SAE:
        sae = trained.load()
        if kind == "permuted":
            return permuted_decoder(sae, seed=trained.row["seed"])
        return random_like(sae, run.held_out, seed=sae.config.seed)  # where it began

    row = trained.row | {"sae": f"{trained.name}-{kind}", "control": kind}
    code = provenance.joined(trained.code, provenance.made_by(_control))
    return Entry(row, [kind, trained.recipe], load, code)


SCORES: tuple[Callable[[Subject], list[dict]], ...] = (
    clean_scores, absorption_scores, context_scores, probing_scores, concept_scores,
)  # fmt: skip


def control_scores(run: Subject) -> list[dict]:
    """One row per SAE, control and mode: `control` (a key of `CONTROLS`), explained variance, L0, dead latents,
    absorption of first letters and of contexts, probing, TPP. The SAEs are the unmasked ones of the main grid, and
    those with a frozen decoder. [] for a part of a run that has none of them."""
    unmasked, main = run.profile.baseline_arm.name, run.profile.main_grid.name
    of_grid = {grid.name: "frozen" for grid in run.profile.saes if grid.frozen_decoder} | {main: "trained"}
    kinds = {row["sae"]: of_grid[row["grid"]] for row in run.table if row["arm"] == unmasked and row["grid"] in of_grid}
    found = [{"control": kinds[row["sae"]]} | row for row in _scored(run) if row["sae"] in kinds] if kinds else []
    if "trained" in kinds.values():
        found += _scored(controls(run, unmasked, main))
    order = [*CONTROLS]
    return sorted(found, key=lambda row: (row["seed"], order.index(row["control"])))


def _scored(run: Subject) -> list[dict]:
    """The numbers of all scores in one row per SAE and mode; tables by letter and by task stay in their own results."""
    rows: dict[tuple, dict] = {}
    for score in SCORES:
        for row in score(run):
            numbers = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
            rows.setdefault((row["sae"], row["mode"]), {}).update(numbers)
    return list(rows.values())
