"""REPRODUCE.md: for each figure, table and number that is shown, the command that makes it, how long that takes, and
the file that holds it."""

from pathlib import Path

from masksae.study.compare import FILE, noted
from masksae.study.inputs import WRITES
from masksae.study.profile import Profile, load_profile
from masksae.study.report.results import present
from masksae.study.report.tables import to_markdown
from masksae.study.times import span, table, times

PAGE = "REPRODUCE.md"

SUFFIXES = (".png", ".md", ".html")
"""Of figures, tables and pages; a figure's .svg and its caption, .txt, stand beside it."""


def page(root: Path) -> str:
    """The card of every profile that has results."""
    first, parts = present(root)[0], [part(root, name) for name in present(root)]
    return f"""<!-- written by tools/pages.py; edit masksae/study/report/card.py -->
# What makes what

Every figure, table and number that this repository shows: the command, the time and the memory of its stage on the
machine that is named, and the file. A command brings all of its profile up to date and runs nothing twice.
`masksae check` says which committed results are of this profile and this code, without running them.

**Tolerance.** The same code on the same kind of machine gives the same bytes. Elsewhere products of matrices are summed
in another order, and SAEs drift apart as they train: an effect has come again if it lies in the interval that is
committed, with the same verdict. `masksae compare PROFILE`, after `make repro`, says so endpoint by endpoint; what it
said elsewhere stands below each profile.

The README's first screen is the profile `{first}`: its verdicts are `results/{first}/claims.json`, its figure is
`figures/{first}/04_absorption/along.png`.

| what | command | file |
| --- | --- | --- |
| the regime ([gate](docs/gate.md)) | `masksae gate` | `results/gate/gate.json`, `figures/gate/gate.png` |
| known features ([synthetic](docs/synthetic.md)) | `make synthetic` | `results/synthetic/`, `figures/synthetic/` |
| an own model, step by step ([own-model](docs/own-model.md)) | `make guide` | `docs/own-model/` |
| speed beside the peers ([benchmarks](benchmarks/README.md)) | `make benchmark` | printed |

{"".join(parts)}"""


def part(root: Path, name: str) -> str:
    """The card of one profile."""
    found = times(root / "results" / name)
    machine = found["machine"]
    told = (
        f"Measured on {machine['cores']} cores, {machine['gflops']} GFLOP/s in all, torch {machine['torch']}."
        if machine
        else "Not timed."
    )
    _, *stages = table(found)
    taken = {stage: numbers for stage, *numbers in stages}
    pairs = _pairs(load_profile(name), found["stages"])
    rows = [["stage", "time", "memory", "results", "figures and tables"]]
    for stage in sorted({*WRITES, *(path.name for path in (root / "figures" / name).iterdir() if path.is_dir())}):
        results = [key for key in WRITES.get(stage, ()) if (root / "results" / name / f"{key}.json").exists()]
        rows.append(
            [
                stage,
                *taken.get(stage, ("–", "–")),
                ", ".join(f"[{key}](results/{name}/{key}.json)" for key in results),
                ", ".join(f"[{path.stem}]({path.relative_to(root)})" for path in shown(root, name, stage)),
            ]
        )
    rows += [row for row, _ in pairs]
    if (root / "results" / name / "matched.json").exists():
        rows.append(["`masksae match`", "–", "–", f"[matched](results/{name}/matched.json)", "searched for beforehand"])
    return f"""## Profile `{name}`

    make repro PROFILE={name}

{told} In all {_sum(taken, pairs)}.

{to_markdown(rows)}
{again(root / "results" / name)}"""


def _pairs(profile: Profile, stages: dict[str, dict]) -> list[tuple[list[str], float]]:
    """A row for each block of which pairs were timed, and the seconds that its other pairs took by their mean."""
    rows = []
    for block in profile.blocks if profile.keep_pairs else ():
        timed = [found for pair in block.pairs if (found := stages.get(f"{block.name}-s{pair}"))]
        if timed:
            mean = sum(found["seconds"] for found in timed) / len(timed)
            memory = f"{max(found['memory_gb'] for found in timed):.1f} GB"
            count = f"{len(timed)} of {len(block.pairs)} pairs timed"
            row = [f"`masksae pairs`: {block.name}", f"{span(mean)} a pair", memory, count, ""]
            rows.append((row, mean * (len(block.pairs) - len(timed))))
    return rows


def _sum(taken: dict[str, list[str]], pairs: list[tuple[list[str], float]]) -> str:
    untimed = sum(seconds for _, seconds in pairs)
    if not untimed:
        return taken["in all"][0]
    return f"{taken['in all'][0]}, and about {span(untimed)} of pairs that were run on other days"


def again(results: Path) -> str:
    """How far the effects of a profile move on other machines, as far as that was tried: `masksae compare --save`."""
    if not (found := noted(results)):
        return ""
    source = f"[run again](results/{results.name}/{FILE}) on"
    told = [[source, "endpoints", "same verdict", "inside the interval", "largest shift of an effect"]]
    for name, run in found.items():
        rows, machine = run["rows"], run["machine"]
        shift = max(rows, key=lambda row: abs(row["here"] - row["there"]))
        on = f" ({machine['cores']} cores, {machine['vectors']}, {machine['gflops']} GFLOP/s)" if machine else ""
        told.append(
            [
                name + on,
                str(len(rows)),
                str(sum(row["verdict_there"] == row["verdict_here"] for row in rows)),
                str(sum(row["low"] is not None and row["low"] <= row["here"] <= row["high"] for row in rows)),
                f"{abs(shift['here'] - shift['there']):.4f} ({shift['endpoint']})",
            ]
        )
    return f"{to_markdown(told)}\n"


def shown(root: Path, name: str, stage: str) -> list[Path]:
    """Figures and tables of a stage."""
    folder = root / "figures" / name / stage
    return sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
