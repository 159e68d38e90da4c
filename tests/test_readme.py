"""The README's numbers are those of the committed results, its code runs, its links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

from masksae.files import read_json
from masksae.study.report import tables
from masksae.study.stats import Effect

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def verdict_rows(claims: dict) -> list[str]:
    rows = []
    for key, claim in claims.items():
        effect = "–"
        if "difference" in claim:
            effect = tables.describe(Effect.from_dict(claim))
        elif "grids" in claim:
            cell = lambda verdicts: ", ".join(f"{key} {verdict}" for key, verdict in verdicts.items())
            effect = "; ".join(f"{grid}: {cell(verdicts)}" for grid, verdicts in claim["grids"].items())
        rows.append(f"| {key} {claim['claim']} | {claim['verdict']} | {effect} |")
    return rows


def test_verdicts_are_those_of_the_results():
    for row in verdict_rows(read_json(ROOT / "results/laptop/claims.json")):
        assert row in README


def test_what_is_said_of_the_noise_is_what_was_measured():
    """More than half of the difference's variance is the evaluation's; one evaluation of one SAE is off by .02 to .03."""
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
    assert told == [".72", ".77", ".25", ".32"] and all(number in README for number in told)
    assert [f"{ev[key]:.3f}" for key in ("baseline", "treated")] == ["0.868", "0.852"]
    effects = {(e["arm"], e["kind"], e["equal"]): e for e in read_json(ROOT / "results/gemma/along_effects.json")}
    assert f"{effects['dropped', 'cross-token (what came before)', 'steps']['treated']:.2f}" == "0.27"
    assert all(e["low"] < 0 < e["high"] for (_, _, equal), e in effects.items() if equal == "EV")
    matched = lambda name: [r for r in read_json(ROOT / f"results/gemma/{name}.json") if r["mode"] == "matched"]
    f1 = [letter["f1"] for row in matched("absorption") for letter in row["letters"]]
    assert 0.005 < sum(f1) / len(f1) < 0.025
    dead = [row["dead_latents"] / 2048 for row in matched("reconstruction")]
    assert 0.6 < sum(dead) / len(dead) < 0.7


def test_the_page_on_scale_says_what_a_plan_says():
    from masksae import load_profile
    from masksae.app.plan import Plan
    from masksae.app.plan_text import costs

    beyond = runpy.run_path(ROOT / "tools/scale.py")["beyond"]
    page = (ROOT / "docs/scale.md").read_text()
    for name in ("paper", "paper-gemma"):
        assert costs(Plan(load_profile(name))) in page
    assert beyond(load_profile("paper-gemma")) in page


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
