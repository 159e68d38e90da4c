"""The paper's claims C1 to C5, and R, which its title makes: verdicts on the merged scores of a run
(`masksae.study.report.effects.merge`), by the decisions that its profile states beforehand.

Each endpoint has one interval and one p-value from the same statistic. Holm's correction over the primary endpoints is
inside the verdicts. Equivalence is two one-sided tests inside the endpoint's margin, each at alpha and not corrected:
what is controlled over all endpoints is that any is called supported or contradicted without a cause.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator

import pandas as pd

from masksae.study import stats
from masksae.study.report import labels
from masksae.study.report.effects import Cell, baseline_arm, change, describe, effect, first_column, percent, standing
from masksae.study.sections import Decisions, Endpoint, Gate

CLAIMS = {
    "C1": "Masking reduces feature absorption",
    "C2": "Masking improves probing",
    "C3": "Masking narrows the out-of-distribution gap",
    "C4": "C1 to C3 hold across architectures and sparsity levels",
    "C5": "Explained variance falls slightly",
    "R": "Masking makes latents robust to a changed token",
}


def caption(scores: pd.DataFrame, grid: str, arm: str) -> str:
    """What an arm changes in one grid, as a sentence for a caption."""
    named = {"absorption of first letters": "mean_full", "explained variance": "ev_centred"}
    changes = [f"{name} {change(effect(scores, column, grid, arm))}" for name, column in named.items()]
    return f"{grid}, {arm}: {', '.join(changes)}."


def gate(scores: pd.DataFrame, decisions: Decisions, latents: dict[str, int]) -> dict[str, dict]:
    """Whether unmasked SAEs of each grid have latents for what is to be absorbed, and whether each arm's latents live.

    scores   of one mode; only unmasked rows count, but for `dead`
    latents  size of the dictionary of each grid

    Returns, by grid: passed; checks {name: value, bound, passed}; dead {arm: value, bound, passed}. A number that was
    not measured (value None) does not pass.
    """
    bounds, first, found = decisions.gate, baseline_arm(scores), {}
    for grid, part in scores.groupby("grid", sort=False):
        table = part.assign(dead=part["dead_in_training"] / latents[grid])
        if (unmasked := table[table["arm"] == first]).empty:
            continue
        checks = checked(unmasked, bounds)
        dead = {
            arm: _check(rows, "dead", bounds.dead_compared, least=False)
            for arm, rows in table.groupby("arm", sort=False)
        }
        found[grid] = {"passed": all(c["passed"] for c in checks.values()), "checks": checks, "dead": dead}
    return found


def checked(unmasked: pd.DataFrame, bounds: Gate) -> dict[str, dict]:
    """What the gate asks of unmasked SAEs: {name: value, bound, passed}.

    unmasked  their scores, and in `dead` the share of latents that are dead at the end of training
    """
    return {
        "F1 of main latents, first letters": _check(unmasked, "main_f1", bounds.letters_f1, least=True),
        "F1 of main latents, contexts": _check(unmasked, "context_main_f1", bounds.contexts_f1, least=True),
        "absorption credited to dense latents": _dense(unmasked, bounds.dense_absorbers),
        "dead latents in training": _check(unmasked, "dead", bounds.dead, least=False),
    }


def _check(rows: pd.DataFrame, column: str, bound: float, *, least: bool) -> dict:
    """Mean of a column against a bound, from above or below; a row without a value is no pass."""
    values = pd.to_numeric(rows[column]) if column in rows else pd.Series(dtype=float)
    if values.empty or values.isna().any():
        return {"value": None, "bound": bound, "passed": False}
    value = float(values.mean())
    return {"value": value, "bound": bound, "passed": value >= bound if least else value <= bound}


def _dense(rows: pd.DataFrame, bound: float) -> dict:
    """The same of the share of absorption credited to dense latents, which no SAE has that absorbs nothing."""
    return _check(rows.assign(dense=pd.to_numeric(rows["dense_absorbers"]).fillna(0.0)), "dense", bound, least=False)


def obstacle(gates: dict[str, dict], endpoint: Endpoint, arm: str, cell: Cell, grid: str) -> str | None:
    """Why an endpoint cannot be measured in a grid, as a sentence; None if it can."""
    found = gates.get(cell[1])
    if found is None:
        return f"{cell[1]} has no unmasked SAEs that could pass the gate."
    failed = [(name, check) for name, check in found["checks"].items() if not check["passed"]]
    if endpoint.claim == "C1" and failed:
        told = [f"{name} {_number(check['value'])}, bound {check['bound']:g}" for name, check in failed]
        return f"Unmasked SAEs of {cell[1]} do not pass the gate: {'; '.join(told)}."
    for name, where in ((cell[0], cell[1]), (arm, grid)):
        check = gates.get(where, found)["dead"].get(name, {"passed": False, "value": None, "bound": None})
        if not check["passed"]:
            return (
                f"Cannot be compared: the share of latents of {name}, {where}, that are dead at the end of training is "
                f"{_number(check['value'])}, bound {check['bound']}."
            )
    return None


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def claims(
    scores: pd.DataFrame,
    decisions: Decisions,
    arm: str,
    gates: dict[str, dict],
    baseline: Callable[[str, str], Cell | None] | None = None,
) -> dict[str, dict]:
    """The verdicts, keyed C1 to C5 and R: what `arm` changes against the unmasked SAEs of the first grid; C4 in the
    others.

    baseline  (arm, grid) -> cell to compare with, as in `effects.comparison`: C4 leaves grids of rivals out

    Each claim holds the row of its first primary endpoint, and in `endpoints` the rows of the others by name. A row is
    an Effect with verdict, score, grid, clean_l0 (unmasked, treated), margin, p_holm (superiority, corrected),
    p_equivalent, within_margin (shown to be smaller than that), `detectable` by the rule that decides (the first of
    Holm's steps), and for an inconclusive one `pairs_needed`.
    """
    first = scores["grid"].iloc[0]
    rows = {}
    for primary in (True, False):
        family = {(first, e.name): (first, e) for e in decisions.endpoints if e.primary == primary}
        rows |= {name: row for (_, name), row in decide(scores, decisions, arm, gates, family).items()}
    found = {}
    for key in CLAIMS:
        mine = sorted((e for e in decisions.endpoints if e.claim == key), key=lambda e: not e.primary)
        head, *others = [(e.name, rows[e.name]) for e in mine] or [("", _unmeasured("No endpoint of the profile."))]
        found[key] = head[1] | ({"endpoints": dict(others)} if others else {})
    found["C4"] = everywhere(scores, decisions, arm, gates, baseline)
    found["C1"]["dense_absorbers"] = dense_absorbers(scores, first)
    return {key: {"claim": claim, **found[key]} for key, claim in CLAIMS.items()}


def decide(
    scores: pd.DataFrame, decisions: Decisions, arm: str, gates: dict[str, dict], family: dict[tuple, tuple]
) -> dict[tuple, dict]:
    """Rows of endpoints that share one correction: key -> (grid, endpoint)."""
    rows, effects = {}, {}
    for key, (grid, endpoint) in family.items():
        column, cell = _column(scores, endpoint), (baseline_arm(scores), grid)
        shared = {"endpoint": endpoint.name, "primary": endpoint.primary, "score": endpoint.score, "grid": grid}
        sides = [scores[(scores["arm"] == name) & (scores["grid"] == grid)] for name in (arm, baseline_arm(scores))]
        if column is None or any(side.empty or side[column].isna().any() for side in sides):
            rows[key] = _unmeasured(f"No {endpoint.score} of {arm} and unmasked SAEs of {grid}.") | shared
            continue
        found = effect(scores, column, grid, arm, cell, endpoint.items).at(decisions.alpha)
        reason = obstacle(gates, endpoint, arm, cell, grid)
        if reason is None:
            effects[key] = found
        shared["score"] = column
        shared["clean_l0"] = [float(side["l0"].mean()) for side in reversed(sides)]
        rows[key] = {"verdict": "not measurable", **shared, "margin": endpoint.margin, **found.to_dict()}
        rows[key] |= {"reason": reason} if reason else {}
    tested = {key: e for key, e in effects.items() if e.p_value is not None}
    adjusted = stats.holm({key: e.p_value for key, e in tested.items()})
    for key, found in effects.items():
        rows[key] |= _decided(found, family[key][1], adjusted.get(key), decisions.alpha, len(tested))
    return rows


def _decided(found: stats.Effect, endpoint: Endpoint, p_holm: float | None, alpha: float, tests: int) -> dict:
    """What is decided of one endpoint."""
    options = dict(p_value=p_holm, margin=endpoint.margin, level=alpha)
    verdict = found.verdict(endpoint.direction, **options)
    p_equivalent = found.p_equivalent(endpoint.margin)
    row = {"p_holm": p_holm, "p_equivalent": p_equivalent}
    row["within_margin"] = p_equivalent is not None and p_equivalent < alpha
    if endpoint.slight is not None:
        verdict = slight(found, endpoint, verdict)
        row |= {"slight": endpoint.slight, "size_in_words": size(found, endpoint.score)}
        row["reason"] = f"Slightly means by less than {endpoint.slight:g}, and the interval decides; p is of no fall."
    level = alpha / max(1, tests)
    row |= {"verdict": verdict, "detectable": found.finds(level)}
    if verdict == "inconclusive":
        row["pairs_needed"] = stats.pairs_needed(found, level)
    return row


def slight(found: stats.Effect, endpoint: Endpoint, verdict: str) -> str:
    """Verdict of a claim with a size in it, from that on its sign: supported if the whole interval lies between nothing
    and `endpoint.slight`, contradicted if it lies beyond, or on the other side of nothing.

    >>> fall = stats.paired_effect([0.9, 0.9, 0.9], [0.889, 0.890, 0.891])
    >>> ev = Endpoint(name="ev", claim="C5", score="ev_centred", direction=-1, margin=0.005, items="fixed", slight=0.02)
    >>> slight(fall, ev, "supported"), slight(fall, ev.model_copy(update={"slight": 0.006}), "supported")
    ('supported', 'contradicted')
    """
    if verdict != "supported":
        return verdict
    near, far = sorted(endpoint.direction * bound for bound in (found.low, found.high))
    if near > endpoint.slight:
        return "contradicted"
    return "supported" if far < endpoint.slight else "inconclusive"


def size(found: stats.Effect, score: str = "ev_centred") -> str:
    """A change of a score in words; of explained variance also what it is of the rest.

    >>> size(stats.paired_effect([0.9, 0.9], [0.851, 0.849]))
    'explained variance falls by 0.0500 (95 % 0.0373 to 0.0627); unexplained variance rises by 50 %'
    >>> size(stats.paired_effect([0.4], [0.5]), "mean_full")
    'absorption, first letters rises by 0.1000'
    """
    sign = -1 if found.difference < 0 else 1
    ends = [] if found.low is None else sorted((sign * found.low, sign * found.high))
    interval = f" ({percent(found)} {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
    moves = ("falls", "rises") if sign < 0 else ("rises", "falls")
    told = f"{labels.words(score)} {moves[0]} by {abs(found.difference):.4f}{interval}"
    if score != "ev_centred":
        return told
    rest = 100 * ((1 - found.treated) / (1 - found.baseline) - 1)
    return f"{told}; unexplained variance {moves[1]} by {abs(rest):.0f} %"


def everywhere(
    scores: pd.DataFrame,
    decisions: Decisions,
    arm: str,
    gates: dict[str, dict],
    baseline: Callable[[str, str], Cell | None] | None = None,
) -> dict:
    """C4: the primary endpoints of C1 to C3 in every grid but the first, which C1 to C3 have decided; one correction
    over all of its cells."""
    treated = set(scores.loc[scores["arm"] == arm, "grid"])
    others = [grid for grid in standing(scores, baseline) if grid in treated and grid != scores["grid"].iloc[0]]
    grids = decisions.cells or others
    asked = [e for e in decisions.endpoints if e.primary and e.claim in ("C1", "C2", "C3") and _column(scores, e)]
    family = {(grid, e.name): (grid, e) for grid in grids for e in asked}
    rows = decide(scores, decisions, arm, gates, family)
    found = {"verdict": stats.combine([row["verdict"] for row in rows.values()])}
    found["reason"] = _counted(rows) if grids else f"No other grid has SAEs of {arm} and unmasked ones."
    found["grids"] = {grid: {f"{e.claim} {e.name}": rows[grid, e.name]["verdict"] for e in asked} for grid in grids}
    found["cells"] = {grid: {e.name: rows[grid, e.name] for e in asked} for grid in grids}
    return found


def _counted(rows: dict[tuple[str, str], dict]) -> str:
    """How many cells came out how, by (grid, endpoint); and which grids have none."""
    grids = dict.fromkeys(grid for grid, _ in rows)
    lacking = [g for g in grids if all(row["verdict"] == "not measured" for (at, _), row in rows.items() if at == g)]
    counts = Counter(row["verdict"] for (at, _), row in rows.items() if at not in lacking)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in stats.VERDICTS if counts[verdict]) or "none"
    pairs = sorted({row["pairs"] for row in rows.values() if "pairs" in row})
    size = f"; of {' to '.join(map(str, dict.fromkeys((pairs[0], pairs[-1]))))} pairs" if pairs else ""
    return f"Cells: {told}{size}." + (f" Not run: {', '.join(lacking)}." if lacking else "")


def _column(scores: pd.DataFrame, endpoint: Endpoint) -> str | None:
    if endpoint.score.endswith("_"):
        return first_column(scores, endpoint.score)
    return endpoint.score if endpoint.score in scores else None


def _unmeasured(reason: str) -> dict:
    return {"verdict": "not measured", "reason": reason}


def verdict_table(found: dict[str, dict]) -> list[dict]:
    """Rows for a reader, one per endpoint: claim, endpoint, verdict, effect, corrected p-value; C4 in one row."""
    return [_told(*each) for each in endpoints(found)]


def endpoints(found: dict[str, dict]) -> Iterator[tuple[str, str, dict]]:
    """(claim, endpoint, its row) of all in claims.json; a claim without endpoints, such as C4, has one named ""."""
    for key, claim in found.items():
        for name, row in [(claim.get("endpoint", ""), claim), *claim.get("endpoints", {}).items()]:
            yield key, name, row


def cell_table(found: dict[str, dict]) -> list[dict]:
    """The same of the cells of C4."""
    cells = found["C4"]["cells"].values()
    return [_told("C4", name, row) for cell in cells for name, row in cell.items()]


def grid_table(found: dict[str, dict]) -> list[dict]:
    """The same for a page: a row per grid that was run, its verdicts and effects side by side."""
    rows = []
    for grid, cells in found["C4"]["cells"].items():
        if cells := {name: row for name, row in cells.items() if "difference" in row}:
            told = {name: _told("C4", name, row) for name, row in cells.items()}
            first, *_ = cells
            row = {"SAEs": grid, "clean L0": told[first]["clean L0"], "pairs": cells[first]["pairs"]}
            row |= {name: f"**{each['verdict']}** {each['unmasked → treated']}" for name, each in told.items()}
            rows.append(row | {"why": " ".join(dict.fromkeys(each["why"] for each in told.values())).strip()})
    return rows


def spoken(row: dict) -> str:
    """The verdict of a row for a reader: of a claim with a size in it, that the size was bounded by us."""
    bounds = {"supported": "within our bound", "contradicted": "outside our bound"} if "slight" in row else {}
    small = row.get("within_margin") and row["verdict"] in ("supported", "contradicted")
    verdict = bounds.get(row["verdict"], row["verdict"])
    return f"{verdict}, within the margin" if small else verdict


def _told(claim: str, endpoint: str, row: dict) -> dict:
    change = describe(stats.Effect.from_dict(row), detectable=False) if "difference" in row else ""
    most = 1 if "score" in row and labels.score(row["score"]).digits > 1 else math.inf  # it lies between 0 and 1
    return {
        "claim": claim,
        "endpoint": f"{endpoint} (secondary)" if row.get("primary") is False else endpoint,
        "SAEs": row.get("grid", ""),
        "verdict": spoken(row),
        "unmasked → treated": row.get("size_in_words") or change,
        "clean L0": "{:.1f} → {:.1f}".format(*row["clean_l0"]) if "clean_l0" in row else "",
        "pairs × items": " × ".join(str(row[key]) for key in ("pairs", "items") if row.get(key)),
        "p, Holm": row.get("p_holm"),
        "p, equivalence": row.get("p_equivalent"),
        "margin": row.get("margin"),
        "MDE": "nothing" if (row.get("detectable") or 0) > most else row.get("detectable"),
        "pairs needed": row.get("pairs_needed"),
        "why": row.get("reason", ""),
    }


def gate_table(gates: dict[str, dict]) -> list[dict]:
    """Rows for a reader: each grid, what it reaches and what it ought to, and the dead latents of each arm."""
    rows = []
    for grid, found in gates.items():
        row = {"SAEs": grid, "gate": "passed" if found["passed"] else "failed"}
        row |= {f"{name}, bound {c['bound']:g}": _number(c["value"]) for name, c in found["checks"].items()}
        dead = {arm: f"{arm} {_number(c['value'])}" for arm, c in found["dead"].items()}
        bound = next(iter(found["dead"].values()))["bound"]
        rows.append(row | {f"the same of each arm, bound {bound:g}": ", ".join(dead.values())})
    return rows


def dense_absorbers(scores: pd.DataFrame, grid: str) -> dict[str, float | None]:
    """Per arm, the mean share of absorbed words that are credited to a latent of no particular word; None if none is
    absorbed."""
    means = scores[scores["grid"] == grid].groupby("arm", sort=False)["dense_absorbers"].mean()
    return {arm: None if pd.isna(mean) else mean for arm, mean in means.items()}
