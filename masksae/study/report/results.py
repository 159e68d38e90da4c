"""What came out, on a page: docs/results.md and the first screen of the README, out of results/ alone."""

from functools import partial
from pathlib import Path

from masksae.files import read_json
from masksae.study.profile import Profile, load_profile
from masksae.study.report import labels, preregistration
from masksae.study.report.claims import endpoints, grid_table, verdict_table
from masksae.study.report.controls import control_table, control_words
from masksae.study.report.curves import effect_table
from masksae.study.report.effects import around, change, comparison, described, merge
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

PARENTS = {"same": KINDS["letters"], "cross": KINDS["contexts"]}
"""Kinds of parents in the worlds of known features, and those of a language model that they stand for."""


def present(root: Path) -> list[str]:
    """Those of the profiles whose claims were judged, in their order."""
    return [name for name in SHOWN if (root / "results" / name / "claims.json").exists()]


def first_screen(root: Path) -> str:
    """What the README shows: figure, scale, and a line for each claim."""
    name = present(root)[0]
    profile, folder = load_profile(name), root / "results" / name
    claims = read_json(folder / "claims.json")
    rows = [
        {
            "claim": f"{told['claim']}: {_claim(claims[told['claim']])}",
            "by": labels.words(row["score"]) if "score" in row else "every other grid",
            "verdict": f"**{told['verdict']}**",
            "unmasked → masked": told["unmasked → treated"] or told["why"],
        }
        for told, (_, _, row) in zip(verdict_table(claims), endpoints(claims))
        if row.get("primary", True)
    ]
    along = f"figures/{name}/04_absorption/along.png"
    return f"""![Absorption along training, against steps and explained variance]({along})

{_scale(profile)}

{to_markdown(cells(rows))}
*First letters*: "starts with S"; *contexts*, our addition: "follows a comma"; *F1*: of the latents that ought to fire;
a *pair*: both arms of a seed. *Equivalent*: within a margin set before; *inconclusive*: nothing shown; *not
measurable*: the SAEs fail [the gate](docs/gate.md). [All that was found](docs/results.md), [decided
before](docs/preregistration.md). {" ".join(_lost(claims))}

Is it the mask, and are latents better? [Arms](docs/method.md) less unmasked, ± half the 95 % interval;
`{profile.treated_arm.name}` is the paper's:

{to_markdown(cells(_arms(folder, profile))).strip()}"""


def _claim(row: dict) -> str:
    """A claim as a line of a table, with the bound of one about a size."""
    bound = f" (by less than {row['slight']:g})" if "slight" in row else ""
    return row["claim"].removeprefix("Masking ") + bound


def _lost(claims: dict) -> list[str]:
    """A sentence for each kind of parent whose absorption falls together with the F1 of its main latents."""
    rows = {name: row for _, name, row in endpoints(claims)}
    told = []
    for kind in ("letters", "contexts"):
        absorption, f1 = (rows.get(name, {}) for name in (kind, f"{kind} f1"))
        if (absorption.get("verdict"), f1.get("verdict")) == ("supported", "contradicted"):
            values = f"{f1['baseline']:.2f} → {f1['treated']:.2f}"
            told.append(f"With the absorption of {kind}, the F1 of their main latents falls too ({values}).")
    return told


def page(root: Path) -> str:
    """docs/results.md."""
    names = present(root)
    parts = [
        "<!-- written by tools/pages.py; edit masksae/study/report/results.py -->\n# What was found\n",
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
    figures, gate = f"../figures/{name}", profile.decisions.gate
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
        f"`results/{name}/claims.json`. *Finds*: the smallest true difference that the rule finds four times of five.",
        *_lost(claims),
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
        f"As trained; the last rows are the other arms against `{profile.treated_arm.name}`. "
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
    """Both worlds of known features beside the language model: what masking does to absorption with TopK."""
    folder, profile = root / "results" / name, load_profile(name)
    options, world = profile.simulation, simulated(read_json(folder / "mechanism.json"))
    synthetic = read_json(root / "results/synthetic/effects.json")
    along = read_json(folder / "along_effects.json")
    table = []
    for arm in ("kept", "dropped"):
        for kind, named in PARENTS.items():
            at = {"rule": "TopK", "kind": kind, "k": options.ks[0], "p": options.main_p, "arm": arm}
            lines = [row for row in world if all(row[key] == value for key, value in at.items())]
            score = {"comparison": f"TopK: {arm}", "mode": "as_trained", "score": f"absorption_{kind}"}
            found = {"arm": arm, "kind": named, "equal": "steps"}
            row = {"arm": arm, "parents": named}
            row |= {f"notebook 00, q = {line['q']:g}": _told(line) for line in lines if line["q"] in (0.5, 1.0)}
            row["SynthSAEBench"] = _told(_only(synthetic, score))
            row["this model"] = _told(_only(along, found))
            table.append(row)
    words = [[told.rpartition(" ")[2] for told in list(row.values())[2:]] for row in table]
    decided = [(world, here) for *worlds, here in words for world in worlds if {world, here} <= {"falls", "rises"}]
    agree = sum(world == here for world, here in decided)
    return f"""## What was predicted, and what came

Absorption, treated less unmasked, TopK, at equal steps. Two worlds in which every feature is known were asked before
([notebook 00](../notebooks/00_mechanism.ipynb), where q is how often a word comes with its parent, and
[SynthSAEBench](synthetic.md)); their sizes do not carry over, their signs may.

{to_markdown(cells(table))}
Where a world and this model both decide, they agree {agree} times of {len(decided)}.
"""


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
    pairs, finds = row["pairs needed"], row["finds"]
    if finds is None:
        return "one pair gives no interval; train a second"
    more = f"{pairs} pairs" if pairs else "not to be settled by a thousand pairs with the same items"
    seen = "no difference that there can be" if finds == "nothing" else f"{number(finds)} and more"
    return f"{more}, were the effect the one found here; this run finds {seen}"


def _scale(profile: Profile) -> str:
    text, training, main = profile.text, profile.training, profile.main_grid
    pairs = len(profile.blocks[0].pairs)
    tokens = f"{text.train_tokens / 1e6:g} M tokens × {training.epochs} epochs"
    return (
        f"{profile.model.source}, {profile.model.place}, {tokens}; {main.architecture} with {main.n_latents:,} latents "
        f"at L0 {main.l0:g}, {pairs} pairs of SAEs (profile `{profile.name}`)."
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


def _arms(folder: Path, profile: Profile) -> list[dict]:
    """What each arm of the main grid changes, without the values themselves."""
    scores, grid, found = merge(*_files(folder), mode="as_trained"), profile.main_grid.name, []
    for arm in dict.fromkeys(scores.loc[scores["grid"] == grid, "arm"]):
        if cell := profile.baseline(arm, grid):
            told = described(scores, arm, grid, cell, around)
            row = {SHORT[title]: words for title, words in told.items() if title in SHORT}
            found.append({"arm": arm.replace("_", " ")} | row | {"pairs": told["pairs"]})
    return found


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
    if effect.low is None:
        return change(effect)
    return change(effect) + (" falls" if effect.high < 0 else " rises" if effect.low > 0 else " undecided")


def _only(rows: list[dict], values: dict) -> dict | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)
