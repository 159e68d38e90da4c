"""Two runs of one profile beside each other: do the effects and verdicts of one come again in the other?

On one kind of machine they come again to the last bit. Elsewhere products of matrices are summed in another order, SAEs
drift apart as they train, and an effect may move; it has come again if it lies in the interval that was committed.
"""

import json
import subprocess
from pathlib import Path

from masksae.errors import DataError, SourceError
from masksae.files import read_json, write_json
from masksae.study.report.claims import CLAIMS, endpoints

FILE = "reproduced.json"


def compared(there: dict, here: dict) -> list[dict]:
    """A row for each endpoint, and each of the other grids with a claim, that both have an effect of: claim, endpoint;
    effect and verdict there and here; the interval there (low, high; None of one pair, which has none); `same`: the
    verdicts are equal, and the effect here lies in that interval, or both are the same number. Raises DataError if
    there is none.

    there, here  of claims.json
    """
    rows, others = [], _measured(here)
    for key, old in _measured(there).items():
        if key in others:
            new = others[key]
            within = old["low"] is not None and old["low"] <= new["difference"] <= old["high"]
            same = within or new["difference"] == old["difference"]
            rows.append(
                dict(zip(("claim", "endpoint"), key))
                | {"there": old["difference"], "low": old["low"], "high": old["high"], "here": new["difference"]}
                | {"verdict_there": old["verdict"], "verdict_here": new["verdict"]}
                | {"same": same and old["verdict"] == new["verdict"]}
            )
    if not rows:
        raise DataError("The two runs have no effect in common, so nothing can be compared. Give another run: --with.")
    return rows


def _measured(claims: dict) -> dict[tuple[str, str], dict]:
    """(claim, endpoint) -> its row, of each that has an effect; C4 has those of every other grid, "letters, topk10"."""
    rows = {(claim, name): row for claim, name, row in endpoints(claims)}
    for grid, cells in claims["C4"]["cells"].items():
        rows |= {("C4", f"{name}, {grid}"): row for name, row in cells.items()}
    return {key: row for key, row in rows.items() if row.get("difference") is not None}


def committed(root: Path, profile: str) -> dict:
    """claims.json of a profile as the last commit of the repository `root` has it. Raises SourceError."""
    name = f"results/{profile}/claims.json"
    try:
        told = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SourceError("There is no git here to ask for the committed results. Give a folder: --with.") from error
    if told.returncode:
        raise SourceError(f"The last commit has no {name}: {told.stderr.strip()}. Give a folder: --with.")
    return json.loads(told.stdout)


def claims_of(results: Path) -> dict:
    """claims.json in a folder of results. Raises DataError."""
    found = read_json(results / "claims.json") if (results / "claims.json").is_file() else None
    if not isinstance(found, dict) or not CLAIMS.keys() <= found.keys():
        raise DataError(f"{results} holds no claims.json of a profile. Give results/PROFILE of a run that is finished.")
    return found


def note(results: Path, name: str, machine: dict, rows: list[dict]) -> None:
    """Write a comparison beside the results that it was made with, in the place of an older one of that name."""
    write_json(results / FILE, noted(results) | {name: {"machine": machine, "rows": rows}})


def noted(results: Path) -> dict[str, dict]:
    """By name, the machine and the rows of each comparison that was kept."""
    return read_json(results / FILE) if (results / FILE).exists() else {}


def table(rows: list[dict]) -> list[list[str]]:
    """Rows for a reader."""
    lines = [["claim", "endpoint", "committed", "its interval", "here", "verdict", "same"]]
    for row in rows:
        verdicts = dict.fromkeys((row["verdict_there"], row["verdict_here"]))
        interval = "unknown" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        lines.append(
            [row["claim"], row["endpoint"], f"{row['there']:+.4f}", interval]
            + [f"{row['here']:+.4f}", " → ".join(verdicts), "yes" if row["same"] else "no"]
        )
    return lines
