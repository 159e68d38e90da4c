"""Which results are those of this profile and this code: compared by id, nothing is computed.

What is left out: `data` and `mechanism`, which need no SAE and come back in minutes.
"""

from collections import Counter
from pathlib import Path

from masksae.errors import DataError
from masksae.study.run import Run
from masksae.study.scores.absorption import absorption_noise
from masksae.study.store import STATES
from masksae.study.work import SCORES


def has_results(folder: Path) -> bool:
    """Whether a folder of results holds any of a profile's SAEs."""
    return (folder / "claims.json").exists() or (folder / "pairs").exists()


def check(run: Run) -> list[dict]:
    """One row for each score of each SAE: part, score, sae, state (one of `STATES`), commit (that made it), changed
    (modules and libraries since). Raises DataError for a run without results."""
    if not has_results(run.results):
        raise DataError(f"There are no results of {run.profile.name}. `make repro PROFILE={run.source}` makes them.")
    rows: list[dict] = []
    for part in run.parts:
        asked = part.of(part.entries)
        asked.asked = []
        for score in (*SCORES.values(), absorption_noise):
            score(asked)
        rows += [{"part": part.name} | row for row in asked.asked]
    return rows


def summary(rows: list[dict]) -> list[list[str]]:
    """Titles and a line for each score: of how many SAEs it is in which state."""
    used = [state for state in STATES if any(row["state"] == state for row in rows)]
    counts = Counter((row["score"], row["state"]) for row in rows)
    scores = dict.fromkeys(row["score"] for row in rows)
    return [["score", *used], *([score, *(str(counts[score, state] or "") for state in used)] for score in scores)]


def since(rows: list[dict]) -> list[str]:
    """A sentence for each commit that made results of other code or versions: what has changed since."""
    by_commit: dict[str | None, set] = {}
    for row in rows:
        if row["state"] in ("other code", "other versions"):
            by_commit.setdefault(row["commit"], set()).update(row["changed"])
    return [
        f"Since commit {commit or '(not noted)'}: {', '.join(sorted(changed)) or 'not noted which modules'}."
        for commit, changed in by_commit.items()
    ]
