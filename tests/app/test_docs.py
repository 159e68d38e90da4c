"""The pages under docs/ say what the results, the code and the fault tests say; their links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from masksae.files import read_json
from masksae.study.profile import Profile
from masksae.study.report import effects, reliability

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_generated_pages_are_those_that_the_code_writes():
    """`python tools/pages.py` writes them."""
    for path, text in runpy.run_path(str(ROOT / "tools/pages.py"))["pages"]().items():
        assert path.read_text() == text, path.name


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    targets = set(re.findall(r"\]\(([^)#]+)\)", PAGES[name]))
    assert all(t.startswith("https://") or (ROOT / "docs" / t).exists() for t in targets)
    assert f"(docs/{name}.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_are_there(name):
    named = set(
        re.findall(r"\b(?:masksae|tests|benchmarks|notebooks|tools)/[\w./]+\.(?:py|sh|ipynb|yaml|html)\b", PAGES[name])
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_what_is_said_of_the_metrics_is_what_was_measured():
    table = reliability.reliability("laptop").set_index("score")
    assert reliability.page_table(table.reset_index()) in PAGES["metrics"]
    spread = table["between seeds"]
    assert 0.01 / spread["explained variance"] == pytest.approx(20, abs=3)
    assert spread["absorption, first letters"] == pytest.approx(0.02, abs=0.004)
    assert spread["shifted texts, 16 latents"] == pytest.approx(0.02, abs=0.004)
    assert 0.05 < table.loc["shifted texts, 16 latents", "seen from"] < 0.06
    rows = read_json(ROOT / "results/laptop/noise.json")["components"]
    of_seed = next(r["share"] for r in rows if r["of"] == "masked less unmasked" and r["source"] == "seed")
    assert of_seed < 0.5


def test_what_is_said_of_the_noise_is_what_was_measured():
    """More than half of the difference's variance is the evaluation's; one evaluation of one SAE is off by .02 to
    .03."""
    rows = read_json(ROOT / "results/laptop/noise.json")["components"]
    share = {row["source"]: row["share"] for row in rows if row["of"] == "masked less unmasked"}
    assert share["seed"] < 0.5 and max(share, key=lambda source: (source != "seed", share[source])) == "seed x split"
    for arm in ("unmasked", "masked"):
        off = sum(row["sd"] ** 2 for row in rows if row["of"] == arm and row["source"] != "seed") ** 0.5
        assert 0.02 < off < 0.03


def test_what_is_said_of_absorption_along_training_is_what_was_measured():
    found = {(e["arm"], e["kind"][:13], e["equal"]): e for e in read_json(ROOT / "results/laptop/along_effects.json")}
    same, cross = "same token (f", "cross-token ("
    nothing = lambda e: e["low"] < 0 < e["high"]
    assert found["masked", same, "steps"]["low"] > 0 and nothing(found["masked", same, "EV"])
    for arm, kind in (
        ("dropped", same),
        ("dropped", cross),
        ("masked", cross),
        ("p10", same),
        ("fewer_tokens", same),
    ):
        assert nothing(found[arm, kind, "steps"])
    assert found["dropped", cross, "steps"]["detectable"] < 0.035
    assert found["masked", cross, "steps"]["detectable"] < 0.085
    rises = {arm: e["difference"] for (arm, kind, equal), e in found.items() if kind == same and equal == "steps"}
    assert max(rises, key=rises.get) == "p50"
    curve = [row for row in read_json(ROOT / "results/laptop/along.json") if row["arm"] == "unmasked"]
    mean = lambda step: sum(row["letters"] for row in curve if row["step"] == step) / 5
    first, quarter, half, last = sorted({row["step"] for row in curve})
    assert mean(first) < mean(quarter) > mean(half) > mean(last)
    ev = lambda arm: [row["ev_centred"] for row in read_json(ROOT / "results/laptop/along.json") if row["arm"] == arm][
        -5:
    ]
    assert 0.035 < sum(ev("unmasked")) / 5 - sum(ev("dropped")) / 5 < 0.045


def test_what_is_said_of_single_parents_is_what_was_measured():
    from masksae.study.report import curves

    rows = read_json(ROOT / "results/laptop/along.json")
    done = curves.finished(rows)
    mean = lambda arm, parent: sum(r["contexts_items"][parent] for r in done if r["arm"] == arm) / 5
    for arm in ("masked", "dropped"):
        for parent in ("the", "and", "of"):
            assert 0.2 < mean(arm, parent) / mean("unmasked", parent) < 0.67
        assert all(mean(arm, parent) > mean("unmasked", parent) for parent in ("a number", "a preposition"))
        assert all(row["p_holm"] > 0.05 for row in curves.by_parent(rows, arm))


def test_what_is_said_of_the_second_model_is_what_was_measured():
    claims = read_json(ROOT / "results/gemma/claims.json")
    letters, cross, ev = claims["C1"], claims["C1"]["cross_token"], claims["C5"]
    told = [
        f"{value:.2f}"[1:] for value in (letters["baseline"], letters["treated"], cross["baseline"], cross["treated"])
    ]
    assert told == [".72", ".77", ".25", ".32"] and all(number in PAGES["results"] for number in told)
    assert [f"{ev[key]:.3f}" for key in ("baseline", "treated")] == ["0.868", "0.852"]
    held_equal = {(e["arm"], e["kind"], e["equal"]): e for e in read_json(ROOT / "results/gemma/along_effects.json")}
    assert f"{held_equal['dropped', 'cross-token (what came before)', 'steps']['treated']:.2f}" == "0.27"
    assert all(e["low"] < 0 < e["high"] for (_, _, equal), e in held_equal.items() if equal == "EV")
    matched = lambda name: [r for r in read_json(ROOT / f"results/gemma/{name}.json") if r["mode"] == "matched"]
    f1 = [letter["f1"] for row in matched("absorption") for letter in row["letters"]]
    assert 0.005 < sum(f1) / len(f1) < 0.025
    for arm in ("unmasked", "masked"):
        dead = [row["dead_latents"] / 2048 for row in matched("reconstruction") if row["arm"] == arm]
        assert 0.6 < sum(dead) / len(dead) < 0.7


def test_what_is_said_of_the_matching_is_what_was_measured():
    """First letters: up with the threshold moved at L0 20 and interpolated, nothing to be seen as trained. Cross-token:
    BatchTopK alone."""
    scores = [read_json(ROOT / f"results/laptop/{name}.json") for name in ("reconstruction", "absorption", "contexts")]
    of = lambda mode, score, grid: effects.effect(effects.merge(*scores, mode=mode), score, grid, "masked")
    for grid in ("matryoshka20", "matryoshka80", "batchtopk20"):
        trained, moved = (of(mode, "mean_full", grid) for mode in ("as_trained", "matched"))
        assert trained.low < 0 < trained.high and (moved.low > 0) == grid.endswith("20")
        for mode in ("as_trained", "matched"):
            cross = of(mode, "context_full", grid)
            assert cross.high < 0 if grid == "batchtopk20" else cross.low < 0 < cross.high
    [row] = effects.interpolated(*scores).to_dict("records")
    assert "0.150 → 0.173 (+0.023" in row["absorption"] and row["absorption"] in PAGES["results"]


def test_what_is_said_of_the_simulation_is_what_it_shows():
    rows = [row for row in read_json(ROOT / "results/laptop/mechanism.json") if row["mode"] == "matched"]
    rows = [row for row in rows if row["k"] == 1.2 and row["n_latents"] == 24]
    average = lambda arm, p, kind: sum(r[kind] for r in rows if (r["arm"], r["p"]) == (arm, p)) / 10
    same, cross = (average("unmasked", 0.0, kind) for kind in ("same", "cross"))
    assert average("masked, dropped", 0.3, "cross") < 0.1 * cross and average("masked, dropped", 0.3, "same") > same
    assert average("masked, kept", 0.3, "same") < 0.01 and average("masked, kept", 0.3, "cross") < 0.5 * cross


def test_what_is_said_of_the_architectures_is_what_was_measured():
    rows = [r for r in read_json(ROOT / "results/architectures/reconstruction.json") if r["mode"] == "as_trained"]
    at = {(row["grid"], row["arm"]): row for row in rows}
    for grid in dict.fromkeys(row["grid"] for row in rows):
        before, after = at[grid, "unmasked"], at[grid, "masked"]
        assert (after["ev_centred"] < before["ev_centred"]) == (grid != "relu20"), grid
        assert after["l0"] == pytest.approx(before["l0"]) if "topk" == grid[:4] else after["l0"] > before["l0"], grid


def test_the_code_on_the_page_of_the_module_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGES["library"], re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_what_is_said_of_the_pitfalls_is_what_was_measured():
    page = " ".join(PAGES["pitfalls"].split())
    rows = read_json(ROOT / "results/laptop/reconstruction.json")
    l0 = [r["l0"] for r in rows if (r["mode"], r["arm"], r["grid"]) == ("as_trained", "masked", "matryoshka20")]
    assert f"{sum(l0) / len(l0):.0f} instead of 20" in page
    dead = lambda arm: [
        r["dead_latents"] for r in rows if (r["mode"], r["arm"], r["grid"]) == ("matched", arm, "matryoshka20")
    ]
    assert f"{sum(dead('masked')) / 5:.0f} of 2,048 latents of the masked arm are silent" in page
    assert f"{sum(dead('unmasked')) / 5:.0f} of the unmasked one's" in page
    last = [r for r in read_json(ROOT / "results/laptop/train.json") if r["grid"] == "matryoshka20"]
    count = lambda arm: sum(r["silent"] for r in last if r["arm"] == arm) / 5
    assert f"last hundred batches {count('masked'):.0f} and {count('unmasked'):.0f} latents" in page
    claims = read_json(ROOT / "results/gemma/claims.json")["C1"]
    assert 0.65 < claims["baseline"] < 0.8 and '"absorption" of .7' in page
    from masksae.data.blocks import REPEAT
    from masksae.data.models import LARGEST_PAGE_LOSS

    assert f"share {REPEAT} tokens" in page and f"below {LARGEST_PAGE_LOSS:.0f} nats" in page


def test_the_profile_of_the_page_is_one():
    [text] = re.findall(r"```yaml\n(.*?)```", PAGES["own"], re.DOTALL)
    profile = Profile(**yaml.safe_load(text))
    assert profile.name == "mine" and len(text.splitlines()) <= 16
    assert [arm.p for arm in profile.arms] == [0.0, 0.3]


def test_as_many_families_are_told_as_are_tested():
    [file] = (ROOT / "tests").rglob("test_families.py")
    [families] = re.findall(r"(?s)^FAMILIES = \{(.*?)^\}", file.read_text(), re.MULTILINE)
    n = len(re.findall(r'^    "\w+": ', families, re.MULTILINE))
    assert f"{n} families" in PAGES["own"] and f"| {n} work;" in PAGES["faults"] and f"{n} families" in CHANGELOG


def test_the_fault_table_is_of_a_full_run():
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| (.+?) \|$", PAGES["faults"], re.MULTILINE)
    tried = {what: int(count.replace(",", "")) for what, count, _ in rows}
    assert len(rows) >= 15 and sum(tried.values()) > 3000
    for word in (
        "SAELens",
        "checkpoint",
        "profile",
        "pickle",
        "disk full",
        "KeyboardInterrupt",
        "SIGINT",
        "Ctrl-C",
        "home",
    ):
        assert any(word in what for what in tried), word
