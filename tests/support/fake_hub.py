"""A hub on this machine with one data set and one repository of models, for the real clients of the real hub; it can be
told to fail in the ways that networks do.

Run as a script it is the child process of `test_hub.py`: the clients read the hub's address when they are imported.
"""

import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np

NAME = "someone/pile"


class FakeHub(ThreadingHTTPServer):
    """Serves `files` (path -> bytes). `fault` is met by the first two requests of every byte range: "502", "time-out",
    "cut" (the connection closes half-way), "short" (fewer bytes than asked for), "garbage" (other bytes); always:
    "gone" (404), "truncated" (the second half of the second shard is not there); or None."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.fault, self.met, self.commit, self.asked = files, None, Counter(), "c" * 40, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("content-length", 0))).decode())

    def do_GET(self):
        self.answer("")

    do_HEAD = do_GET

    def answer(self, body: str) -> None:
        url = urlparse(self.path)
        path = unquote(url.path).replace(f"/api/models/{NAME}", f"/api/datasets/{NAME}")
        path, api = re.sub(f"^/{NAME}/", f"/datasets/{NAME}/", path), f"/api/datasets/{NAME}"
        if found := re.fullmatch(f"{api}(/revision/([^/]+))?", path):
            if found[2] == "nowhere":
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.send_json(
                {
                    "_id": "1",
                    "id": NAME,
                    "sha": self.server.commit,
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "siblings": [],
                }
            )
        if found := re.fullmatch(f"{api}/tree/[^/]+/?(.*)", path):
            return self.tree(found[1], "recursive=true" in url.query.lower())
        if re.match(f"{api}/paths-info/", path):
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.send_json([entry for name in wanted for entry in self.entries(name)])
        if (found := re.fullmatch(f"/datasets/{NAME}/resolve/[^/]+/(.*)", path)) and found[1] in self.server.files:
            return self.send_file(found[1])
        self.send(404, b"{}", {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"})

    def entries(self, name: str) -> list[dict]:
        data = self.server.files.get(name)
        if data is None:
            inside = any(file.startswith(f"{name}/") for file in self.server.files)
            return [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40}] if inside else []
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"oid": digest, "size": len(data), "pointerSize": 130}
        return [{"type": "file", "path": name, "size": len(data), "oid": digest[:40], "lfs": lfs}]

    def tree(self, folder: str, recursive: bool) -> None:
        inside = [name for name in self.server.files if name.startswith(f"{folder}/" if folder else "")]
        if not inside:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        depth = folder.count("/") + 1 if folder else 0
        folders = {"/".join(name.split("/")[: depth + 1]) for name in inside if name.count("/") > depth}
        files = [name for name in inside if recursive or name.count("/") == depth]
        self.send_json([entry for name in [*sorted(folders), *files] for entry in self.entries(name)])

    def send_json(self, value) -> None:
        self.send(
            200, json.dumps(value).encode(), {"content-type": "application/json", "x-repo-commit": self.server.commit}
        )

    def send_file(self, name: str) -> None:
        data = self.server.files[name]
        self.server.asked += [name] if self.command == "GET" else []
        headers = {
            "x-repo-commit": self.server.commit,
            "etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "accept-ranges": "bytes",
        }
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        low, high = (int(found[1]), min(int(found[2] or len(data)), len(data) - 1)) if found else (0, len(data) - 1)
        part, status = data[low : high + 1], 206 if found else 200
        if found:
            headers["content-range"] = f"bytes {low}-{high}/{len(data)}"
        if self.command == "GET" and name.endswith(".zst"):
            fault, met = self.server.fault, self.server.met
            met[name, low] += 1
            if fault == "gone":
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            if fault == "truncated":
                part = part if name.endswith("00.jsonl.zst") else data[: len(data) // 2][low : high + 1]
            elif fault and met[name, low] <= 2:
                return self.fail(fault, status, part, headers)
        self.send(status, part, headers)

    def fail(self, fault: str, status: int, part: bytes, headers: dict) -> None:
        if fault == "502":
            self.send(502, b"bad gateway", {})
        elif fault == "time-out":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "cut":
            self.send(status, part[: len(part) // 2], headers | {"content-length": str(len(part))})
            self.close_connection = True
        elif fault == "short":
            self.send(status, part[: len(part) // 2], headers)
        elif fault == "garbage":
            middle = len(part) // 2
            self.send(status, part[:middle] + random.Random(0).randbytes(512) + part[middle + 512 :], headers)

    def send(self, status: int, data: bytes, headers: dict) -> None:
        self.send_response(status)
        for key, value in ({"content-length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def pile(documents: int = 4000, shards: int = 2) -> dict[str, bytes]:
    """Shards in the Pile's form, with what real ones hold: other sets between, empty and blank texts, odd characters,
    one text of 10 MB (held out, where most of it finds no room)."""
    import zstandard

    from masksae.data.blocks import is_held_out

    draw, files = random.Random(0), {}
    odd = ["", "   \n", "\u0000\u2028\ufeff\U0001f600 é\u0301 \u202e rtl \ud7ff", "x" * 200]
    for shard in range(shards):
        texts = ["".join(draw.choices("abcdefgh ,.\n", k=draw.randint(0, 400))) for _ in range(documents)]
        texts[10:10] = odd
        if shard == 0:
            large = "".join(draw.choices("abcdefghijklmno ", k=10_000_000))
            texts.insert(documents // 2, next(text for i in count() if is_held_out(text := f"{i} {large}", 0.05)))
        rows = [
            {"text": text, "meta": {"pile_set_name": "Pile-CC" if i % 3 else "ArXiv"}} for i, text in enumerate(texts)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files[f"train/{shard:02d}.jsonl.zst"] = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(
            lines.encode()
        )
    return files


class BytesAsTokens:
    """One token per byte of UTF-8."""

    is_fast, added_tokens_decoder, unk_token_id = False, {}, None

    def __call__(self, texts: list[str], **_) -> dict:
        return {"input_ids": [np.frombuffer(text.encode(), np.uint8).tolist() for text in texts]}


SOURCE = f"hub:{NAME}#where=meta.pile_set_name:Pile-CC"


def tokens_of(folder: Path) -> str:
    """Hash of the token blocks that come out of the hub's data set."""
    from masksae.data import blocks, texts

    made = blocks.build(
        texts.TextStream([SOURCE]), BytesAsTokens(), folder, tokens={"train": 700_000, "held_out": 400_000},
        block_length=64, bos_id=1, held_out_share=0.05, seed=0, ordered=False, progress=False,
    )  # fmt: skip
    parts = [blocks.Blocks(made[split])[:].numpy().tobytes() for split in ("train", "held_out")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def serve(files: dict[str, bytes], scratch: Path) -> FakeHub:
    """The hub of clients that are imported from now on."""
    hub = FakeHub(files)
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(scratch / "home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
    }
    return hub


def saes(scratch: Path) -> None:
    """Print a line for each address of an SAE: what was loaded or the error, and which files were asked for."""
    folder = scratch / "files"
    hub = serve(
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()},
        scratch,
    )
    from masksae import errors, load_sae

    for place in ("lens", "layers.3", f"layers.3@{hub.commit}", "gemma-scope-2b-pt-res/layer_1", "lens", "nothing", ""):
        hub.asked.clear()
        try:
            sae = load_sae(f"hub:{NAME}/{place}")
            outcome = {"config": sae.config.to_dict(), "origin": sae.origin, "sum": sae.W_dec.sum().item()}
        except errors.MasksaeError as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps({"place": place, "outcome": outcome, "asked": sorted(hub.asked)}), flush=True)
    for address in ("hub:someone/else/lens", "hub:someone", f"hub:{NAME}/lens@nowhere"):
        try:
            load_sae(address)
        except errors.MasksaeError as error:
            print(json.dumps({"place": address, "outcome": f"{type(error).__name__}: {error}"}), flush=True)


