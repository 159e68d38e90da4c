"""What one replaced token does to SAEs (`masksae.study.scores.robustness`), in numbers and in words."""

from statistics import fmean

from masksae.study.report.labels import REPLACED
from masksae.study.scores.robustness import KINDS, REACHES, SCORES

SITUATIONS = [(kind, reach) for kind in KINDS for reach in REACHES]


def situation(kind: str, reach: str) -> str:
    """Positions and a kind of replacement in words.

    >>> situation("mask", "far")
    '4 to 15 after the mask token'
    """
    first, last = REACHES[reach]
    return f"{first} to {last} after {REPLACED[kind]}"


def robustness_table(rows: list[dict]) -> list[dict]:
    """One row per replacement, distance, grid and arm: the mean of each score over pairs, at matched clean L0. Rows of
    `robustness_scores`."""
    table = []
    for kind, reach in SITUATIONS:
        for (grid, arm), part in _cells(rows).items():
            means = {name: fmean(row[f"robustness_{kind}_{reach}_{name}"] for row in part) for name in SCORES}
            table.append({"positions": situation(kind, reach), "SAEs": grid, "arm": arm, "pairs": len(part)} | means)
    return table


def robustness_words(rows: list[dict], grid: str) -> list[str]:
    """For each arm of a grid a sentence, against the first arm without masks, pair by pair at matched clean L0: where
    more of its latents stay the same, and where its reconstruction moves less."""
    cells = {arm: {row["seed"]: row for row in part} for (name, arm), part in _cells(rows).items() if name == grid}
    plain = next((arm for arm, part in cells.items() if all(row["p"] == 0 for row in part.values())), None)
    told = []
    for arm, part in cells.items():
        seeds = [seed for seed in part if arm != plain is not None and seed in cells[plain]]
        if seeds:
            pairs = [(cells[plain][seed], part[seed]) for seed in seeds]
            overlap, moved = (_where(pairs, score, sign) for score, sign in (("jaccard", 1), ("recon", -1)))
            told.append(
                f"{arm} against {plain}, {len(pairs)} pair{'s' * (len(pairs) > 1)}: more of its active latents stay "
                f"the same: {overlap}; its reconstruction moves less: {moved}."
            )
    return told


def _where(pairs: list[tuple[dict, dict]], score: str, sign: int) -> str:
    """In which situations the second of each pair is better, in the mean over pairs; in how many pairs, where not in
    all."""
    found = []
    for kind, reach in SITUATIONS:
        key = f"robustness_{kind}_{reach}_{score}"
        changes = [sign * (row[key] - plain[key]) for plain, row in pairs]
        if fmean(changes) > 0:
            wins = sum(change > 0 for change in changes)
            found.append(situation(kind, reach) + (f" ({wins} of {len(pairs)} pairs)" if wins < len(pairs) else ""))
    return ", ".join(found) or "nowhere"


def _cells(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows at matched clean L0 by grid and arm, in their order."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["mode"] == "matched":
            cells.setdefault((row["grid"], row["arm"]), []).append(row)
    return cells
