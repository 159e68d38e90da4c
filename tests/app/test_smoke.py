"""The whole pipeline on the smoke profile, then every notebook under nbval, and nothing is left dirty. The slow part:
minutes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, dead_links, troubles

from masksae.files import read_json
from masksae.study.report import results as report
from masksae.study.report.claims import verdict_table

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)


def git_status():
    result = run("git", "status", "--porcelain")
    return result.stdout if result.returncode == 0 else None


@pytest.fixture(scope="module")
def smoke():
    """Run the pipeline; give git's status before."""
    before = git_status()
    result = run(sys.executable, "-m", "masksae", "repro", "smoke")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return before


def test_results_are_there_and_plausible(smoke):
    results = ROOT / "results/smoke"
    claims = read_json(results / "claims.json")
    assert set(claims) == {"C1", "C2", "C3", "C4", "C5", "R"} and claims["C1"]["pairs"] == 2
    rows = read_json(results / "reconstruction.json")
    matched = [row for row in rows if row["mode"] == "matched"]
    assert len(matched) == 13 and all(0.1 < row["ev_centred"] < row["ce_score"] <= 1 for row in matched)
    plain = [row for row in matched if row["grid"] == "topk20"]
    assert len(plain) == 7 and all(row["ev_centred"] > 0.5 and row["dead_in_training"] < 50 for row in plain)
    assert all(row["ce_original"] < 4.5 < row["ce_zero"] for row in matched)
    letters = read_json(results / "absorption.json")[0]["letters"]
    assert len(letters) >= 15 and all(item["probe_f1"] > 0.6 for item in letters)
    share = read_json(results / "data.json")["masked_share"]
    assert share["unmasked"] == 0 and share["kept"] == pytest.approx(0.3 * 127 / 128, abs=0.01)


def test_pictures_and_executed_notebooks_are_there(smoke):
    assert len(list((ROOT / "figures/smoke").rglob("*.svg"))) >= 6
    assert len(list((ROOT / "build/smoke").glob("[0-9]*.ipynb"))) == len(list((ROOT / "notebooks").glob("*.ipynb")))


def test_notebooks_validate(smoke):
    command = (
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-cell-timeout=1800",
        "-n",
        "2",
        "--dist",
        "loadfile",
    )
    result = run(sys.executable, "-m", "pytest", *command, ROOT / "notebooks")
    assert result.returncode == 0, result.stdout[-6000:]


def test_nothing_is_dirty_afterwards(smoke):
    assert git_status() == smoke  # in a fresh clone: both empty
    status = run(sys.executable, "-m", "masksae", "status", "smoke")
    assert status.returncode == 0 and "up to date" in status.stdout, status.stdout


def test_somebodys_sae_is_explored(smoke, tmp_path):
    """One of the run's SAEs, as SAELens would bring it: the command, from its folder to a page."""
    command = (sys.executable, "-m", "masksae")
    sae = sorted((ROOT / "build/smoke/saes/kept").iterdir())[0]
    assert run(*command, "export", sae, tmp_path / "theirs", "--to", "saelens").returncode == 0
    options = ("--profile", "smoke", "--letter", "s", "--out", tmp_path / "out", "--json")
    result = run(*command, "explore", tmp_path / "theirs", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    story = json.loads(result.stdout)
    assert story["parent"] == "starts with S" and story["tested"] > 50 and 0 < story["f1"] <= 1
    assert all(row["word"].lower().startswith("s") and row["absorber"] not in story["main"] for row in story["missed"])
    page = Path(story["page"]).read_text()
    assert all(row["word"] in page for row in sorted(story["missed"], key=lambda row: -row["carried"])[:3])


def test_the_site_has_no_dead_links_and_opens_in_a_browser(smoke):
    site = ROOT / "build/site"
    pages = [str(path.relative_to(site)) for path in site.rglob("*.html")]
    assert {"index.html", "smoke/index.html", "smoke/04_absorption.html", "smoke/10_explore.html"} <= set(pages)
    assert dead_links(site) == []
    if CHROMIUM:
        assert troubles(site, pages) == []


def test_the_page_of_results_tells_every_verdict_and_shows_pictures_that_are_there(smoke, monkeypatch):
    monkeypatch.setattr(report, "SHOWN", ("smoke",))
    page, screen = report.page(ROOT), report.first_screen(ROOT)
    claims = read_json(ROOT / "results/smoke/claims.json")
    for row in verdict_table(claims):
        assert row["unmasked → treated"] in page and f"| {row['claim']} | {row['endpoint']}".rstrip() in page
    assert all(f"{key}: " in screen for key in claims)
    shown = re.findall(r"\]\(\.\./([^)]+)\)", page) + re.findall(r"!\[[^]]*\]\(([^)]+)\)", screen)
    assert len(shown) > 4 and all((ROOT / path).exists() for path in shown)
    kept = re.findall(r"^\| kept \| same token .*$", page[page.index("## What was predicted") :], re.MULTILINE)
    assert len(kept) == 2 and "–" not in "".join(kept), "a world or the model has nothing on the arm"
