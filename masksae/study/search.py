"""Numbers of an arm that are searched for, on a pilot pair that is used for nothing else: the k at which a masked arm
has the wanted L0 on clean text, and the noise that costs as much explained variance as masking does.

The search is a secant between trials, in logarithms, until the measured value is within a tolerance of the wanted one;
every trial is recorded. What is found is written into a profile by hand, and a test holds the two equal.
"""

import math
from collections.abc import Callable

from masksae.errors import ConfigError, DataError, nearest
from masksae.metrics.reconstruction import reconstruction
from masksae.study.run import Run
from masksae.study.sections import Variant

TRIALS = 6


def secant(measure: Callable[[float], float], wanted: float, start: float, second: float, within: float) -> list[dict]:
    """Trials [{"at": x, "measured": y}] whose last has |y / wanted - 1| <= within. Raises DataError if six do not get
    there, or two in a row measure the same or one of them nothing.

    >>> trials = secant(lambda x: 3 * x**2, wanted=12, start=1.0, second=1.5, within=1e-6)
    >>> round(trials[-1]["at"], 6), len(trials)
    (2.0, 3)
    """
    trials = []
    for x in (start, second):
        trials.append({"at": x, "measured": measure(x)})
        if _near(trials[-1]["measured"], wanted, within):
            return trials
    while len(trials) < TRIALS:
        (x0, y0), (x1, y1) = (tuple(trial.values()) for trial in trials[-2:])
        if y0 == y1 or min(y0, y1, wanted) <= 0:
            break
        slope = (math.log(y1) - math.log(y0)) / (math.log(x1) - math.log(x0))
        x = x1 * (wanted / y1) ** (1 / slope)
        trials.append({"at": x, "measured": measure(x)})
        if _near(trials[-1]["measured"], wanted, within):
            return trials
    raise DataError(f"No value measures {wanted} within {within:.1%}: tried {trials}. Start nearer.")


def _near(value: float, wanted: float, within: float) -> bool:
    return abs(value / wanted - 1) <= within


def k_for_clean_l0(run: Run, arm: str, grid: str, pilot: int, *, within: float = 0.01) -> dict:
    """The k at which the SAE of an arm has the grid's k as its mean L0 on clean held-out text, as trained. Raises
    ConfigError for a grid without a k that could be searched for."""
    chosen, _ = _named(run, "grid", grid), _named(run, "arm", arm)
    _check_pilot(run, pilot)
    selection = chosen.selection
    key = next((key for key in ("k", "target_l0") if key in selection.model_extra), None)
    if key is None or selection.config.keeps_k_per_token:
        why = (
            "has no k or target_l0"
            if key is None
            else "keeps k latents of every token: its clean L0 is k, whatever the arm"
        )
        raise ConfigError(f"--grid {grid}: {selection.rule} {why}. Expected a rule such as batch_topk.")
    wanted = chosen.l0

    def clean_l0(k: float) -> float:
        changed = {"selection": selection.model_dump() | {key: k}, "against": None}  # the other grid is not there
        return _score(run, {"saes": [chosen.model_dump(mode="json") | changed]}, arm, grid, pilot).l0

    trials = secant(clean_l0, wanted, wanted, 0.7 * wanted, within)
    return {"what": "k", "arm": arm, "grid": grid, "pilot": pilot, "wanted": wanted, "trials": trials}


def noise_for_ev(run: Run, arm: str, like: str, grid: str, pilot: int, *, within: float = 0.02) -> dict:
    """The noise at which the SAE of an arm explains as much less of the clean text's variance than the unmasked one as
    that of the arm `like` does. Raises ConfigError for the unmasked arm, which has no noise and costs nothing."""
    chosen, _, _ = _named(run, "arm", arm), _named(run, "like", like), _named(run, "grid", grid)
    _check_pilot(run, pilot)
    for option, name in (("arm", arm), ("like", like)):
        if name == run.profile.baseline_arm.name:
            raise ConfigError(f"--{option} {name} is the arm that both are compared with. Name another arm.")
    unmasked = _score(run, {}, run.profile.baseline_arm.name, grid, pilot).ev_centred
    wanted = unmasked - _score(run, {}, like, grid, pilot).ev_centred

    def loss(noise: float) -> float:
        arms = [each.model_copy(update={"noise": noise}) if each is chosen else each for each in run.profile.arms]
        changes = {"arms": [each.model_dump(mode="json") for each in arms]}
        return unmasked - _score(run, changes, arm, grid, pilot).ev_centred

    trials = secant(loss, wanted, chosen.noise or 0.5, 0.7 * (chosen.noise or 0.5), within)
    return {"what": "noise", "arm": arm, "like": like, "grid": grid, "pilot": pilot, "wanted": wanted, "trials": trials}


def _named(run: Run, option: str, name: str):
    """The arm or the grid of that name, as the option of `masksae match` gives it. Raises ConfigError."""
    known = {each.name: each for each in (run.profile.saes if option == "grid" else run.profile.arms)}
    if name not in known:
        raise ConfigError(f"--{option}: profile {run.profile.name} has no {name!r}.{nearest(name, known)}")
    return known[name]


def _check_pilot(run: Run, pilot: int) -> None:
    """Raise ConfigError for a pair that the profile decides on."""
    if pilot < 0 or any(member.pair == pilot for member in run.profile.members):
        raise ConfigError(f"--pilot: found {pilot}, expected a pair, 0 or above, of no block of {run.profile.name}.")


def _score(run: Run, changes: dict, arm: str, grid: str, pilot: int):
    """Reconstruction of clean held-out text by one SAE of a changed profile, as trained."""
    arms = [run.profile.baseline_arm.name] + ([arm] if arm != run.profile.baseline_arm.name else [])
    blocks = [{"name": "pilot", "arms": arms, "saes": [grid], "pairs": [pilot], "snapshots": False}]
    changes = changes | {"blocks": blocks, "decisions": {"cells": []}}  # which name grids that are not here
    changed = Run(run.profile.changed(Variant(name="pilot", changes=changes)))
    changed.build = run.build / "pilot"
    member = next(member for member in changed.profile.members if member.arm.name == arm)
    return reconstruction(changed.load(member), run.held_out)
