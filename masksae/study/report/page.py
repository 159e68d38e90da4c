"""The project's look of an HTML page: one template, `page.html`, for the site, a report and a story."""

import html
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")


def page(title: str, body: str, menu: str = "", here: str = "", code_style: str = "") -> str:
    """HTML of one page. `body`, `menu`, `here` (a second menu) and `code_style` (CSS) are HTML already, `title` is
    text."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for key, value in {"TITLE": html.escape(title), "MENU": menu, "HERE": here, "CODE_STYLE": code_style}.items():
        text = text.replace(f"@{key}@", value)
    return text.replace("@BODY@", body)
