"""What came out, on a page: docs/results.md and the first screen of the README, out of results/ alone."""

from functools import partial
from itertools import product
from pathlib import Path

from masksae.files import read_json
from masksae.study.profile import Profile, load_profile
from masksae.study.report import answer, labels, preregistration
from masksae.study.report.claims import endpoints, grid_table, verdict_table
from masksae.study.report.controls import control_table, control_words
from masksae.study.report.curves import effect_table
from masksae.study.report.effects import around, change, comparison, described, effect, merge, way
from masksae.study.report.tables import brief, cells, number, to_markdown
from masksae.study.scores.curves import KINDS
from masksae.study.scores.mechanism import effects as simulated
from masksae.study.stats import Effect

PAGE = "docs/results.md"

SHOWN = ("overnight", "laptop", "gemma")
"""Profiles of the page, the one that the README shows first."""

SHORT = {
    "absorption": "absorption, letters",
    "F1 of main latents, first letters": "F1, letters",
    "absorption by context": "absorption, contexts",
    "F1 of main latents, contexts": "F1, contexts",
    "explained variance": "explained variance",
    labels.words("robustness_random_near_jaccard"): "robustness",
}
"""Columns of the comparison of cells that the page has too."""

MEASURED = {
    "absorption": {"same": "mean_full", "cross": "context_full"},
    "F1": {"same": "main_f1", "cross": "context_main_f1"},
}
"""The language model's scores that stand beside those of the worlds."""

PARENTS = {"same": KINDS["letters"], "cross": KINDS["contexts"]}
"""Kinds of parents in the worlds of known features, and those of a language model that they stand for."""


def present(root: Path) -> list[str]:
    """Those of the profiles whose claims were judged, in their order."""
    return [name for name in SHOWN if (root / "results" / name / "claims.json").exists()]


def first_screen(root: Path) -> str:
    """What the README shows: the short answer, a figure, and a line for each claim and for what says how to read it."""
    name = present(root)[0]
    profile, folder = load_profile(name), root / "results" / name
    claims, told = read_json(folder / "claims.json"), _beside(folder, profile)
    table = zip(told, answer.beside_table(told, profile))
    beside = {key: row for (_, grid, key), row in table if grid == profile.main_grid.name}
    rows = []
    for row, (claim, endpoint, found) in zip(verdict_table(claims), endpoints(claims)):
        if found.get("primary", True):
            rows.append(
                {
                    "claim": f"{claim}: {_claim(claims[claim])}",
                    "measured by": answer.named(found["score"], profile) if "score" in found else "other types of SAEs",
                    "verdict": f"**{row['verdict']}**",
                    "unmasked → masked (difference)": row["unmasked → treated"] or row["why"],
                }
            )
            rows += [_beside_row(claim, beside[key]) for key in READ_WITH.get(endpoint, ()) if key in beside]
    along = f"figures/{name}/04_absorption/along.png"
    return f"""**Short answer**, at a small scale: {_scale(profile)}

{answer.short_answer(claims, told, profile)}

![Absorption along training, against steps and explained variance]({along})

{_along_words(folder, profile)}

{to_markdown(cells(rows))}
* *First letters*: absorption of features such as "starts with S". *Contexts*, our addition: of features such as
  "follows a comma". *Recall* and *F1*: how well the main latents of a feature detect it. A *pair*: an unmasked and a
  masked SAE of one seed.
* *Equivalent*: the difference is shown to lie within a margin that was set before. *Inconclusive*: neither a difference
  nor equivalence within the margin could be shown. *Not measurable*: the SAEs fail [the gate](docs/gate.md).
* *Beside it*: not decided beforehand, and not corrected for the number of such rows. *Our bound*: chosen by us after a
  pilot ([what was known](docs/preregistration.md#what-was-known-at-the-freeze)).
* [Full results](docs/results.md). Endpoints and margins were fixed [before these SAEs were
  trained](docs/preregistration.md).

Is it the mask? {_arms_words(folder, profile)}"""


READ_WITH = {
    "letters": ("main_recall",),
    "contexts": ("context_main_recall",),
    "robustness": tuple(f"robustness_mask_near_{score}" for score in ("jaccard", "top_jaccard", "recon")),
}
"""What stands in the README beside an endpoint."""


def _beside(folder: Path, profile: Profile) -> dict[tuple[str, str, str], Effect]:
    return answer.beside(answer.scores_of(folder, profile), profile)


def _beside_row(claim: str, row: dict) -> dict:
    """A row of the README's table that decides nothing."""
    told = {"claim": f"{claim}, beside it", "measured by": row["score"], "verdict": row["it"]}
    return told | {"unmasked → masked (difference)": row["change"]}


