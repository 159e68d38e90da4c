"""Pages of what was run: `masksae site` turns build/, figures/, results/, docs/ and the docstrings into build/site/.

Sphinx does the work, with MyST-NB for the notebooks and the book theme. What is here lays out what it reads: the pages
of the project where they lie in the project, so that their links hold, and between them pages that are written from
results, which tie claims, figures, notebooks and profiles together. Nothing is executed, and a warning is an error.
The pages open from the disk and need no network.
"""

import inspect
import io
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import yaml

from masksae import progress
from masksae.errors import DataError, MasksaeError
from masksae.files import ANYTHING, PROFILES, atomic_dir, ensure_writable, read_json, repository, write_text
from masksae.study.profile import load_profile
from masksae.study.report.claims import CLAIMS, spoken
from masksae.study.report.effects import describe
from masksae.study.report.labels import score
from masksae.study.report.tables import to_markdown
from masksae.study.stats import Effect

ORDER = ("overnight", "laptop", "gemma", "paper", "smoke")
"""Profiles in the order in which a reader wants them; others follow."""

DOCS = ("results", "method", "preregistration", "metrics", "pitfalls", "own", "own-model", "library", "synthetic")
"""Pages of docs/, likewise."""

OTHER_PAGES = ("REPRODUCE.md", "benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md")

EVERY_CLAIM = "09_paper"
"""The notebook that judges the claims; what else shows a claim is the notebook that saves its score."""

SILENT = {"injected-parameters", "setup"}
"""Tags of cells that say nothing to a reader."""

HEADLINE = ("04_absorption", "along.svg")

ALONE = "10_explore/latents.html"
"""Among the figures of a profile, a page with a script of its own: it is taken over as it is."""

CONFIG = {
    "project": "masksae",
    "extensions": ["myst_nb", "sphinx.ext.autodoc"],
    "html_theme": "sphinx_book_theme",
    "html_title": "masksae",
    "html_theme_options": {
        "home_page_in_toc": True,
        "navbar_persistent": [],  # a second field to search in
        "show_toc_level": 2,
        "use_download_button": False,
        "use_fullscreen_button": False,
    },
    "html_context": {"default_mode": "auto"},
    "html_static_path": ["_static"],
    "html_css_files": ["masksae.css"],
    "html_favicon": "_static/masksae.svg",
    "html_extra_path": ["_extra"],
    "html_copy_source": False,
    "html_show_sphinx": False,
    "html_show_copyright": False,
    "html_show_search_summary": False,  # they are fetched, which no browser does for pages on a disk
    "exclude_patterns": ["docs/*.ipynb"],
    "nb_execution_mode": "off",
    "nb_code_prompt_show": "Code",
    "nb_code_prompt_hide": "Hide code",
    "nb_ipywidgets_js": {},  # they would come from a network
    "myst_enable_extensions": ["attrs_block"],
    "myst_heading_anchors": 4,
    "autodoc_default_options": {"members": True, "member-order": "bysource", "no-value": True},
    "autodoc_typehints": "signature",
    "maximum_signature_line_length": 80,
    "default_role": "code",
}

