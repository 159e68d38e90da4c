"""Static pages of what was run: `masksae site` turns build/, figures/, results/ and the docstrings into build/site/.

One page per executed notebook, one per profile with every figure beside its caption, its notebook and its parameters,
and the API reference. Plain HTML and CSS: it opens from the disk, needs no network, and follows the reader's light or
dark setting.
"""

import html
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import yaml

from masksae.errors import DataError
from masksae.files import ANYTHING, PROFILES, atomic_dir, read_json, repository, write_text
from masksae.study.profile import load_profile
from masksae.study.report.claims import CLAIMS
from masksae.study.report.effects import describe
from masksae.study.report.page import page
from masksae.study.report.tables import to_html
from masksae.study.stats import Effect

ORDER = ("laptop", "overnight", "gemma", "paper", "smoke")
"""Profiles in the order in which a reader wants them; others follow."""

DOCS = ("own", "own-model", "metrics", "pitfalls", "faults", "scale")
"""Pages of docs/, likewise."""


def build(root: Path | None = None) -> Path:
    """Write build/site/ from what is there; returns its index.html. Raises DataError if no notebook was executed."""
    root = root or repository()
    folders = {path.parent.name: path.parent for path in sorted((root / "build").glob("*/[0-9][0-9]_*.ipynb"))}
    if not folders:
        raise DataError(
            f"{root / 'build'} holds no executed notebook. Run `make repro` first (or PROFILE=smoke for minutes)."
        )
    names = sorted(folders, key=lambda name: _place(name, ORDER))
    pages = sorted((root / "docs").glob("*.md"), key=lambda path: _place(path.stem, DOCS))
    links = [("index.html", "masksae"), *((f"{name}/index.html", name) for name in names)]
    links += [(f"docs/{path.stem}.html", path.stem) for path in pages] + [("api/masksae.html", "API")]
    with atomic_dir(root / "build" / "site", ANYTHING) as site:
        for name in names:
            _profile(root, folders[name], name, links, site / name)
        for path in pages:
            _page(site / "docs" / f"{path.stem}.html", path.stem, _with_pictures(path, site / "docs"), links, "../")
        _api(site / "api")
        _page(site / "index.html", "masksae", _front(root, names), links, "")
    return root / "build" / "site" / "index.html"


