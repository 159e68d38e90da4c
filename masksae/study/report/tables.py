"""One table in three forms: markdown, HTML and aligned text. A table is rows of cells, the first of them the titles."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from masksae.files import write_text

LONG = 15
"""Rows above which a table is folded in a notebook."""


def number(value, digits: int = 3) -> str:
    """A score as text.

    >>> number(2300), number(0.5), number(None), number("as it is")
    ('2,300', '0.500', '–', 'as it is')
    """
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def brief(value, digits: int = 4) -> str:
    """A value to so many digits; nothing for None and NaN.

    >>> brief(0.123456), brief(None), brief([1])
    ('0.1235', '', '[1]')
    """
    if value is None or value != value:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def cells(table, columns: Sequence[str] | None = None, form: Callable[[object], str] = str) -> list[list[str]]:
    """Titles and rows of a DataFrame or of a list of dicts, values as `form` writes them. columns: some of them, in
    this order.

    >>> cells([{"sae": "a", "l0": 20.0}, {"sae": "b"}], form=brief)
    [['sae', 'l0'], ['a', '20'], ['b', '']]
    """
    records = table if isinstance(table, list) else table.to_dict("records")
    titles = list(columns or (dict.fromkeys(key for row in records for key in row) if records else table))
    return [titles, *([form(row.get(title)) for title in titles] for row in records)]


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A pipe table.

    >>> print(to_markdown([["", "n"], ["a", "1"]]), end="")
    | | n |
    | --- | --- |
    | a | 1 |
    """
    titles, *body = rows
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in (titles, *body)]
    return "\n".join([lines[0], "|" + " --- |" * len(titles), *lines[1:]]) + "\n"


def to_html(rows: Sequence[Sequence[str]]) -> str:
    """A table element; cells are text, and no HTML.

    >>> to_html([["<a>"], ["1"]])
    '<table><tr><th>&lt;a&gt;</th></tr><tr><td>1</td></tr></table>'
    """
    titles, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["".join(f"<th>{cell}</th>" for cell in titles)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def to_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns in line, the first to the left and the others to the right, for a terminal.

    >>> print(to_text([["stage", "work"], ["all", "3 GFLOP"]]))
      stage     work
      all    3 GFLOP
    """
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def show(table, columns: list[str] | None = None):
    """A table for a notebook: chosen columns, numbers to four digits; a long one is folded behind a line that opens
    it."""
    from IPython.display import HTML

    rows = cells(table, columns, brief)
    body = to_html(rows) if len(rows) > 1 else "<p>No rows.</p>"
    if len(rows) - 1 > LONG:
        summary = f"Table of {len(rows) - 1} rows: {', '.join(rows[0])}"
        body = f"<details><summary>{html.escape(summary)}</summary>{body}</details>"
    return HTML(body)


def save_table(path, table, note: str):
    """Write a table as markdown with a note below it; returns it for display."""
    write_text(Path(path), to_markdown(cells(table)) + f"\n{note}\n")
    return show(table)