def _claim(row: dict) -> str:
    """A claim as a line of a table, with the bound of one about a size."""
    bound = f" (our bound: by less than {row['slight']:g})" if "slight" in row else ""
    return row["claim"].removeprefix("Masking ") + bound


def _along_words(folder: Path, profile: Profile) -> str:
    """How to read the right half of the picture."""
    rows = [row for row in read_json(folder / "along_effects.json") if row["arm"] == profile.treated_arm.name]
    bounds = {
        KINDS["letters"]: profile.decisions.gate.letters_f1,
        KINDS["contexts"]: profile.decisions.gate.contexts_f1,
    }
    low = [
        f"{row['kind']}: {row['f1'][0]:.2f}, bound {bounds[row['kind']]:g}"
        for row in rows
        if row["equal"] != "steps" and row.get("f1") and row["f1"][0] < bounds.get(row["kind"], 0)
    ]
    told = "Left: against steps. Right: against explained variance, where the unmasked SAE is one that stopped early."
    if not low:
        return told
    return f"{told} There its F1 is below the gate's bound ({'; '.join(low)}), so absorption counts missing latents."


def page(root: Path) -> str:
    """docs/results.md."""
    names = present(root)
    profile, folder = load_profile(names[0]), root / "results" / names[0]
    told = _beside(folder, profile)
    parts = [
        "<!-- written by tools/pages.py; edit masksae/study/report/results.py -->\n# What was found\n",
        f"{_scale(profile)}\n\n{answer.short_answer(read_json(folder / 'claims.json'), told, profile)}\n",
        "No number on this page was typed: each comes from a file of `results/`, named beside it, which "
        "`make repro PROFILE=...` writes. What decides was [written down before](preregistration.md); whether SAEs of "
        "this size can tell anything was [asked first, of unmasked ones](gate.md).\n",
        *(profile_part(root, name) for name in names),
        predicted(root, names[0]),
        larger(root, names[0]),
    ]
    return "\n".join(parts)


def profile_part(root: Path, name: str) -> str:
    """One profile: verdicts, along training, every cell, controls."""
    profile, folder = load_profile(name), root / "results" / name
    claims, along = read_json(folder / "claims.json"), read_json(folder / "along_effects.json")
    figures, gate, beside = f"../figures/{name}", profile.decisions.gate, _beside(folder, profile)
    told = [
        f"## Profile `{name}`\n\n{_scale(profile)}",
        preregistration.status(profile).strip(),
        *(
            [f"Decided on and not run so far, for want of hours: {', '.join(skipped)}."]
            if (skipped := _skipped(profile))
            else []
        ),
        "### Verdicts",
        _readable(verdict_table(claims)),
        f"`results/{name}/claims.json`. *MDE*: the minimum detectable effect, at 80 % power.",
        "*Our bound* (C5) was chosen after a pilot had shown the fall ([what was "
        "known](preregistration.md#what-was-known-at-the-freeze)): the result is the size.",
        "### Beside the verdicts",
        "Scores that decide nothing and say how to read those that do: recall (the share of a feature's words on which "
        "a main latent fires), probing with other numbers of latents, robustness on both sides (an ordinary token, or "
        f"the mask token, {answer.mask(profile)}, in a token's place), nested SAEs, and unmasked rivals. Their "
        f"{len(beside)} intervals are not corrected for their number, and none was decided beforehand. Where one "
        "number stands under pairs × items, the interval is over pairs alone.",
        to_markdown(cells(answer.beside_table(beside, profile))).strip(),
    ]
    if grids := grid_table(claims):
        told += [
            "### Other levels of sparsity, other architectures (C4)",
            *_picture(root, name, "09_paper/everywhere", "What masking changes in every grid"),
            _readable(grids),
        ]
    if along:
        told += [
            "### Along training",
            *_picture(
                root, name, "04_absorption/along", "Absorption of both kinds against steps and explained variance"
            ),
            to_markdown(cells(effect_table(along))).strip(),
            f"`results/{name}/along_effects.json`. At equal explained variance the unmasked SAE is one that was "
            f"stopped early. Below the gate's F1 ({gate.letters_f1:g} of letters, {gate.contexts_f1:g} of contexts) "
            "its absorption counts missing latents, and the effect with it.",
        ]
    told += [
        "### Every cell: arms, rivals, controls",
        f"![Every arm and kind of SAE beside its baseline]({figures}/08_ablations/cells.png)",
        *(
            _picture(root, name, "08_ablations/shares", "What the share of masked tokens changes")
            if len(profile.shares) > 1
            else []
        ),
        to_markdown(cells(_cells(folder, profile))).strip(),
        f"As trained; the last rows are the other arms against `{profile.treated_arm.name}`. Every row is of the pairs "
        "that both sides have, and its first values are the baseline of these. The intervals are not corrected for "
        "their number. "
        f"[All scores, and every way to match sparsity]({figures}/08_ablations/table.md).",
    ]
    if controls := read_json(folder / "controls.json"):
        told += [
            "### What an untrained SAE scores",
            f"![Trained SAEs beside controls]({figures}/04_absorption/controls.png)",
            " ".join(control_words(controls)),
            to_markdown(cells(control_table(controls))).strip(),
        ]
    return "\n\n".join(told) + "\n"


