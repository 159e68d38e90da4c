"""What was found, in sentences, and the scores beside those that decide: out of the rows of a run's results."""

from pathlib import Path

import pandas as pd

from masksae.files import read_json
from masksae.study.profile import Profile
from masksae.study.report import labels
from masksae.study.report.claims import endpoints
from masksae.study.report.effects import Cell, describe, effect, merge, sentence, way
from masksae.study.report.robustness import SITUATIONS, situation
from masksae.study.scores.robustness import SCORES
from masksae.study.stats import Effect

FILES = ("reconstruction", "absorption", "contexts", "robustness", "probing")

RECALL = {"letters": "main_recall", "contexts": "context_main_recall"}
"""Of an endpoint of absorption, the score that says whether its main latents tell as many words as before."""

RIVALS = ("mean_full", "main_f1", "context_full", "context_main_f1", "ev_centred")
"""What is told of unmasked rivals."""


def scores_of(folder: Path, profile: Profile) -> pd.DataFrame:
    """The merged scores of results/<profile>, in the mode that decides."""
    return merge(*(read_json(folder / f"{name}.json") for name in FILES), mode=profile.decisions.mode)


def found(scores: pd.DataFrame, column: str, grid: str, arm: str, cell: Cell) -> Effect | None:
    """`effects.effect`; None where a side has no such score."""
    sides = [scores[(scores["arm"] == a) & (scores["grid"] == g)] for a, g in ((arm, grid), cell)]
    if column not in scores or any(side.empty or side[column].isna().any() for side in sides):
        return None
    return effect(scores, column, grid, arm, cell)


def mask(profile: Profile) -> str:
    """The token that stands for a masked one, with the model's own word for it."""
    token = f"`{profile.model.mask_token}`"
    return f"end-of-text ({token})" if "endoftext" in token else token


def named(column: str, profile: Profile) -> str:
    """The name of a score; of robustness with the positions, and the mask token by its name (without the model's word,
    whose bars would end a cell of a table)."""
    told = labels.words(column)
    for kind, reach in SITUATIONS:
        if column.startswith(f"robustness_{kind}_{reach}_"):
            told = f"{told.partition(',')[0]}, {situation(kind, reach)}"
    return told.replace("the mask token", f"the mask token, {mask(profile).partition(' (')[0]}")


def beside(scores: pd.DataFrame, profile: Profile) -> dict[tuple[str, str, str], Effect]:
    """(arm, grid, score) -> what it changes, of the scores that say how to read the verdicts and decide none of them:
    recall, probing with other numbers of latents, both sides of R, main latents of nested SAEs, unmasked rivals."""
    arm, first, main = profile.treated_arm.name, profile.baseline_arm.name, profile.main_grid.name
    decides = {e.score for e in profile.decisions.endpoints}
    probing = labels.measured("probing_auc_", scores.columns)
    kept = [key for key in probing if key != f"probing_auc_{profile.probing.ks[0]}"]
    keys = ["main_recall", "context_main_recall", "ce_score", *kept]
    sides = [side for side in SITUATIONS if side[0] != "gradient"]
    keys += [f"robustness_{kind}_{reach}_{key}" for kind, reach in sides for key in SCORES if key != "code"]
    asked = [(arm, main, key) for key in keys if key not in decides]
    for grid in profile.saes:
        if grid.prefixes and not grid.against:
            asked += [(arm, grid.name, key) for key in ("main_f1", "main_recall")]
        if grid.penalties and grid.against:
            asked += [(first, grid.name, key) for key in RIVALS]
    cells = ((each, profile.baseline(*each[:2])) for each in asked)
    told = {each: found(scores, each[2], each[1], each[0], cell) for each, cell in cells if cell}
    return {each: e for each, e in told.items() if e}


def beside_table(told: dict[tuple[str, str, str], Effect], profile: Profile) -> list[dict]:
    """Rows for a page."""
    return [
        {
            "SAEs": f"{arm}, {grid}",
            "against": ", ".join(profile.baseline(arm, grid)),
            "score": named(key, profile),
            "it": way(e),
            "change": describe(e, labels.score(key).digits, detectable=False),
            "pairs × items": " × ".join(str(n) for n in (e.pairs, e.items) if n),
        }
        for (arm, grid, key), e in told.items()
    ]


def short_answer(claims: dict, told: dict[tuple[str, str, str], Effect], profile: Profile) -> str:
    """A list in markdown: what the verdicts say, and beside each what they leave out.

    told  of `beside`
    """
    rows = {name: row for _, name, row in endpoints(claims) if "difference" in row}
    mine = {key: e for (arm, grid, key), e in told.items() if grid == profile.main_grid.name}
    contexts = 'Absorption of context features ("follows a comma", our addition)'
    parts = [
        _default(rows, mine),
        _absorbed(rows, mine, "letters", "First-letter absorption"),
        _absorbed(rows, mine, "contexts", contexts),
        *(_cost(row) for row in rows.values() if "size_in_words" in row),
        _decided(rows, "probing", "Probing with {} latents") + _changed(mine, {"probing_auc_1": " With one latent it"}),
        _decided(rows, "gap", "The out-of-distribution gap of probes on {} latents"),
        _decided(rows, "robustness", "The overlap of active latents 1 to 3 positions after a token replaced at random")
        + _mask_side(mine, profile),
        *_other_grids(told, profile),
        _sparsity(claims),
        _open(claims),
    ]
    return "\n".join(f"* {part.strip()}" for part in parts if part)


