"""The site of a small run: every page, figure and link; and the checks themselves, on pages with planted faults."""

import re
import shutil

import nbformat
import pytest
from browser import CHROMIUM, dead_links, opened, said, too_wide, troubles

import masksae
from masksae.app import site
from masksae.errors import DataError
from masksae.files import write_json, write_text

PNG = (
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
PIXEL = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
README = """# masksae

[![badge](https://example.org/badge.svg)](https://example.org)
[own](docs/own.md), [notebook](notebooks/04_absorption.ipynb),
[not run](notebooks/05_probing.ipynb)

![headline](figures/p.png)
"""
LONG = f"A `{'explore.Explorer(run)' * 4}`, and {'https://a.b/' * 9}"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def lay(root):
    """What a run of the smoke profile leaves, in small."""
    output = nbformat.v4.new_output("execute_result", {"text/plain": "2"})
    cells = [
        nbformat.v4.new_markdown_cell("# 04 A *title*\n\nWords."),
        nbformat.v4.new_code_cell("1 + 1", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_code_cell('run.save_result("absorption", 1 + 1)', outputs=[output]),
        nbformat.v4.new_code_cell('style.save_figure(run, "04_absorption/along", figure, "A caption")'),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    write_text(root / "build/smoke/04_absorption.ipynb", nbformat.writes(notebook))
    figures = root / "figures/smoke/04_absorption"
    write_text(figures / "along.svg", PIXEL)
    write_text(figures / "along.txt", "A caption with <brackets>, *stars* and a_b_.\n")
    write_text(figures / "old.svg", PIXEL)
    write_text(figures / "along.md", "| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    write_text(root / "figures/smoke/10_explore/latents.html", "<!doctype html><title>Latents</title><p>s and t")
    write_text(root / "build/mine/04_absorption.failed.ipynb", "{}")
    (root / "figures/p.png").write_bytes(bytes.fromhex(PNG))
    write_text(root / "README.md", README)
    table = "[table](../figures/smoke/04_absorption/along.md)"
    write_text(root / "docs/own.md", f"# Own\n\n[other](other.md#there), {table}, ![p](../figures/p.png)\n\n{LONG}\n")
    write_text(root / "docs/other.md", "# Other\n\n## There\n\n[front](../README.md)\n")
    effect = dict(baseline=0.2, treated=0.1, difference=-0.1, low=-0.2, high=0.0, pairs=2, detectable=0.3)
    effect |= dict.fromkeys(("p_value", "size", "items", "items_low", "items_high")) | {"score": "mean_full"}
    claims = {"C1": {"verdict": "inconclusive"} | effect, "C2": {"verdict": "not measured", "reason": "No <result>."}}
    write_json(root / "results/smoke/claims.json", claims)
    write_json(root / "results/laptop/claims.json", {"C1": {"verdict": "supported"} | effect})
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = lay(tmp_path_factory.mktemp("project"))
    assert site.build(root) == root / "build/site/index.html"
    return root


@pytest.fixture(scope="module")
def pages(project):
    return {str(p.relative_to(project / "build/site")): p.read_text() for p in project.glob("build/site/**/*.html")}


def test_claims_figures_notebooks_and_parameters_lead_to_each_other(project, pages):
    front, profile, chapter = pages["index.html"], pages["smoke/index.html"], pages["smoke/04_absorption.html"]
    assert all("0.200 → 0.100" in page and "No &lt;result&gt;." in page for page in (front, profile))
    figure = re.search(r"(?s)<figure.*?</figure>", profile)[0]
    assert "A caption with &lt;brackets&gt;, *stars* and a_b_." in figure and "along.svg" in figure
    cell = re.search(r'href="04_absorption.html#(cell-[\w-]+)"', figure)[1]
    assert 0 < chapter.index("save_result") < chapter.index(f'id="{cell}"') < chapter.index("save_figure")
    assert 'href="parameters.html"' in figure and 'href="../claims.html#c1"' in figure
    assert 'href="../claims.html#c1"' in chapter and 'href="parameters.html"' in chapter
    [c1, c2] = (re.search(rf'(?s)<section id="{c}.*?</section>', pages["claims.html"])[0] for c in ("c1", "c2"))
    for link in ("smoke/index.html", "smoke/04_absorption.html", "smoke/index.html#figure-smoke-04-absorption-along"):
        assert f'href="{link}"' in c1
    row = re.search(r"(?s)<tr[^>]*><td><p>laptop</p>.*?</tr>", c1)[0]
    assert "supported" in row and "0.200 → 0.100" in row and "href" not in row  # committed, and not run here
    assert (
        "laptop" not in c2 and "old.svg" not in profile + front and not any(name.startswith("mine/") for name in pages)
    )
    assert "not measured" in c2 and "04_absorption" not in c2
    assert "<td><p>2</p></td>" in profile and "train_tokens" in pages["smoke/parameters.html"]


def test_code_is_folded_and_outputs_are_shown(pages):
    chapter = pages["smoke/04_absorption.html"]
    assert chapter.count('<details class="admonition hide above-input">') == 2  # the injected cell is left out
    assert re.search(r"(?s)</details>\s*<div class=\"cell_output.*?<span></span>2\n", chapter)


def test_links_of_the_pages_hold_inside_the_site(project, pages):
    assert 'href="smoke/04_absorption.html"' in pages["index.html"] and 'href="docs/own.html"' in pages["index.html"]
    own = pages["docs/own.html"]
    assert 'href="other.html#there"' in own and 'href="../index.html"' in pages["docs/other.html"]
    assert 'href="../figures/smoke/04_absorption/along.html"' in own
    assert dead_links(project / "build/site") == []


def test_the_page_of_latents_is_taken_over_as_it_is_and_linked(project, pages):
    name = "figures/smoke/10_explore/latents.html"
    assert pages[name] == (project / name).read_text(encoding="utf-8")
    assert f'href="../{name}"' in pages["smoke/index.html"]


def test_nothing_comes_from_a_network(project, pages):
    for name, page in pages.items():
        assert not re.findall(r'<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//', page), (
            name
        )
    assert not [
        p for p in project.glob("build/site/**/*.css") if re.search(r"(url\(|@import)[\"' ]*https?:", p.read_text())
    ]


def test_every_public_name_has_its_docstring_and_example(pages):
    for name, home in masksae._HOME.items():
        where = f"{home}.{name}" if name == "MATRYOSHKA" else f"masksae.{name}"
        assert f'id="{where}"' in pages[f"api/{home}.html"], name
    page = pages["api/masksae.masking.html"]
    assert re.search(r"(?s)<dt><code[^>]*><span class=\"pre\">ids</span></code></dt>\s*<dd><p>int64 \[n, s\]", page)
    assert "2**63 - 1" in page and '<div class="doctest' in page
    assert "explained_variance" in pages["api/masksae.metrics.reconstruction.html"]


def test_the_same_run_gives_the_same_site(project):
    files = lambda: {p: p.read_bytes() for p in (project / "build/site").rglob("*") if p.is_file()}
    first = files()
    site.build(project)
    assert files() == first and not list((project / "build").glob(".*"))


def test_a_fault_is_told_and_leaves_the_site_as_it_was(project, monkeypatch):
    monkeypatch.setattr(site, "_api", lambda folder: [])  # saves seconds
    before, page = (project / "build/site/index.html").read_bytes(), project / "docs/own.md"
    good = page.read_text()
    write_text(page, "# Own\n\n[gone](gone.md)\n")
    try:
        with pytest.raises(DataError, match="docs/own.md:3.*gone.md"):
            site.build(project)
    finally:
        write_text(page, good)
    assert (project / "build/site/index.html").read_bytes() == before


def test_a_profile_that_cannot_be_read_any_longer_is_left_out_in_a_sentence(project, monkeypatch, capsys):
    monkeypatch.setattr(site, "_render", lambda source, pages: 1 / 0)  # all is laid out by then
    for name, made_for in ("moved", "gone.yaml"), ("changed", "changed.yaml"), ("quoted", "'a b/quoted.yaml'"):
        write_text(project / f"build/{name}/params.yaml", f"profile_file: {made_for!r}\n")
        write_text(
            project / f"build/{name}/04_absorption.ipynb", (project / "build/smoke/04_absorption.ipynb").read_text()
        )
    write_text(project / "changed.yaml", "name: changed\nmodell: {}\n")
    text = (site.PROFILES / "smoke.yaml").read_text().replace("name: smoke", "name: quoted", 1)
    write_text(project / "a b/quoted.yaml", text)
    write_text(project / "build/bare/04_absorption.ipynb", "{}")
    try:
        with pytest.raises(ZeroDivisionError):
            site.build(project)
    finally:
        for name in ("moved", "changed", "quoted", "bare"):
            shutil.rmtree(project / "build" / name)
    told = capsys.readouterr().err
    assert all(f"build/{name} is left out" in told for name in ("moved", "changed", "bare")), told
    assert "gone.yaml" in told and "modell" in told and "build/quoted" not in told and "build/smoke" not in told


def test_a_site_that_cannot_be_built_is_no_fault_of_a_run(tmp_path, monkeypatch):
    def fault():
        raise DataError("docs/own.md:3: no link")

    monkeypatch.chdir(tmp_path)
    assert "holds no executed notebook" in site.where_to_read()
    monkeypatch.setattr(site, "build", fault)
    told = site.where_to_read()
    assert "docs/own.md:3" in told and "make site" in told


def test_without_a_run_it_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="make repro"):
        site.build(tmp_path)


@pytest.mark.slow
@needs_chromium
def test_a_browser_finds_no_fault(project, pages):
    assert len(pages) > 25 and troubles(project / "build/site", list(pages)) == []


@pytest.mark.slow
@needs_chromium
def test_no_page_is_wider_than_a_phone(project, pages):
    """With a word of code that does not break by itself, as in the guide."""
    folder = project / "build/site"
    wide = '<meta name="viewport" content="width=device-width"><div style="width:500px">x</div>'
    write_text(folder / "planted.html", wide)
    try:
        found = too_wide(folder, [*pages, "planted.html"])
    finally:
        (folder / "planted.html").unlink()
    assert [page.partition(":")[0] for page in found] == ["/planted.html"]


@pytest.mark.slow
@needs_chromium
def test_a_reader_searches_from_the_disk_and_in_the_dark(project):
    """As somebody does who opens index.html in a folder."""
    found = opened(f"{(project / 'build/site/search.html').as_uri()}?q=absorption")
    results = re.search(r'(?s)<div id="search-results">(.*)', found.stdout)[1]
    assert "04 A title" in results and "masksae.metrics.absorption" in results and said(found.stderr) == []
    front = (project / "build/site/index.html").as_uri()
    theme = lambda *options: re.search(r'<html[^>]*data-theme="(\w+)"', opened(front, *options).stdout)[1]
    assert (theme(), theme("--blink-settings=preferredColorScheme=0")) == ("light", "dark")


@needs_chromium
def test_planted_faults_are_found(tmp_path):
    write_text(tmp_path / "a.html", '<img src="gone.png"><a href="b.html#here">b</a><script>nothing()</script>')
    write_text(tmp_path / "b.html", '<p id="there"></p><script>console.error("planted")</script>')
    found = " ".join(troubles(tmp_path, ["a.html", "b.html", "c.html"]))
    assert all(word in found for word in ("404 for /gone.png", "404 for /c.html", "nothing is not defined", "planted"))
    assert dead_links(tmp_path) == ["a.html: gone.png", "a.html: b.html#here"]
