"""The table of docs/faults.md: what a full run (MASKSAE_FUZZ) of the fault tests tried. `python
tests/support/fault_table.py` writes it into the page."""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, RECORDS = ROOT / "docs/faults.md", ROOT / "build/faults"
KINDS = ("damaged file", "write", "interrupt", "place", "two at once")


def survived(kind: str, what: str, tried: int, outcome: str) -> None:
    """Note what a test tried and saw, in a full run only."""
    if os.environ.get("MASKSAE_FUZZ"):
        RECORDS.mkdir(parents=True, exist_ok=True)
        row = {"kind": kind, "what": what, "tried": tried, "outcome": outcome}
        (RECORDS / f"{re.sub(r'[^a-z0-9]+', '-', what.lower())}.json").write_text(json.dumps(row))


def table(rows: list[dict]) -> str:
    rows = sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["what"]))
    lines = [f"| {row['what']} | {row['tried']:,} | {row['outcome']} |" for row in rows]
    return "\n".join(["| what | tried | what happened |", "| --- | --- | --- |", *lines])


if __name__ == "__main__":
    rows = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    found = re.sub(r"(?ms)^\| what \|.*?(?=\n\n)|^@TABLE@$", lambda _: table(rows), PAGE.read_text(), count=1)
    PAGE.write_text(found)