CSS = """
.bd-content table { font-size: .85rem; display: block; overflow-x: auto; width: fit-content; max-width: 100%; }
.bd-content .cell_output :is(td, th) { padding: .2rem .6rem; text-align: left; vertical-align: top; }
.bd-content img { background: none !important; filter: none !important; }
html[data-theme] .bd-content .cell_output .text_html { background: none !important; color: inherit !important; }
.where { font-size: .85rem; color: var(--pst-color-text-muted); }
.bd-article { overflow-wrap: break-word; }
.bd-article :is(h1, h2, h3), .bd-article :is(h1, h2, h3) code { overflow-wrap: anywhere; }
.bd-content .pre { white-space: pre-wrap; }
.bd-content .cell_output .stream pre { white-space: pre-wrap; }
"""
"""Tables and code on a phone; pictures and tables of notebooks in the dark, where the theme would put a light card
behind them: they are grey on nothing, for both."""

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 3 1"><path fill="#0072b2" d="M0 0h.9v.9H0z"/>\
<path fill="#d55e00" d="M1.05 0h.9v.9h-.9z"/><path fill="#0072b2" d="M2.1 0H3v.9h-.9z"/></svg>"""


def build(root: Path | None = None) -> Path:
    """Write build/site/ from what is there; returns its index.html.

    Raises DataError if no notebook was executed, or for what Sphinx warns of (a link to nowhere, for one); the pages
    that were there are then left as they are.
    """
    root = root or repository()
    runs = list(filter(None, (_run(root, name) for name in _executed(root))))
    if not runs:
        raise DataError(
            f"{root / 'build'} holds no executed notebook. Run `make repro` first (or PROFILE=smoke for minutes)."
        )
    with tempfile.TemporaryDirectory(dir=ensure_writable(root / "build"), prefix=".site-") as scratch:
        source, pages = Path(scratch) / "source", Path(scratch) / "html"
        _lay_out(root, runs, source)
        _render(source, pages)
        with atomic_dir(root / "build" / "site", ANYTHING) as site:
            shutil.copytree(
                pages, site, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".buildinfo*", "*macros.html")
            )
    return root / "build" / "site" / "index.html"


def where_to_read() -> str:
    """A sentence for the end of a run: where the pages are, or why there are none, which is no fault of the run."""
    try:
        return f"To read: {build().as_uri()}"
    except Exception as error:  # of Sphinx too, and of its extensions
        return f"The pages to read could not be made ({error}). All results are there; `make site` tries again."


def _run(root: Path, name: str) -> "_Run | None":
    """What is there of a profile; None, with a sentence, if it cannot be read any longer."""
    try:
        return _Run(root, name)
    except (MasksaeError, OSError, ValueError) as error:
        progress.say(f"build/{name} is left out of the pages, since its profile or a notebook cannot be read: {error}")


def _executed(root: Path) -> list[str]:
    names = {folder.name for folder in (root / "build").glob("*/") if _notebooks(folder)}
    return sorted(names, key=lambda name: _place(name, ORDER))


def _notebooks(folder: Path) -> list[Path]:
    """The executed ones, in their order."""
    return sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb") if not path.stem.endswith(".failed"))


def _place(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """Sorts names in an order, others after them by name."""
    return order.index(name) if name in order else len(order), name


class _Run:
    """What a profile's run left: notebooks, figures with captions, verdicts."""

    def __init__(self, root: Path, name: str):
        self.name, self.figures = name, root / "figures" / name
        shipped, pipeline = PROFILES / f"{name}.yaml", root / "build" / name / "params.yaml"
        if shipped.exists():
            self.source = shipped
        else:
            [file] = shlex.split(yaml.safe_load(pipeline.read_text(encoding="utf-8"))["profile_file"])
            self.source = root / file
        self.profile = load_profile(self.source)
        self.notebooks = {path.stem: _Notebook(path) for path in _notebooks(root / "build" / name)}
        verdicts = root / "results" / name / "claims.json"
        self.claims = read_json(verdicts) if verdicts.exists() else {}

    def pictures(self, notebook: str) -> list[Path]:
        """Those that a notebook's cells save; what another version has left beside them is not this run's."""
        drawn = self.notebooks[notebook].figures
        return [svg for svg in sorted((self.figures / notebook).glob("*.svg")) if f"{notebook}/{svg.stem}" in drawn]

    def shown_by(self, claim: str) -> list[str]:
        """The notebooks that a claim rests on."""
        key = self.claims.get(claim, {}).get("score")
        saves = [name for name, notebook in self.notebooks.items() if key and score(key).result in notebook.results]
        return saves + [name for name in self.notebooks if name == EVERY_CLAIM]

    def claims_of(self, notebook: str) -> list[str]:
        return [claim for claim in self.claims if notebook in self.shown_by(claim)]

    @property
    def latents(self) -> str:
        """Where the site has its page of latents, "" where the run has none."""
        return f"figures/{self.name}/{ALONE}" if (self.figures / ALONE).exists() else ""

    def verdicts(self) -> str:
        """Markdown table of the verdicts, "" where there are none."""
        rows = [["", "claim", "verdict", "unmasked → masked"]]
        for key, value in self.claims.items():
            rows.append([f"[{key}](#{_label(key)})", _text(CLAIMS[key]), spoken(value), _text(_told(value))])
        return to_markdown(rows) if self.claims else ""


