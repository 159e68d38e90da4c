"""What arms change along training: at equal steps, at equal clean explained variance, parent by parent; from rows of
`along_scores`."""

import math

import numpy as np
import pandas as pd

from masksae.errors import DataError
from masksae.study.report.effects import baseline_arm, change, describe, treated_arms
from masksae.study.scores.curves import KINDS
from masksae.study.stats import Effect, holm, interpolate, paired_effect

SHORT = {"letters": "same token", "contexts": "cross-token"}
BESIDE = {"dead_latents": "dead latents", "l0": "clean L0", "ev_centred": "EV"}
"""Scores of `reconstruction_scores` that belong beside an absorption score, and their names as columns."""


def finished(rows: list[dict]) -> list[dict]:
    """The rows of each arm's last step."""
    last = {arm: max(row["step"] for row in rows if row["arm"] == arm) for arm in {row["arm"] for row in rows}}
    return [row for row in rows if row["step"] == last[row["arm"]]]


def effects(rows: list[dict]) -> list[dict]:
    """What each arm changes against the unmasked one, by kind of absorption and by what is held equal.

    equal "steps"  finished SAEs, paired by seed; the interval is over pairs, for parents over pairs and parents
    equal "EV"     against the unmasked SAE of the same seed stopped where its clean explained variance was that of the
                   arm's finished SAE (linear between snapshots); only seeds whose curve reaches it
    kind "cross-token less same token"  how much more an arm changes the one kind than the other

    `f1` of a kind holds the mean F1 of the main latents, unmasked and treated: what absorption is worth there. No rows,
    as of a profile without `training.snapshots`, have no effects.
    """
    if not rows:
        return []
    done, entries = finished(rows), []
    table = pd.DataFrame(done)
    base = {row["seed"]: row for row in done if row["arm"] == baseline_arm(table)}
    for arm in treated_arms(table):
        if alone := {row["seed"] for row in done if row["arm"] == arm} - set(base):
            raise DataError(f"Along training {arm} has the pairs {sorted(alone)}, which have no unmasked partner.")
        pairs = [(base[row["seed"]], row) for row in done if row["arm"] == arm]
        stopped = [(_at_ev(rows, a, b["ev_centred"]), b) for a, b in pairs]
        for equal, compared in (("steps", pairs), ("EV", [pair for pair in stopped if pair[0]])):
            if not compared:
                continue
            entry = {"arm": arm, "equal": equal}
            for kind, name in KINDS.items():
                f1 = [float(np.mean([row[f"{kind}_main_f1"] for row in side])) for side in zip(*compared)]
                entries.append(entry | {"kind": name, "f1": f1} | _by_item(compared, kind).to_dict())
            more = _by_item(compared, "contexts", less="letters").to_dict()
            entries.append(entry | {"kind": "cross-token less same token"} | more)
    return entries


def _by_item(pairs, kind: str, less: str | None = None) -> Effect:
    """Paired effect on one kind, or on its excess over another's mean: letters are all letters there are, parents a
    sample that varies beside the pairs."""
    names = sorted(pairs[0][0][f"{kind}_items"])
    sides = [
        [[row[f"{kind}_items"].get(name, math.nan) - (row[less] if less else 0) for name in names] for row in side]
        for side in zip(*pairs)
    ]
    return paired_effect(*sides, items="fixed" if kind == "letters" else "random")


def _at_ev(rows: list[dict], row: dict, ev: float) -> dict | None:
    """The row that the SAE of `row` had when its clean explained variance was `ev`; None if it never was."""
    curve = [r for r in rows if r["arm"] == row["arm"] and r["seed"] == row["seed"]]

    def at(values) -> float | None:
        return interpolate([r["ev_centred"] for r in curve], values, ev, log=False)

    found = {}
    for kind in KINDS:
        found |= {key: at([r[key] for r in curve]) for key in (kind, f"{kind}_main_f1")}
        items = f"{kind}_items"
        found[items] = {name: at([r[items].get(name, math.nan) for r in curve]) for name in row[items]}
    return None if found["letters"] is None else found


