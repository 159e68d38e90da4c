"""The pages under docs/ say what the results, the code and the fault tests say; their links lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

from masksae.files import read_json
from masksae.study.profile import Profile
from masksae.study.report import reliability

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    targets = set(re.findall(r"\]\(([^)#]+)\)", PAGES[name]))
    assert all(t.startswith("https://") or (ROOT / "docs" / t).exists() for t in targets)
    assert f"(docs/{name}.md)" in (ROOT / "README.md").read_text()


def test_what_is_said_of_the_metrics_is_what_was_measured():
    table = reliability.reliability("laptop").set_index("score")
    assert reliability.page_table(table.reset_index()) in PAGES["metrics"]
    spread = table["between seeds"]
    assert 0.01 / spread["explained variance"] == pytest.approx(20, abs=3)
    assert spread["absorption, first letters"] == pytest.approx(0.02, abs=0.004)
    assert spread["shifted texts, 16 latents"] == pytest.approx(0.02, abs=0.004)
    assert 0.03 < table.loc["shifted texts, 16 latents", "seen from"] < 0.05
    rows = read_json(ROOT / "results/laptop/noise.json")["components"]
    of_seed = next(r["share"] for r in rows if r["of"] == "masked less unmasked" and r["source"] == "seed")
    assert of_seed < 0.5


def test_what_is_said_of_the_pitfalls_is_what_was_measured():
    page = PAGES["pitfalls"]
    rows = read_json(ROOT / "results/laptop/reconstruction.json")
    l0 = [r["l0"] for r in rows if (r["mode"], r["arm"], r["grid"]) == ("as_trained", "masked", "matryoshka20")]
    assert f"{sum(l0) / len(l0):.0f} instead of 20" in page
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
