"""Which results are those of this profile and this code: compared by id, nothing is computed.

What is left out: `data` and `mechanism`, which need no SAE and come back in minutes.
"""

from pathlib import Path

from masksae.errors import DataError
from masksae.files import run_id
from masksae.study.profile import Part
from masksae.study.run import Run, RunPart
from masksae.study.scores.absorption import absorption_noise
from masksae.study.work import SCORES

STATES = ("as it is now", "other code", "another profile", "missing")
"""From good to bad. Other code may give the same numbers: it is known to only once they are made again."""


class Asked(RunPart):
    """A part of a run whose scores are asked for and not made: `states` says of each kind how it stands."""

    def __init__(self, run: Run, part):
        super().__init__(run, part)
        self.states: dict[str, str] = {}

    def rows(self, kind, section, make, *further):
        noted, (recipe, code) = self.noted(kind), map(run_id, self.made_of(section, make, *further))
        if noted is None:
            self.states[kind] = "missing"
        elif noted["recipe"] != recipe:
            self.states[kind] = "another profile"
        else:
            self.states[kind] = "as it is now" if noted["code"] == code else "other code"
        return []


def has_results(folder: Path) -> bool:
    """Whether a folder of results holds any of a profile's SAEs."""
    return (folder / "claims.json").exists() or (folder / "pairs").exists()


def check(run: Run) -> list[dict]:
    """One row for each score of each part: part, score, state (one of `STATES`). Raises DataError for a run without
    results."""
    if not has_results(run.results):
        raise DataError(f"There are no results of {run.profile.name}. `make repro PROFILE={run.source}` makes them.")
    rows = []
    for part in run.parts:
        asked = Asked(run, part.part)
        for score in (*SCORES.values(), absorption_noise):
            score(asked)
        rows += [{"part": part.name, "score": kind, "state": state} for kind, state in asked.states.items()]
    return rows


def missing(run: Run) -> list[Part]:
    """The parts of a run that are still to be made: those with SAEs that are not trained; of a profile that keeps its
    pairs, those without rows of this profile."""
    if not run.profile.keep_pairs:
        return [each.part for each in run.parts if not all((run.folder_of(g) / "saes").exists() for g in each.groups)]
    asked = [Asked(run, part.part) for part in run.parts]
    for part in asked if has_results(run.results) else ():
        for score in SCORES.values():
            score(part)
    return [part.part for part in asked if not part.states or set(part.states.values()) & {*STATES[2:]}]


def summary(rows: list[dict]) -> list[list[str]]:
    """Titles and a line for each score: how many parts are in which state."""
    used = [state for state in STATES if any(row["state"] == state for row in rows)]
    lines = [["score", *used]]
    for score in dict.fromkeys(row["score"] for row in rows):
        mine = [row["state"] for row in rows if row["score"] == score]
        lines.append([score, *(str(mine.count(state) or "") for state in used)])
    return lines
