"""The project's look of an HTML page that stands alone: one template, `page.html`, for a report and a story."""

import html
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")


def page(title: str, body: str) -> str:
    """HTML of one page. `body` is HTML already, `title` is text."""
    return TEMPLATE.read_text(encoding="utf-8").replace("@TITLE@", html.escape(title)).replace("@BODY@", body)