class _Notebook:
    """An executed notebook, and what its cells save."""

    def __init__(self, path: Path):
        import nbformat

        self.stem, self.content = path.stem, nbformat.read(path, as_version=4)
        code = "\n".join(cell.source for cell in self.content.cells if cell.cell_type == "code")
        self.results, self.figures = set(re.findall(r'save_result\("(\w+)"', code)), _saved_figures(code)
        first = self.content.cells[0].source if self.content.cells else ""
        self.title = first.partition("\n")[0].removeprefix("# ") if first.startswith("# ") else path.stem

    def write(self, folder: Path, run: _Run) -> None:
        """The notebook as a chapter: code folded, an address before each cell that saves a figure, and below the title
        where it belongs."""
        import nbformat

        claims = " · ".join(f"[{claim}](#{_label(claim)})" for claim in run.claims_of(self.stem))
        about = f"claims {claims} · " if claims else ""
        where = f"{{.where}}\nProfile [{run.name}](index.md) · {about}[parameters](parameters.md)"
        cells = [nbformat.v4.new_markdown_cell(f"# {self.title}\n\n{where}", id="where")]
        for number, cell in enumerate(self.content.cells):
            cell = nbformat.from_dict(cell)
            if number == 0 and cell.cell_type == "markdown" and cell.source.startswith("# "):
                cell.source = cell.source.partition("\n")[2].strip()
            if cell.cell_type == "code":
                for name in _saved_figures(cell.source):
                    address = _label("cell", run.name, name)
                    cells.append(nbformat.v4.new_markdown_cell(f"({address})=", id=f"to-{number}"))
                shown = SILENT.isdisjoint(cell.metadata.get("tags", []))
                cell.metadata["tags"] = ["hide-input" if shown else "remove-cell"]
            cells.append(cell)
        content = nbformat.v4.new_notebook(cells=cells, metadata=self.content.metadata)
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(content, folder / f"{self.stem}.ipynb")


def _saved_figures(code: str) -> list[str]:
    """ "NOTEBOOK/NAME" of each."""
    return re.findall(r'save_figure\(\s*run, "([^"]+)"', code)


def _lay_out(root: Path, runs: list[_Run], source: Path) -> None:
    """Everything that Sphinx reads."""
    for name, content in {"masksae.css": CSS, "masksae.svg": ICON}.items():
        write_text(source / "_static" / name, content)
    if (root / "figures").exists():
        shutil.copytree(root / "figures", source / "figures")
    for table in (source / "figures").rglob("*.md"):
        title = _text(" ".join(table.relative_to(source / "figures").with_suffix("").parts))
        write_text(table, f"---\norphan: true\n---\n# {title}\n\n{table.read_text(encoding='utf-8')}")
    docs = sorted((root / "docs").glob("*.md"), key=lambda path: _place(path.stem, DOCS))
    if docs:
        shutil.copytree(root / "docs", source / "docs")
    others = [root / file for file in OTHER_PAGES if (root / file).exists()]
    pages = [path.relative_to(root) for path in (*docs, *others)]
    for path in pages:
        write_text(source / path, _page(root / path, runs))
    if (root / "REPRODUCE.md").exists():  # it leads to the numbers themselves
        shutil.copytree(root / "results", source / "results", ignore=shutil.ignore_patterns("pairs", "variants"))
    if (root / "CITATION.cff").exists():
        shutil.copyfile(root / "CITATION.cff", source / "CITATION.cff")
    (source / "_extra").mkdir()
    for run in runs:
        _profile(run, source / run.name)
        if run.latents:
            write_text(source / "_extra" / run.latents, (run.figures / ALONE).read_text(encoding="utf-8"))
    write_text(source / "claims.md", _claims(root, runs))
    modules = _api(source / "api")
    write_text(
        source / "api" / "index.md",
        "# API\n\nPublic names by the module they live in; `masksae.NAME` imports each.\n\n" + _toc("", modules),
    )
    front = (
        (_page(root / "README.md", runs) if (root / "README.md").exists() else "# masksae") + "\n\n" + _run_here(runs)
    )
    tocs = [
        ("Pages", ["claims", *(str(path.with_suffix("")) for path in pages)]),
        ("Runs", [f"{run.name}/index" for run in runs]),
        ("Reference", ["api/index"]),
    ]
    write_text(source / "index.md", front + "".join(_toc(caption, entries) for caption, entries in tocs))


def _toc(caption: str, entries: list[str]) -> str:
    options = f":caption: {caption}\n:hidden:" if caption else ":maxdepth: 1"
    return "\n```{{toctree}}\n{}\n\n{}\n```\n".format(options, "\n".join(entries))


