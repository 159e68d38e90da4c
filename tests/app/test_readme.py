"""The README's code runs, its links lead somewhere, it says what the tree is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


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
