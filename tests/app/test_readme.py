"""The README's numbers are those of the committed results, its code runs, its links lead somewhere."""

import re
from pathlib import Path
from statistics import mean

import pytest

from masksae.files import read_json
from masksae.study.report import effects
from masksae.study.stats import Effect

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TEXT = " ".join(README.split())


def short(value: float, digits: int = 3) -> str:
    """As the README writes numbers: .213, −.027."""
    return re.sub(r"^(−?)0\.", r"\1.", f"{value:.{digits}f}".replace("-", "−"))


def told(e: Effect, first: bool = False) -> str:
    sign = "+" if e.difference > 0 else ""
    interval = f"{'95 % ' if first else ''}{short(e.low)} to {short(e.high)}"
    return f"{short(e.baseline)} → {short(e.treated)} ({sign}{short(e.difference)}, {interval}"


def laptop(name: str):
    return read_json(ROOT / f"results/laptop/{name}.json")


def letters(mode: str, grid: str = "matryoshka20") -> Effect:
    return effects.effect(effects.merge(laptop("absorption"), mode=mode), "mean_full", grid, "masked")


def test_the_claims_are_told_as_they_were_measured():
    claims = laptop("claims")
    assert told(letters("as_trained"), first=True) in TEXT and told(letters("matched")) in TEXT
    for key in ("C2", "C3", "C5"):
        assert told(Effect.from_dict(claims[key])) in TEXT, key
    assert f"{short(claims['C2']['items_low'])} to {short(claims['C2']['items_high'])}" in TEXT
    assert short(claims["C1"]["p_holm"]) in TEXT and claims["C1"]["p_holm"] > 0.05
    assert f"{short(claims['C1']['baseline'])} → {short(claims['C1']['treated'])}" in TEXT
    assert [claims[key]["verdict"] for key in ("C1", "C4")] == ["contradicted"] * 2 and '"contradicted"' in TEXT
    assert [claims[key]["verdict"] for key in ("C2", "C3")] == ["inconclusive"] * 2
    rise = (1 - claims["C5"]["treated"]) / (1 - claims["C5"]["baseline"]) - 1
    assert f"rises by {100 * rise:.0f} %" in TEXT


def test_the_grids_of_c4_are_told_as_they_were_measured():
    grids = laptop("claims")["C4"]["grids"]
    found = [verdict for grid in grids.values() for verdict in grid.values()]
    assert len(grids) == 3 and found.count("contradicted") == 2 and found.count("inconclusive") == 7
    assert sum(grid["C1"] == "contradicted" for grid in grids.values()) == 2
    assert all(letters("as_trained", grid).low < 0 < letters("as_trained", grid).high for grid in grids)


def test_what_is_wrong_with_the_results_is_said():
    """Until a run of another version is committed: the README's paragraph and this test go then."""
    rows = [r for r in laptop("reconstruction") if r["grid"] == "matryoshka20"]
    average = lambda mode, arm, key: mean(r[key] for r in rows if (r["mode"], r["arm"]) == (mode, arm))
    dead = [average("matched", arm, "dead_latents") for arm in ("masked", "unmasked")]
    assert f"{dead[0]:.0f} of 2,048" in TEXT and f"({dead[1]:.0f} unmasked)" in TEXT
    l0 = [average("as_trained", arm, "l0") for arm in ("unmasked", "masked")]
    assert f"(L0 {l0[0]:.0f} and {l0[1]:.0f})" in TEXT
    assert all(words in TEXT for words in ("results of version 0.2", "one draw of masks", "never ran"))
    f1 = [r["f1"] for row in laptop("absorption") if row["grid"] == "matryoshka20" for r in row["letters"]]
    assert mean(f1) == pytest.approx(0.3, abs=0.02) and "mean F1 about .3" in TEXT


def test_the_readme_is_short():
    words = [word for word in re.sub(r"\]\([^)]*\)", "]", README).split() if re.search(r"\w", word)]
    assert len(words) <= 1100, len(words)


def test_the_tree_is_the_tree():
    tree = README[README.index("## The tree") : README.index("## Limits")]
    for name in re.findall(r"^ {6}(\w+)/ ", tree, re.MULTILINE):
        assert (ROOT / "masksae" / name).is_dir(), name
    for name in re.findall(r"(\w+\.py)", tree.replace("tools/pages.py", "")):
        assert (ROOT / "masksae" / name).is_file(), name


def test_downloads_are_those_of_the_data_page():
    page = (ROOT / "docs/data.md").read_text()
    for name, size in re.findall(r"^\| `([\w-]+)`[^|]*\|.*\| (\d+ MB) \|$", README, re.MULTILINE):
        assert f"| `{name}` | {size} |" in page, name


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("page", ["README.md"])
def test_links_lead_somewhere(page):
    targets = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()))
    assert targets and all(t.startswith("https://") or ((ROOT / page).parent / t).exists() for t in targets)


def test_every_profile_is_described():
    for path in (ROOT / "masksae/profiles").glob("*.yaml"):
        assert f"| `{path.stem}` |" in README or f"| `{path.stem}` (default) |" in README
