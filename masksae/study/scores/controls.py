"""Scores of notebook 04: what an SAE that was never trained scores, and one that writes with permuted directions.

Every unmasked SAE that the claims are decided on gets two controls (`masksae.metrics.controls`), which the very
functions that score the run's SAEs score too, with the same words, probes and texts. A third control, an SAE whose
decoder stayed at its random start, is trained like any other: a grid with `frozen_decoder`, whose rows are added.
"""

from collections.abc import Callable

from masksae.metrics.controls import permuted_decoder, random_like
from masksae.parallel import once
from masksae.saes.sae import SAE
from masksae.study.inputs import Beside, Scored
from masksae.study.scores.absorption import absorption_scores, context_scores
from masksae.study.scores.perturbation import concept_scores
from masksae.study.scores.probing import probing_scores
from masksae.study.scores.reconstruction import clean_scores

CONTROLS = {
    "trained": "as trained",
    "frozen": "frozen decoder",
    "permuted": "permuted decoder",
    "random": "random weights",
}
"""In the order of how much training is left in them."""


class Controls(Beside):
    """A run's inputs with controls in the place of its SAEs: two of each SAE of an arm and a grid."""

    def __init__(self, run: Scored, arm: str, grid: str):
        super().__init__(run)
        self.run, self.name = run, f"controls-{arm}-{grid}"
        self.trained = [row for row in run.table if (row["arm"], row["grid"]) == (arm, grid)]

    @property
    def table(self) -> list[dict]:
        kinds = ("permuted", "random")
        return [row | {"sae": f"{row['sae']}-{kind}", "control": kind} for row in self.trained for kind in kinds]

    @once
    def saes(self) -> dict[str, SAE]:
        saes, made = self.run.load_saes(), {}
        for row in self.trained:
            sae = saes[row["sae"]]
            made[f"{row['sae']}-permuted"] = permuted_decoder(sae, seed=row["seed"])
            made[f"{row['sae']}-random"] = random_like(sae, self.held_out, seed=sae.config.seed)  # where it began
        return made

    def load_saes(self) -> dict[str, SAE]:
        return self.saes

    def rows(self, kind: str, section, make) -> list[dict]:
        return self.run.rows(f"{self.name}-{kind}", section, lambda: make())  # of this module: its code is in the id


SCORES: tuple[Callable[[Scored], list[dict]], ...] = (
    clean_scores, absorption_scores, context_scores, probing_scores, concept_scores,
)  # fmt: skip


def control_scores(run: Scored) -> list[dict]:
    """One row per SAE, control and mode: `control` (a key of `CONTROLS`), explained variance, L0, dead latents,
    absorption of first letters and of contexts, probing, TPP. The SAEs are the unmasked ones of the main grid, and
    those with a frozen decoder. [] for a part of a run that has none of them."""
    unmasked, main = run.profile.baseline_arm.name, run.profile.main_grid.name
    of_grid = {grid.name: "frozen" for grid in run.profile.saes if grid.frozen_decoder} | {main: "trained"}
    kinds = {row["sae"]: of_grid[row["grid"]] for row in run.table if row["arm"] == unmasked and row["grid"] in of_grid}
    found = [{"control": kinds[row["sae"]]} | row for row in _scored(run) if row["sae"] in kinds] if kinds else []
    if "trained" in kinds.values():
        found += _scored(Controls(run, unmasked, main))
    order = [*CONTROLS]
    return sorted(found, key=lambda row: (row["seed"], order.index(row["control"])))


def _scored(run: Scored) -> list[dict]:
    """The numbers of all scores in one row per SAE and mode; tables by letter and by task stay in their own results."""
    rows: dict[tuple, dict] = {}
    for score in SCORES:
        for row in score(run):
            numbers = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
            rows.setdefault((row["sae"], row["mode"]), {}).update(numbers)
    return list(rows.values())