def main(scratch: Path) -> None:
    """Print one line per scenario: its name, the tokens' hash or the error, and how often data was asked for."""
    hub = serve(pile(), scratch)
    from huggingface_hub import HfFileSystem

    from masksae import errors
    from masksae.data import blocks
    from masksae.data import hub as ours

    ours.PAUSES, blocks.PART = (0.01,) * 4, 1000
    sleep, clients = time.sleep, threading.main_thread()
    time.sleep = lambda seconds: sleep(0.01 if threading.current_thread() is clients else seconds)

    def scenario(name: str, fault: str | None, folder: str | None = None) -> None:
        HfFileSystem.clear_instance_cache()  # as a new process would see the hub
        hub.fault, hub.met = fault, Counter()
        try:
            outcome = tokens_of(scratch / (folder or name))
        except errors.MasksaeError as error:
            outcome = f"{type(error).__name__}: {error}"
        parts = len(list(scratch.glob(f"{folder or name}.parts/part-*")))
        print(
            json.dumps({"name": name, "outcome": outcome, "requests": sum(hub.met.values()), "parts": parts}),
            flush=True,
        )

    for name in ("undisturbed", "502", "time-out", "cut", "short", "garbage"):
        scenario(name, None if name == "undisturbed" else name)
    scenario("gone", "gone")
    scenario("truncated", "truncated", "mended")
    whole = hub.files.pop("train/01.jsonl.zst")
    scenario("missing", None, "mended")
    hub.files["train/01.jsonl.zst"] = whole + b" "
    scenario("changed", None, "mended")
    hub.files["train/01.jsonl.zst"] = whole
    hub.commit = "d" * 40  # something newer was published meanwhile
    scenario("mended", None, "mended")


if __name__ == "__main__":
    (saes if sys.argv[2:] == ["saes"] else main)(Path(sys.argv[1]))
