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
    how long it took and how long the rest may take."""
    begun, done = time.monotonic(), 0
    total = sum(len(part.members) for part in run.parts)
    for number, part in enumerate(run.parts, 1):
        progress.say(f"part {number} of {len(run.parts)}, {part.name}: {len(part.members)} SAEs")
        seconds = work_off_part(part, scores)
        run.free(part)
        done += len(part.members)
        spent = time.monotonic() - begun
        if told := ", ".join(f"{name} {span(value)}" for name, value in seconds.items() if value >= 1):
            note(run.results, part.name, sum(seconds.values()))
        progress.say(f"{part.name} is there ({told or 'it was'}); about {span(spent / done * (total - done))} left")


def work_off_part(part: RunPart, scores: tuple[str, ...] = tuple(SCORES)) -> dict[str, float]:
    """Train and score one part; the seconds that each score took, the first with the training."""
    seconds = {}
    for name in scores:
        begun = time.monotonic()
        SCORES[name](part)
        seconds[name] = time.monotonic() - begun
    return seconds
