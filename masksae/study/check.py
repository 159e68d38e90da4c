"""Which results are those of this profile and this code: compared by id, nothing is computed.

What is left out: `data` and `mechanism`, which need no SAE and come back in minutes.
"""

from collections import Counter
from pathlib import Path

from masksae.errors import DataError
from masksae.study.profile import Part
from masksae.study.run import Run
from masksae.study.scores.absorption import absorption_noise
from masksae.study.store import STATES, Subject
from masksae.study.work import SCORES


def has_results(folder: Path) -> bool:
    """Whether a folder of results holds any of a profile's SAEs."""
    return (folder / "claims.json").exists() or (folder / "pairs").exists()


def check(run: Run) -> list[dict]:
    """One row for each score of each SAE: part, score, sae, state (one of `STATES`), commit (that made it), changed
    (modules and libraries since). Raises DataError for a run without results."""
    if not has_results(run.results):
        raise DataError(
            f"There are no results of {run.profile.name} (claims.json, or pairs) in {run.results}. `make repro "
            f"PROFILE={run.source}` makes them. Rows of variants, which `masksae gate` takes, are not looked at."
        )
    return [
        {"part": part.name} | row for part in run.parts for row in asked(part, (*SCORES.values(), absorption_noise))
    ]


def asked(part: Subject, scores) -> list[dict]:
    """How some scores of a part stand, each once; none is made."""
    part = part.of(part.entries)
    part.asked = []
    for score in scores:
        score(part)
    return list({(row["score"], row["sae"]): row for row in part.asked}.values())  # controls ask for others too


def missing(run: Run) -> list[Part]:
    """The parts of a run that are still to be made: those with SAEs that are not trained; of a profile that keeps its
    pairs, those without rows of this profile."""
    if not run.profile.keep_pairs:
        return [part.part for part in run.parts if any(map(run.missing, part.groups))]
    states = {part.part: {row["state"] for row in asked(part, SCORES.values())} for part in run.parts}
    return [part for part, found in states.items() if found & {"missing", "another profile"}]


def summary(rows: list[dict]) -> list[list[str]]:
    """Titles and a line for each score: of how many SAEs it is in which state."""
    used = [state for state in STATES if any(row["state"] == state for row in rows)]
    counts = Counter((row["score"], row["state"]) for row in rows)
    scores = dict.fromkeys(row["score"] for row in rows)
    return [["score", *used], *([score, *(str(counts[score, state] or "") for state in used)] for score in scores)]


def since(rows: list[dict]) -> list[str]:
    """A sentence for each set of what has changed since results of other code or versions were made, with the commits
    that made them; and one where nothing is noted of any."""
    if all(row["state"] == "missing" for row in rows):
        return ["Nothing beside these results says what they were made of; the next run notes it."]
    by_commit: dict[str | None, set] = {}
    for row in rows:
        if row["state"] in ("other code", "other versions"):
            by_commit.setdefault(row["commit"], set()).update(row["changed"])
    by_change: dict[str, list[str]] = {}
    for commit, changed in by_commit.items():
        by_change.setdefault(", ".join(sorted(changed)), []).append(commit or "(not noted)")
    return [
        f"Since commit {', '.join(commits)}: {changed or 'not noted which modules'}."
        for changed, commits in by_change.items()
    ]
