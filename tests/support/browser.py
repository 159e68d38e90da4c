"""Open pages in a real browser and see what goes wrong: messages on the console, files that the server does not have,
links to nowhere."""

import functools
import html
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from urllib.parse import unquote

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def troubles(folder: Path, pages: list[str]) -> list[str]:
    """Console messages and failed requests when every page is opened in headless Chromium, each in a frame of a
    window."""
    faults = []
    for some in batched(pages):
        found, failed = _opened(folder, "".join(f'<iframe src="/{page}"></iframe>' for page in some))
        assert "iframe" in found.stdout, found.stderr  # it did open
        faults += failed + said(found.stderr)
    return faults


def said(log: str) -> list[str]:
    """Console messages in what a browser logged, but for what the site's theme notes of its own state."""
    return re.findall(r'CONSOLE\S* "(?!\[PST\]: ).*', log)


def too_wide(folder: Path, pages: list[str], width: int = 360) -> list[str]:
    """Pages that must be scrolled sideways on a screen of so many pixels, with how many they take."""
    script = """
        const wide = [], seen = [...document.querySelectorAll("iframe")].map(f => new Promise(done => f.onload = () => {
            const page = f.contentDocument.documentElement
            if (page.scrollWidth > page.clientWidth) wide.push(f.getAttribute("src") + ": " + page.scrollWidth)
            done()
        }))
        Promise.all(seen).then(() => document.body.innerText = "wide " + JSON.stringify(wide.sort()) + " end")"""
    wide = []
    for some in batched(pages):
        frames = "".join(f'<iframe style="width:{width}px" src="/{page}"></iframe>' for page in some)
        found, _ = _opened(folder, f"{frames}<script>{script}</script>")
        wide += json.loads(html.unescape(re.search(r"wide (\[.*\]) end", found.stdout)[1]))
    return wide


def batched(pages: list[str], size: int = 8) -> list[list[str]]:
    """As many frames as one window loads in time."""
    return [pages[i : i + size] for i in range(0, len(pages), size)]


def _opened(folder: Path, body: str):
    """What Chromium made of a page with this body, served beside those of a folder, and requests that failed."""
    failed = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path != "/every-page":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<link rel="icon" href="data:,"><body>{body}</body>'.encode())

        def send_error(self, code, *rest, **more):
            failed.append(f"{code} for {self.path}")
            super().send_error(code, *rest, **more)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/every-page"
        found = opened(address)
    finally:
        server.shutdown()
    return found, failed


def opened(address: str, *options: str):
    """The finished process of a Chromium that has opened an address: its DOM on stdout, its console on stderr."""
    usual = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 --virtual-time-budget=20000 --dump-dom"
    return subprocess.run([CHROMIUM, *usual.split(), *options, address], capture_output=True, text=True, timeout=300)


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.anchors = [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.add(values.get("id"))
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]


def dead_links(folder: Path) -> list[str]:
    """Links, images and anchors of the pages in a folder that lead nowhere inside it."""
    read = {}
    for path in folder.rglob("*.html"):
        read[path.resolve()] = _Links()
        read[path.resolve()].feed(path.read_text(encoding="utf-8"))
    dead = []
    for page, links in read.items():
        for target in links.targets:
            if re.match(r"(https?|data|mailto):", target):
                continue
            path, _, anchor = re.sub(r"\?[^#]*", "", target).partition("#")
            goal = (page.parent / unquote(path)).resolve() if path else page
            if not goal.exists() or (anchor and goal in read and unquote(anchor) not in read[goal].anchors):
                dead.append(f"{page.name}: {target}")
    return dead