def _page(path: Path, runs: list[_Run]) -> str:
    """A page of the project; links to notebooks lead to executed ones or, where there are none, are words;
    badges are left out, since they come from a network."""
    text = re.sub(r"(?m)^\[!\[[^\]]*\]\(https://.*\n", "", path.read_text(encoding="utf-8"))
    for old, new in {"](../README.md": "](../index.md", "](own_model.ipynb": "](own-model.md"}.items():
        text = text.replace(old, new)
    done = {notebook: run.name for run in reversed(runs) for notebook in run.notebooks}

    def lead(found: re.Match) -> str:
        words, up, notebook = found.groups()
        return f"[{words}]({up}{done[notebook]}/{notebook}.ipynb)" if notebook in done else words

    return re.sub(r"\[([^\]]*)\]\(((?:\.\./)?)notebooks/(\w+)\.ipynb\)", lead, text)


def _run_here(runs: list[_Run]) -> str:
    """Section of the front page: each profile that was run, with its headline and verdicts."""
    parts = ["## What was run here\n"]
    for run in runs:
        parts.append(
            f"### {run.name}\n\n{_text(run.profile.description)}\n\n[All figures and notebooks]({run.name}/index.md)\n"
        )
        drawn = [svg for notebook in run.notebooks for svg in run.pictures(notebook)]
        parts += [_figure(run, svg, up="", named=False) for svg in drawn if svg.parts[-2:] == HEADLINE]
        parts.append(run.verdicts())
    return "\n".join(parts)


def _told(value: dict) -> str:
    """A verdict's numbers, or why there are none."""
    told = describe(Effect.from_dict(value)) if "difference" in value else "; ".join(
        f"{grid}: " + ", ".join(f"{claim} {verdict}" for claim, verdict in cell.items())
        for grid, cell in value.get("grids", {}).items()
    )  # fmt: skip
    return told or value.get("reason", "")


def _claims(root: Path, runs: list[_Run]) -> str:
    """The page of claims: each with the verdicts of every profile that has results, and the notebooks and figures that
    show it, if they were run here."""
    parts = ["# Claims\n\nWhat the paper claims, what every profile with results found, and where to look.\n"]
    here = {run.name: run for run in runs}
    files = sorted((root / "results").glob("*/claims.json"), key=lambda file: _place(file.parent.name, ORDER))
    found = {file.parent.name: read_json(file) for file in files}
    for claim, words in CLAIMS.items():
        rows = [["profile", "verdict", "unmasked → masked", "notebooks", "figures"]]
        for name, verdicts in found.items():
            if claim in verdicts:
                link = f"[{_text(name)}]({name}/index.md)" if name in here else _text(name)
                value, shown = verdicts[claim], _shown(here[name], claim) if name in here else ["not run here", ""]
                rows.append([link, spoken(value), _text(_told(value)), *shown])
        table = to_markdown(rows) if len(rows) > 1 else "No profile says anything of it.\n"
        parts.append(f"({_label(claim)})=\n## {claim}: {_text(words)}\n\n{table}")
    return "\n".join(parts)


def _shown(run: _Run, claim: str) -> list[str]:
    """Links to the notebooks, and to the figures, that a claim rests on."""
    notebooks = run.shown_by(claim)
    pictures = [f"[{_text(svg.stem)}](#{_figure_label(run, svg)})" for n in notebooks for svg in run.pictures(n)]
    return [", ".join(f"[{_text(n)}]({run.name}/{n}.ipynb)" for n in notebooks), ", ".join(pictures)]


def _profile(run: _Run, target: Path) -> None:
    """Pages of one profile: its notebooks, its figures and tables, its parameters."""
    for notebook in run.notebooks.values():
        notebook.write(target, run)
    shutil.copyfile(run.source, target / run.source.name)
    write_text(
        target / "parameters.md",
        f"# {_text(run.source.name)}\n\n```{{literalinclude}} {run.source.name}\n:language: yaml\n```\n",
    )
    links = "[Parameters](parameters.md)"
    if run.latents:
        links += f' · <a href="../{run.latents}">Latents of all arms, side by side</a>'
    parts = [f"# {_text(run.name)}\n\n{_text(run.profile.description)}\n\n{links}\n"]
    parts.append(run.verdicts())
    for stem, notebook in run.notebooks.items():
        tables = [path.read_text(encoding="utf-8") for path in sorted((run.figures / stem).glob("*.md"))]
        shown = [_figure(run, svg, up="../") for svg in run.pictures(stem)] + tables
        if shown:
            parts += [f"## {notebook.title}\n", *shown]
    write_text(target / "index.md", "\n".join(parts) + _toc("", [*run.notebooks, "parameters"]))


