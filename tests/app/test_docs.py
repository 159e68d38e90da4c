"""The pages under docs/ say what the results, the code and the fault tests say; their links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from tiny_project import byte_tokenizer

from masksae import mask_tokens
from masksae.study.profile import Profile
from masksae.study.report import results

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_generated_pages_are_those_that_the_code_writes():
    """`python tools/pages.py` writes them."""
    for path, text in runpy.run_path(str(ROOT / "tools/pages.py"))["pages"]().items():
        assert path.read_text() == text, path.name


def test_the_card_names_every_figure_table_and_number():
    card = (ROOT / "REPRODUCE.md").read_text()
    aside = ("times.json", "made_of.json")  # what stands beside the results
    for folder in ("results", "figures"):
        for name in results.present(ROOT):
            files = [path for path in (ROOT / folder / name).rglob("*") if path.suffix in (".json", ".png", ".md")]
            missing = [path for path in files if str(path.relative_to(ROOT)) not in card and path.name not in aside]
            assert files and not [path for path in missing if path.parent.name != "pairs"], missing
    links = set(re.findall(r"\]\(([^)#]+)\)", card))
    assert len(links) > 20 and all((ROOT / link).exists() for link in links)


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


def test_the_code_on_the_page_of_the_module_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGES["library"], re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_what_is_said_of_the_pitfalls_is_what_the_code_does():
    page = " ".join(PAGES["pitfalls"].split())
    [l0] = re.findall(r"^\| BatchTopK \| kept \| as trained \| ([\d.]+) \|", PAGES["synthetic"], re.MULTILINE)
    assert f"{l0} instead of 12" in page
    from masksae.data.blocks import REPEAT
    from masksae.data.models import LARGEST_PAGE_LOSS

    assert f"share {REPEAT} tokens" in page and f"below {LARGEST_PAGE_LOSS:.0f} nats" in page


def test_every_example_of_the_page_on_own_models_runs_in_a_test():
    """Those inside other trainers need these: `make test-peers`."""
    examples = re.findall(r"<!-- runs in (.*): (\w+) -->\n```python\n", PAGES["own"])
    assert len(examples) == PAGES["own"].count("```python") >= 5
    for paths, name in examples:
        assert all(f'"{name}"' in (ROOT / path).read_text() for path in paths.split(" and ")), name


def test_masked_blocks_are_cut_from_text_as_the_page_does():
    [block] = re.findall(r": blocks -->\n```python\n(.*?)```", PAGES["own"], re.DOTALL)
    texts = ["the cat sat on a mat " * 9, "too short", "seven dogs ran past it " * 6]
    names = {"tokenizer": byte_tokenizer(), "texts": texts, "mask_token": "<mask>", "context_size": 32}
    exec(block, names)
    blocks, masked = torch.tensor(names["blocks"]), names["masked"]
    expected, where = mask_tokens(blocks, p=0.3, token_id=1, seed=0, spare=(0,))
    assert masked["input_ids"] == expected.tolist() and masked["is_masked"] == where.tolist()
    assert blocks.shape == (6 + 4, 32) and (blocks[:, 0] == 0).all() and not where[:, 0].any()
    names["mask_token"] = "<bos>"
    with pytest.raises(AssertionError, match="see below"):  # `exclude_special_tokens=[bos_id]` would be the other arm
        exec(block, names)


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