def _place(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """Sorts names in an order, others after them by name."""
    return order.index(name) if name in order else len(order), name


def _page(path: Path, title: str, body: str, links: list[tuple[str, str]], up: str, here: str = "") -> None:
    menu = " ".join(_link(up + link, text) for link, text in links)
    write_text(path, page(title, body, menu, here, _code_style()))


def _link(to: str, text: str) -> str:
    return f'<a href="{html.escape(quote(to))}">{html.escape(text)}</a>'


def _code_style() -> str:
    """Pygments' colours for both settings."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _front(root: Path, names: list[str]) -> str:
    parts = [
        "<h1>masksae</h1><p>The open companion to "
        "<i>Improving Robustness In Sparse Autoencoders via Masked Regularization</i> "
        '(<a href="https://arxiv.org/abs/2604.06495">arXiv 2604.06495</a>): '
        "its claims, tested, with the controls that they need.</p>"
    ]
    for name in names:
        profile = load_profile(_source(root, name))
        parts.append(f"<h2>{_link(f'{name}/index.html', name)}</h2><p>{html.escape(profile.description)}</p>")
        headline = root / "figures" / name / "04_absorption" / "along.svg"
        if headline.exists():
            parts.append(_figure(headline, f"{name}/figures/04_absorption/along.svg", f"{name}/"))
        parts.append(verdicts(root / "results" / name / "claims.json"))
    return "\n".join(parts)


def _source(root: Path, name: str) -> Path:
    """The YAML file of a profile that was run: a shipped one, or that which its pipeline was made for."""
    shipped, pipeline = PROFILES / f"{name}.yaml", root / "build" / name / "params.yaml"
    return shipped if shipped.exists() else root / yaml.safe_load(pipeline.read_text(encoding="utf-8"))["profile_file"]


def verdicts(path: Path) -> str:
    """HTML table of the verdicts of one profile, "" where there are none."""
    if not path.exists():
        return ""
    rows = [["", "claim", "verdict", "unmasked → masked"]]
    for key, value in read_json(path).items():
        told = describe(Effect.from_dict(value)) if "difference" in value else "; ".join(
            f"{grid}: " + ", ".join(f"{claim} {verdict}" for claim, verdict in cell.items())
            for grid, cell in value.get("grids", {}).items()
        )  # fmt: skip
        rows.append([key, CLAIMS[key], value["verdict"], told or value.get("reason", "")])
    return to_html(rows)


def _profile(root: Path, executed: Path, name: str, links: list[tuple[str, str]], target: Path) -> None:
    """Pages of one profile: its notebooks, its figures and tables, its parameters."""
    notebooks = sorted(path for path in executed.glob("[0-9][0-9]_*.ipynb") if not path.stem.endswith(".failed"))
    pages = [path.stem for path in notebooks]
    menu = " ".join(_link(f"{page}.html", page) for page in [*pages, "parameters"])
    here = f"<nav>{_link('index.html', name)} {menu}</nav>"
    for path in notebooks:
        _page(target / f"{path.stem}.html", f"{path.stem}, {name}", _notebook(path), links, "../", here)
    source = _source(root, name)
    _page(
        target / "parameters.html",
        f"parameters, {name}",
        f"<h1>{html.escape(source.name)}</h1>{_yaml(source)}",
        links,
        "../",
        here,
    )
    parts = [f"<h1>{html.escape(name)}</h1>", verdicts(root / "results" / name / "claims.json")]
    figures = root / "figures" / name
    if figures.exists():
        shutil.copytree(figures, target / "figures")
    for notebook in pages:
        pictures = sorted((figures / notebook).glob("*.svg"))
        parts += [f"<h2>{_link(f'{notebook}.html', notebook)}</h2>"] if pictures else []
        parts += [_figure(svg, f"figures/{notebook}/{svg.name}", "") for svg in pictures]
        parts += [_markdown(table) for table in sorted((figures / notebook).glob("*.md"))]
    _page(target / "index.html", name, "\n".join(parts), links, "../", here)


def _figure(svg: Path, link: str, up: str) -> str:
    """A figure with its caption and links to the notebook that drew it and to its parameters."""
    caption = html.escape(svg.with_suffix(".txt").read_text(encoding="utf-8").strip())
    notebook = svg.parent.name
    links = f"{_link(f'{up}{notebook}.html', f'notebook {notebook}')} · {_link(f'{up}parameters.html', 'parameters')}"
    link = html.escape(quote(link))
    return (
        f'<figure><a href="{link}"><img src="{link}" alt="{caption}"></a>'
        f"<figcaption>{caption} {links}</figcaption></figure>"
    )


def _notebook(path: Path) -> str:
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name="basic").from_filename(path)[0]


def _markdown(path: Path) -> str:
    from markdown_it import MarkdownIt

    return MarkdownIt().enable("table").render(path.read_text(encoding="utf-8"))


def _with_pictures(path: Path, target: Path) -> str:
    """A page of docs/: pictures are copied beside it, links to files that the site does not hold become plain text."""
    body = _markdown(path)
    for link in set(re.findall(r'(?:href|src)="([^":#]+)', body)):
        file = (path.parent / link).resolve()
        if file.suffix == ".md" and file.parent == path.parent.resolve():
            body = re.sub(rf'href="{re.escape(link)}[^"]*"', f'href="{file.stem}.html"', body)
        elif file.suffix == ".png":
            copy = "-".join(file.parts[-3:])
            target.mkdir(exist_ok=True)
            shutil.copyfile(file, target / copy)
            body = body.replace(f'src="{link}"', f'src="{copy}"')
        else:
            body = re.sub(rf'<a href="{re.escape(link)}[^"]*">(.*?)</a>', r"\1", body)
    return body


def _yaml(path: Path) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import YamlLexer

    return highlight(path.read_text(encoding="utf-8"), YamlLexer(), HtmlFormatter())


def _api(target: Path) -> None:
    """The reference, from docstrings."""
    import pkgutil

    import pdoc

    import masksae

    left_out = {"__main__", *masksae.__all__}
    modules = [f"masksae.{m.name}" for m in pkgutil.iter_modules(masksae.__path__) if m.name not in left_out]
    pdoc.render.configure(docformat="markdown", show_source=True, search=False)
    pdoc.pdoc("masksae", *modules, output_directory=target)
