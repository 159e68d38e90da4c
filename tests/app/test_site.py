"""The site of a small run: every page, figure and link; and the checks themselves, on pages with planted faults."""

import re

import nbformat
import pytest
from browser import CHROMIUM, dead_links, too_wide, troubles

from masksae.app import site
from masksae.errors import DataError
from masksae.files import write_json, write_text

PNG = (
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
PIXEL = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """What a run of the smoke profile leaves, in small."""
    write_text(tmp_path / "dvc.yaml", "")
    cells = [
        nbformat.v4.new_markdown_cell("# 04 A <title>"),
        nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "2"})]),
    ]
    (tmp_path / "build/smoke").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "build/smoke/04_absorption.ipynb")
    figures = tmp_path / "figures/smoke/04_absorption"
    write_text(figures / "along.svg", PIXEL)
    write_text(figures / "along.txt", "A caption with <brackets>.\n")
    write_text(figures / "along.md", "| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    write_text(
        tmp_path / "docs/own.md", "# Own\n\n[other](other.md#there), [code](../setup.py), ![p](../figures/p.png)\n"
    )
    write_text(tmp_path / "docs/other.md", "# Other\n\n## There\n")
    (tmp_path / "figures/p.png").write_bytes(bytes.fromhex(PNG))
    effect = dict(baseline=0.2, treated=0.1, difference=-0.1, low=-0.2, high=0.0, pairs=2, detectable=0.3)
    effect |= dict.fromkeys(("p_value", "size", "items", "items_low", "items_high"))
    claims = {"C1": {"verdict": "inconclusive"} | effect, "C2": {"verdict": "not measured", "reason": "No result."}}
    write_json(tmp_path / "results/smoke/claims.json", claims)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pages_link_figures_to_their_notebook_and_parameters(project):
    index = site.build()
    front, gallery = index.read_text(), (index.parent / "smoke/index.html").read_text()
    assert "0.200 → 0.100" in front and "No result." in front and "smoke/figures/04_absorption/along.svg" in front
    assert 'href="04_absorption.html"' in gallery and 'href="parameters.html"' in gallery
    assert "A caption with &lt;brackets&gt;." in gallery and "<td>2</td>" in gallery
    assert "train_tokens" in (index.parent / "smoke/parameters.html").read_text()
    page = (index.parent / "smoke/04_absorption.html").read_text()
    assert "<h1" in page and "@BODY@" not in page and "http" not in page.split("<main>")[0]  # nothing from a network
    own = (index.parent / "docs/own.html").read_text()
    assert (
        'href="other.html"' in own
        and "setup.py" not in own
        and (index.parent / "docs" / re.search(r'src="(.*?)"', own)[1]).exists()
    )
    assert 'href="docs/own.html"' in front and 'href="../docs/own.html"' in page
    assert (index.parent / "api/masksae/metrics/contexts.html").exists()
    assert dead_links(index.parent) == []


def test_the_same_run_gives_the_same_site(project):
    pages = lambda: {path.name: path.read_bytes() for path in (project / "build/site").rglob("*.html")}
    site.build()
    first = pages()
    site.build()
    assert pages() == first


def test_without_a_run_it_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="make repro"):
        site.build(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_finds_no_fault(project):
    folder = site.build().parent
    pages = [str(path.relative_to(folder)) for path in folder.rglob("*.html")]
    assert len(pages) > 20 and troubles(folder, pages) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_page_is_wider_than_a_phone(project):
    """With a word of code that does not break by itself, as in the guide."""
    write_text(project / "docs/own.md", f"# Own\n\nA `{'explore.Explorer(run)' * 4}`, and {'https://a.b/' * 9}\n")
    folder = site.build().parent
    write_text(
        folder / "planted.html", '<meta name="viewport" content="width=device-width"><div style="width:500px">x</div>'
    )
    pages = [str(path.relative_to(folder)) for path in folder.rglob("*.html") if "masksae" not in path.parent.parts]
    assert "docs/own.html" in pages
    assert [wide.partition(":")[0] for wide in too_wide(folder, pages)] == ["/planted.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_planted_faults_are_found(tmp_path):
    write_text(tmp_path / "a.html", '<img src="gone.png"><a href="b.html#here">b</a><script>nothing()</script>')
    write_text(tmp_path / "b.html", '<p id="there"></p><script>console.error("planted")</script>')
    found = " ".join(troubles(tmp_path, ["a.html", "b.html", "c.html"]))
    assert all(word in found for word in ("404 for /gone.png", "404 for /c.html", "nothing is not defined", "planted"))
    assert dead_links(tmp_path) == ["a.html: gone.png", "a.html: b.html#here"]