def by_parent(rows: list[dict], arm: str) -> list[dict]:
    """What an arm changes in contexts, parent by parent, finished SAEs paired by seed, the clearest first; `p_holm`
    holds for all parents at once."""
    done = finished(rows)
    base = {row["seed"]: row["contexts_items"] for row in done if row["arm"] == baseline_arm(pd.DataFrame(done))}
    treated = {row["seed"]: row["contexts_items"] for row in done if row["arm"] == arm}
    effect_of = {
        parent: paired_effect([base[seed][parent] for seed in treated], [items[parent] for items in treated.values()])
        for parent in next(iter(base.values()))
    }
    adjusted = holm({parent: e.p_value for parent, e in effect_of.items() if e.p_value is not None})
    table = [
        {"arm": arm, "parent": parent, "effect": describe(e), "p": e.p_value, "p_holm": adjusted.get(parent)}
        for parent, e in effect_of.items()
    ]
    return sorted(table, key=lambda row: 1.0 if row["p"] is None else row["p"])


def growth(rows: list[dict]) -> list[dict]:
    """Whether the curves have levelled off: change of absorption over the last stretch of training, per arm and kind,
    paired by seed."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        steps = sorted({row["step"] for row in rows if row["arm"] == arm})
        if len(steps) < 2:
            continue
        before, after = (
            sorted((r for r in rows if r["arm"] == arm and r["step"] == step), key=lambda r: r["seed"])
            for step in steps[-2:]
        )
        for kind, name in KINDS.items():
            effect = paired_effect([row[kind] for row in before], [row[kind] for row in after])
            table.append({"arm": arm, "kind": name, "from": steps[-2], "to": steps[-1], "change": describe(effect)})
    return table


def quality(letters: list[dict], contexts: list[dict], reconstruction: list[dict]) -> list[dict]:
    """How good the main latents are whose silence counts as absorption: per kind, grid and arm at matched clean L0 the
    mean absorption and its parts by the absorber's density (specific, middle, dense), F1 and recall of the main
    latents, the share of absorbed words credited to dense latents; and of `reconstruction_scores` dead latents, clean
    L0 and explained variance."""
    table = []
    for kind, rows, items, prefix, absorbers in (
        ("letters", letters, "letters", "mean", "dense_absorbers"),
        ("contexts", contexts, "parents", "context", "context_dense_absorbers"),
    ):
        matched = pd.DataFrame([row for row in rows if row["mode"] == "matched"])
        for key in ("f1", "recall"):
            matched[key] = [np.mean([item[key] for item in row]) for row in matched[items]]
        matched = matched.merge(pd.DataFrame(reconstruction)[["sae", "mode", *BESIDE]], on=["sae", "mode"])
        shown = {f"{prefix}_full": "absorption", f"{prefix}_specific": "specific", f"{prefix}_middle": "middle"}
        shown |= {f"{prefix}_dense": "dense", "f1": "F1 of main latents", "recall": "recall"}
        shown |= {absorbers: "dense absorbers"} | BESIDE
        means = matched.groupby(["grid", "arm"], sort=False)[list(shown)].mean().reset_index()
        means.columns = ["SAEs", "arm", *shown.values()]
        table += [{"kind": KINDS[kind]} | row for row in means.to_dict("records")]
    return table


def caption(entries: list[dict]) -> str:
    """The numbers that belong under the headline: each arm less the unmasked one, at equal steps; rows of `effects`."""
    parts, at_steps = [], [row for row in entries if row["equal"] == "steps"]
    for arm in dict.fromkeys(row["arm"] for row in entries):
        by_kind = {row["kind"]: Effect.from_dict(row) for row in at_steps if row["arm"] == arm}
        numbers = ", ".join(f"{short} {change(by_kind[KINDS[kind]])}" for kind, short in SHORT.items())
        parts.append(f"{arm.replace('_', ' ')}: {numbers}")
    return "Less unmasked, at the last step: " + "; ".join(parts) + "."


def effect_table(entries: list[dict]) -> pd.DataFrame:
    """`effects` for a reader: a row per arm and kind, a column per what is held equal, and at equal EV the F1 of the
    main latents of both sides."""
    table = pd.DataFrame([row | {"text": describe(Effect.from_dict(row))} for row in entries])
    wide = table.pivot_table(index=["arm", "kind"], columns="equal", values="text", aggfunc="first", sort=False)
    wide = wide.rename(columns={"steps": "at equal steps", "EV": "at equal clean EV"})
    f1 = {
        (r["arm"], r["kind"]): "{:.2f} → {:.2f}".format(*r["f1"]) for r in entries if r["equal"] == "EV" and "f1" in r
    }
    if "at equal clean EV" in wide:
        wide["F1 of main latents there"] = [f1.get(key, "–") for key in wide.index]
    return wide.fillna("the unmasked curve does not reach it").reset_index()