def predicted(root: Path, name: str) -> str:
    """Both worlds of known features beside the language model: what masking does to absorption and to the F1 of the
    same parents, with TopK."""
    folder, profile = root / "results" / name, load_profile(name)
    worlds = read_json(folder / "mechanism.json")
    known = {
        "absorption": simulated(worlds),
        "F1": simulated([row | {kind: row[f"{kind}_f1"] for kind in PARENTS} for row in worlds]),
    }
    synthetic = read_json(root / "results/synthetic/effects.json")
    scores, main = merge(*_files(folder), mode="as_trained"), profile.main_grid.name
    table = []
    for score, arm, kind in product(known, ("kept", "dropped"), PARENTS):
        row = {"arm": arm, "parents": PARENTS[kind], "score": score}
        options = {
            "rule": "TopK",
            "kind": kind,
            "k": profile.simulation.ks[0],
            "p": profile.simulation.main_p,
            "arm": arm,
        }
        lines = {line["q"]: line for line in known[score] if all(line[key] == options[key] for key in options)}
        row |= {f"notebook 00, q = {q:g}": _told(lines.get(q)) for q in (0.5, 1.0)}
        asked = {"comparison": f"TopK: {arm}", "mode": "as_trained", "score": f"{score.lower()}_{kind}"}
        row["SynthSAEBench"] = _told(_only(synthetic, asked))
        column = MEASURED[score][kind]
        there = (scores["grid"] == main) & (scores["arm"] == arm)
        row["this model"] = _told(effect(scores, column, main, arm).to_dict() if there.any() else None)
        table.append(row)
    return f"""## What was predicted, and what came

Treated minus unmasked, TopK, at equal steps; masked tokens of this model are {answer.mask(profile)}. Two worlds in
which every feature is known were asked before ([notebook 00](../notebooks/00_mechanism.ipynb), where q is how often a
word comes with its parent, and [SynthSAEBench](synthetic.md)). Their sizes do not carry over, their signs may.

{to_markdown(cells(table))}
{_agreed(table)} The cells of a row rest on one result of this model, so they are not independent.
"""


def _agreed(table: list[dict]) -> str:
    """How often the sign in a world is that in this model where both are clear, by score."""
    ends, told = ("falls", "rises"), []
    for score in dict.fromkeys(row["score"] for row in table):
        words = [[str(value).rpartition(" ")[2] for value in row.values()] for row in table if row["score"] == score]
        both = [(world, row[-1]) for row in words for world in row[3:-1] if world in ends and row[-1] in ends]
        told.append(f"on {score} in {sum(a == b for a, b in both)} of {len(both)}")
    return f"Of the cells in which a world and this model both show a change, the signs agree {' and '.join(told)}."


def larger(root: Path, name: str) -> str:
    """What it would take to settle what this run could not."""
    claims = read_json(root / "results" / name / "claims.json")
    rows = [row for row in verdict_table(claims) if row["verdict"] == "inconclusive"]
    told = [f"* {row['claim']}, {row['endpoint']}: {_needed(row)}." for row in rows if row["SAEs"]]
    text = "\n".join(told) or "No endpoint was inconclusive."
    return f"""## What a larger run would need

{text}

More pairs make an interval narrower. They do not answer whether a larger model, more tokens or a wider dictionary would
behave otherwise: `make repro PROFILE=paper` is sized for that ([scale](scale.md)).
"""


def _needed(row: dict) -> str:
    """What it takes to settle an endpoint that is inconclusive, a row of `verdict_table`."""
    pairs, least = row["pairs needed"], row["MDE"]
    if least is None:
        return "one pair gives no interval; train a second"
    more = f"{pairs} pairs would" if pairs else "even a thousand pairs with the same items would not"
    seen = "larger than any difference that there can be" if least == "nothing" else number(least)
    return f"{more} give a verdict if the true effect is the one observed; the minimum detectable effect here is {seen}"


