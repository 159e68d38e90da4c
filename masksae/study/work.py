"""A run worked off part by part: one pair trained, scored by all that the notebooks show, its activations freed, before
the next begins. Whoever is stopped loses one pair.
"""

import time

from masksae import progress
from masksae.study.own_sae import SCORERS
from masksae.study.run import Run, RunPart
from masksae.study.scores.controls import control_scores
from masksae.study.scores.curves import along_scores
from masksae.study.scores.training import training_scores
from masksae.study.times import note, span

SCORES = {"training": training_scores, **SCORERS, "along": along_scores, "controls": control_scores}
"""What is taken of each part: all that is taken of any SAE, and what only a run has; what trains comes first."""


def work_off(run: Run, scores: tuple[str, ...] = tuple(SCORES)) -> None:
    """Train and score every part of a run that is not finished, in the profile's order, with a line for each that says
    how long it took and how long the rest may take. A part that was finished before says nothing of either."""
    spent, done, left = 0.0, 0, sum(len(part.members) for part in run.parts)
    for number, part in enumerate(run.parts, 1):
        progress.say(f"part {number} of {len(run.parts)}, {part.name}: {len(part.members)} SAEs")
        before, told = _written(part), "it was"
        seconds = work_off_part(part, scores)
        run.free(part)
        left -= len(part.members)
        if _written(part) != before:
            note(run.build, part.name, sum(seconds.values()))
            spent, done = spent + sum(seconds.values()), done + len(part.members)
            told = ", ".join(f"{name} {span(value)}" for name, value in seconds.items() if value >= 1)
        progress.say(f"{part.name} is there ({told}); about {span(spent / done * left) if done else '?'} left")


def _written(part: RunPart) -> int | None:
    """When the part's rows were last written."""
    return part.notes.file.stat().st_mtime_ns if part.notes.file.exists() else None


def work_off_part(part: RunPart, scores: tuple[str, ...] = tuple(SCORES)) -> dict[str, float]:
    """Train and score one part; the seconds that each score took, the first with the training."""
    seconds = {}
    for name in scores:
        begun = time.monotonic()
        SCORES[name](part)
        seconds[name] = time.monotonic() - begun
    return seconds