def _figure(run: _Run, svg: Path, up: str, named: bool = True) -> str:
    """A figure with its caption, and links to the cell that drew it, to its parameters and to its claims."""
    notebook = svg.parent.name
    caption = " ".join(svg.with_suffix(".txt").read_text(encoding="utf-8").split())
    address = _label("cell", run.name, f"{notebook}/{svg.stem}")
    place = "" if up else f"{run.name}/"
    links = [f"[notebook {_text(notebook)}](#{address})", f"[parameters]({place}parameters.md)"]
    links += [f"[{claim}](#{_label(claim)})" for claim in run.claims_of(notebook)]
    name = f":name: {_figure_label(run, svg)}\n" if named else ""
    return (
        f"```{{figure}} {up}figures/{run.name}/{notebook}/{svg.name}\n:alt: {caption}\n:width: 100%\n{name}\n"
        f"{_text(caption)} {' · '.join(links)}\n```\n"
    )


def _figure_label(run: _Run, svg: Path) -> str:
    return _label("figure", run.name, svg.parent.name, svg.stem)


def _label(*parts: str) -> str:
    """An address inside the site."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())


def _text(text: str) -> str:
    """Text as markdown that says the same."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$])", r"\\\1", text)


def _api(folder: Path) -> list[str]:
    """Pages of the public names, one for each module they live in, the method's before the study's; returns them."""
    import masksae

    homes = {f"masksae.metrics.{name}": [] for name in masksae.metrics.__all__}
    homes = {module: [] for module in homes if module in sys.modules}  # the others are functions
    for name, module in masksae._HOME.items():
        homes.setdefault(module, []).append(name)
    modules = sorted(homes, key=lambda module: (module.startswith("masksae.study"), module))
    for module in modules:
        title = module.removeprefix("masksae.")
        parts = [title, "=" * len(title), "", f".. automodule:: {module}", "   :no-members:" if homes[module] else ""]
        for name in homes[module]:
            value = getattr(masksae, name)
            kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
            parts += ["", f".. auto{kind}:: {module if kind == 'data' else 'masksae'}.{name}"]
        write_text(folder / f"{module}.rst", "\n".join(parts) + "\n")
    return modules


def _render(source: Path, target: Path) -> None:
    """HTML of what was laid out. Raises DataError if Sphinx warns of anything."""
    from pygments.lexers import find_lexer_class_by_name
    from sphinx.application import Sphinx
    from sphinx.util.console import strip_escape_sequences
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    said = io.StringIO()
    with patch_docutils(), docutils_namespace(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of the libraries to each other
        app = Sphinx(
            source, None, target, target.with_name("doctrees"), "html", CONFIG, status=None, warning=said, freshenv=True
        )
        app.add_lexer("python", find_lexer_class_by_name("ipython3"))  # `!command` stands in pages that were notebooks
        app.connect("autodoc-process-docstring", _as_rst)
        app.build()
    if faults := strip_escape_sequences(said.getvalue()).replace(f"{source}/", "").strip():
        raise DataError(f"The pages have faults, and build/site is left as it was:\n{faults}")


def _as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """A docstring of this project in Sphinx's language: single backticks are code, columns of names and their meanings
    a list of definitions, indented lines an example."""
    found = []
    for block in re.split(r"\n\n+", "\n".join(lines).strip()):
        if block.startswith(">>>"):
            found.append(block)
        elif all(line.startswith("    ") for line in block.splitlines()):
            found.append(f"::\n\n{block}")
        elif re.match(r"\S+(?:, \S+)*(?: {2,}|\n {2,})\S", block):
            found.append(_definitions(block))
        else:
            found.append(_escaped("\n".join(line.strip() for line in block.splitlines())))
    lines[:] = [*"\n\n".join(found).splitlines(), ""]


def _definitions(block: str) -> str:
    """Names, each followed by two blanks or alone on its line, and what is said of them."""
    parts = re.split(r"(?m)^(\S+(?:, \S+)*)(?: {2,}|$)", block)[1:]
    return "\n".join(
        f"``{name}``\n   {_escaped(' '.join(said.split()))}" for name, said in zip(parts[::2], parts[1::2])
    )


def _escaped(text: str) -> str:
    plain, code = (lambda part: re.sub(r"([\\*|_])", r"\\\1", part)), (lambda part: rf"\ ``{part}``\ ")
    return "".join(code(part) if i % 2 else plain(part) for i, part in enumerate(re.split(r"`+([^`]+)`+", text)))