def _scale(profile: Profile) -> str:
    text, training, main = profile.text, profile.training, profile.main_grid
    pairs = len(profile.blocks[0].pairs)
    tokens = f"{text.train_tokens / 1e6:g} M tokens × {training.epochs} epochs"
    return (
        f"{profile.model.source}, {profile.model.place}, {tokens}; {main.architecture} with {main.n_latents:,} latents "
        f"at L0 {main.l0:g}, {pairs} pairs of SAEs; masked tokens are replaced by {answer.mask(profile)} (profile "
        f"`{profile.name}`)."
    )


def _cells(folder: Path, profile: Profile) -> list[dict]:
    """What each cell changes in absorption, its latents and explained variance against its baseline, as trained; then
    the other arms of the main grid against the one that decides."""
    files, found = _files(folder), []
    decides, main = profile.treated_arm.name, profile.main_grid.name

    def beside(arm: str, grid: str) -> tuple[str, str] | None:
        return (decides, main) if grid == main and arm not in (decides, profile.baseline_arm.name) else None

    for baseline in (profile.baseline, beside):
        table = comparison(*files, baseline=baseline).rename(columns=SHORT)
        table = table.drop_duplicates(["SAEs", "against"])  # the published way to compare
        table["clean L0"] = table["L0"].str.partition(" (")[0]
        found += table[["SAEs", "against", "clean L0", *SHORT.values(), "pairs"]].to_dict("records")
    return found


def _arms_words(folder: Path, profile: Profile) -> str:
    """The arms of the main grid in a table, and how to read it."""
    rows = _arms(folder, profile)
    arms = [row for row in rows if row["arm"] != profile.baseline_arm.name]
    intervals = sum(str(row[title]).count("±") for row in arms for title in SHORT.values() if title in row)
    return f"""[Arms](docs/method.md) minus unmasked, ± half the 95 % interval. `{profile.treated_arm.name}` is the
paper's, and its mask token is {answer.mask(profile)}. Each row is compared with the unmasked SAEs of its own pairs,
whose mean scores stand above it. The {intervals} intervals are not corrected for their number.

{to_markdown(cells(rows)).strip()}"""


def _arms(folder: Path, profile: Profile) -> list[dict]:
    """What each arm of the main grid changes, below the unmasked SAEs of the same pairs."""
    scores, grid, found = merge(*_files(folder), mode="as_trained"), profile.main_grid.name, {}
    mine = scores[scores["grid"] == grid]
    for arm, part in mine.groupby("arm", sort=False):
        if cell := profile.baseline(arm, grid):
            pairs = _ranges(sorted(part["seed"]))
            for name, words in ((cell[0], lambda e, digits: f"{e.baseline:.{digits}f}"), (arm, around)):
                told = described(scores, arm, grid, cell, words)
                row = {SHORT[title]: text for title, text in told.items() if title in SHORT}
                found.setdefault(pairs, {}).setdefault(name, {"arm": name.replace("_", " "), "pairs": pairs} | row)
    return [row for rows in found.values() for row in rows.values()]


def _ranges(pairs: list[int]) -> str:
    """ "100 to 102 (3)": pairs by their ends where none between is missing."""
    whole = len(pairs) > 1 and pairs == list(range(pairs[0], pairs[-1] + 1))
    return (f"{pairs[0]} to {pairs[-1]}" if whole else ", ".join(map(str, pairs))) + f" ({len(pairs)})"


def _picture(root: Path, name: str, picture: str, words: str) -> list[str]:
    """A picture of a profile in words for who does not see it, and its caption."""
    path = f"figures/{name}/{picture}"
    return [f"![{words}](../{path}.png)", (root / f"{path}.txt").read_text(encoding="utf-8").strip()]


def _files(folder: Path) -> list[list[dict]]:
    return [read_json(folder / f"{name}.json") for name in ("reconstruction", "absorption", "contexts", "robustness")]


def _skipped(profile: Profile) -> list[str]:
    """Blocks that were decided on and not worked off: name and size."""
    blocks = [block for block in profile.blocks if block.skipped]
    return [f"`{b.name}` ({', '.join(b.saes)}; {', '.join(b.arms)}; {len(b.pairs)} pairs)" for b in blocks]


def _readable(rows: list[dict]) -> str:
    """Rows of verdicts as markdown, without columns that are empty in all."""
    used = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    return to_markdown(cells(rows, used, partial(brief, digits=3))).strip()


def _told(row: dict | None) -> str:
    """A change with its interval and what that says."""
    if row is None:
        return "–"
    effect = Effect.from_dict(row)
    return change(effect) + ("" if effect.low is None else f" {way(effect)}")


def _only(rows: list[dict], values: dict) -> dict | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)