def _default(rows: dict, mine: dict[str, Effect]) -> str:
    """Whether anything speaks for masking: an endpoint of C1 to C3 that is better, whose latents miss no more."""
    lost = [name for name, key in RECALL.items() if key in mine and way(mine[key]) == "falls"]
    asked = [name for name in ("letters", "contexts", "probing", "gap") if name not in lost]
    if better := [name for name in asked if rows.get(name, {}).get("verdict") == "supported"]:
        return f"**Masking improves {' and '.join(better)}**, at the cost below."
    return "**We would not mask by default**: no claim of C1 to C3 is supported without a loss beside it."


def _decided(rows: dict, name: str, subject: str) -> str:
    """A sentence on an endpoint by its verdict, "" where there is none; {} in its subject is the number of latents."""
    if (row := rows.get(name)) is None:
        return ""
    said = {
        "equivalent": f"is equivalent within the margin of {row['margin']:g}",
        "inconclusive": "is inconclusive: neither a difference nor equivalence within the margin of "
        f"{row['margin']:g} could be shown",
        "not measurable": "is not measurable",
    }.get(row["verdict"], "")
    if row["verdict"] == "inconclusive" and way(Effect.from_dict(row)) != "no clear change":
        said += ", once corrected for the number of endpoints"
    subject = subject.format(row["score"].rpartition("_")[2])
    return f"{subject} {sentence(Effect.from_dict(row), labels.score(row['score']).digits, said)}."


def _changed(told: dict[str, Effect], words: dict[str, str], end: str = ".") -> str:
    """What some scores change, by the words for each; "" for those that are not there."""
    parts = [f"{words[key]} {sentence(told[key], labels.score(key).digits)}" for key in words if key in told]
    return ";".join(parts) + end if parts else ""


def _absorbed(rows: dict, mine: dict[str, Effect], name: str, subject: str) -> str:
    """Absorption of a kind of parents, and whether its main latents tell as many words."""
    if name not in rows:
        return ""
    return (
        _decided(rows, name, subject)
        + _changed(mine, {RECALL[name]: " The recall of its main latents, the share of words on which they fire,"})
        + (" " + _decided(rows, f"{name} f1", "Their F1")).rstrip()
    )


def _cost(row: dict) -> str:
    return (
        f'**Cost**: {row["size_in_words"]}. The claim is "slightly". That this means less than {row["slight"]:g} is '
        "our bound, chosen after a pilot, so the result is the size."
    )


def _mask_side(mine: dict[str, Effect], profile: Profile) -> str:
    """The other side of R: the mask token itself stands in the replaced token's place."""
    keys = [f"robustness_mask_near_{name}" for name in ("jaccard", "top_jaccard", "recon")]
    told = _changed(mine, {key: f" the {labels.words(key).partition(',')[0]}" for key in keys})
    told = told and f" After the mask token itself, {mask(profile)},{told}"
    moved = [mine.get(f"robustness_{kind}_far_x") for kind in ("mask", "random")]
    if all(moved):
        told += " It moves activations 4 to 15 positions later by {:.3f}, a random token by {:.3f}.".format(
            *(e.baseline for e in moved)
        )
    return told


def _other_grids(told: dict[tuple[str, str, str], Effect], profile: Profile) -> list[str]:
    """The main latents of nested SAEs, and the rivals of masking, a sentence each."""
    parts = []
    words = {"mean_full": " first-letter absorption", "context_full": " that of contexts"}
    words |= {"ev_centred": " explained variance"}
    for grid in profile.saes:
        mine = {key: e for (_, name, key), e in told.items() if name == grid.name}
        if not mine or grid == profile.main_grid:
            continue
        pairs = f"({next(iter(mine.values())).pairs} pairs)"
        if grid.penalties:
            rival = " and ".join(type(penalty.config).__name__ for penalty in grid.penalties)
            parts.append(f"The rival {rival}, unmasked, against {grid.against} {pairs}:{_changed(mine, words)}")
        else:
            parts.append(_changed(mine, {"main_f1": f"In {grid.name} {pairs} the F1 of first letters"}))
    return parts


def _sparsity(claims: dict) -> str:
    """Where masking changes L0 on clean text."""
    cells = {grid: next(iter(found.values()), {}) for grid, found in claims["C4"].get("cells", {}).items()}
    l0 = {grid: row["clean_l0"] for grid, row in cells.items() if "clean_l0" in row}
    moved = [f"{grid} {a:.1f} to {b:.1f}" for grid, (a, b) in l0.items() if abs(b - a) > 1]
    return f"Masking changes L0 on clean text ({', '.join(moved)}). Compare at equal L0." if moved else ""


def _open(claims: dict) -> str:
    """What cannot be measured here."""
    cells = claims["C4"].get("cells", {})
    lacking = [grid for grid, found in cells.items() if any(r["verdict"] == "not measurable" for r in found.values())]
    return (
        f"**Not answered**: absorption in {', '.join(lacking)}, whose unmasked SAEs fail the gate." if lacking else ""
    )
