"""Where the scores of SAEs are kept: rows by (score, SAE), each with what it is made of.

A row rests on its *recipe*, which is the SAE's own and the settings of the score, and on its *code*: modules and
versions of libraries (`masksae.provenance`). It is kept in the user's cache under an id of both. So what changes for
one SAE is made again for that SAE alone.

What a run took is also noted beside its results, with the commit, so that `masksae check` can tell on any machine what
has changed since. A profile that keeps its pairs has its rows there too, and takes them from there whichever code made
them: they are results that took days.
"""

import copy
import functools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from masksae import provenance
from masksae.errors import DataError
from masksae.files import cache_dir, ensure_writable, read_json, repository, run_id, write_json
from masksae.saes.sae import SAE
from masksae.study.inputs import Inputs
from masksae.study.sections import Section

STATES = ("as it is now", "other versions", "other code", "another profile", "missing")
"""How a noted row stands to a profile and to this code, from good to bad. Other code or versions may give the same
numbers: that is known only once they are made again."""


@dataclass(frozen=True)
class Made:
    """What the rows of one score of one SAE are made of."""

    recipe: list
    """The SAE's own, and the settings of the score."""
    code: dict[str, dict[str, str]]
    """As `provenance.made_by` tells it, of both."""

    @functools.cached_property
    def ids(self) -> dict[str, str]:
        return {"recipe": run_id(self.recipe), "code": run_id(self.code)}


@dataclass(frozen=True)
class Notes:
    """What a run took, in a file beside its results: {"scores": {score: {SAE: {"recipe": id, "code": id}}}, "made_by":
    {code: {"commit", "versions", "modules"}}}."""

    file: Path
    keeps_rows: bool
    """The rows stand there too, and are taken whichever code made them."""

    def read(self) -> dict:
        """Raises DataError for rows in a form that is not this version's; notes alone begin anew then."""
        known = read_json(self.file) if self.file.exists() else None
        if isinstance(known, dict) and known.keys() == {"scores", "made_by"}:
            return known
        if known is not None and self.keeps_rows:
            raise DataError(
                f"{self.file} holds {', '.join(known) if isinstance(known, dict) else type(known).__name__}, expected "
                "scores and made_by: another version of masksae wrote it. Move it away; what it held is made again."
            )
        return {"scores": {}, "made_by": {}}

    def rows(self, score: str, made: dict[str, Made]) -> dict[str, list[dict]]:
        """Rows of the SAEs whose recipe is the one that is noted."""
        noted = self.read()["scores"].get(score, {}) if self.keeps_rows else {}
        same = (name for name in made if name in noted and noted[name]["recipe"] == made[name].ids["recipe"])
        return {name: noted[name]["rows"] for name in same}

    def add(self, score: str, made: dict[str, Made], rows: dict[str, list[dict]]) -> None:
        """Note a score of some SAEs; nothing is written where the same is noted already."""
        if made:
            lock = ensure_writable(cache_dir("notes")) / f"{run_id(str(self.file.resolve()))}.lock"
            with FileLock(lock):  # another process must not write over these what it read before
                self._add(score, made, rows)

    def _add(self, score: str, made: dict[str, Made], rows: dict[str, list[dict]]) -> None:
        known = self.read()
        noted = known["scores"].setdefault(score, {})
        new = [name for name, each in made.items() if noted.get(name, {}) | each.ids != noted.get(name)]
        for name in new:
            noted[name] = made[name].ids | ({"rows": rows[name]} if self.keeps_rows else {})
            known["made_by"].setdefault(noted[name]["code"], {"commit": commit(), **made[name].code})
        if new:
            used = {note["code"] for notes in known["scores"].values() for note in notes.values()}
            known["made_by"] = {code: told for code, told in known["made_by"].items() if code in used}
            write_json(self.file, known, compact=self.keeps_rows)

    def state(self, score: str, sae: str, made: Made) -> dict:
        """How a noted score stands: state (one of `STATES`), commit, and what is another by now (changed): modules, and
        libraries with their versions."""
        known = self.read()
        noted = known["scores"].get(score, {}).get(sae, {})
        before = {"commit": None, "modules": {}, "versions": {}} | known["made_by"].get(noted.get("code"), {})
        modules = _differing(before["modules"], made.code["modules"])
        then, now = before["versions"], made.code["versions"]
        versions = [f"{name} {then.get(name)}, now {now.get(name)}" for name in _differing(then, now)]
        if not noted:
            state = "missing"
        elif noted["recipe"] != made.ids["recipe"]:
            state = "another profile"
        elif noted["code"] == made.ids["code"]:
            state = "as it is now"
        else:  # of what was kept before 0.3 nobody noted modules and versions
            state = "other versions" if versions and not modules else "other code"
        return {"state": state, "commit": before["commit"], "changed": modules + versions}


def _differing(before: dict, now: dict) -> list[str]:
    return [key for key in sorted({*before, *now}) if before and before.get(key) != now.get(key)]


@functools.cache
def commit() -> str | None:
    """Commit of the project, and whether the package has changed since; None outside of a clone."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=repository(), capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD")[:12] + ("+" if git("status", "--porcelain", "--", "masksae").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class Entry:
    """An SAE to be scored."""

    row: dict
    """sae (its name), arm, p, grid, k, seed, architecture: what its rows begin with."""
    recipe: list
    """All that it is made of, but the code."""
    load: Callable[[], SAE] = field(repr=False)
    code: dict[str, dict[str, str]] = field(default_factory=lambda: {"modules": {}, "versions": {}}, repr=False)
    """What made it, as `provenance.made_by` says."""

    @property
    def name(self) -> str:
        return self.row["sae"]


class Subject:
    """Inputs and SAEs to be scored on them: what the functions of `masksae.study.scores` take. It has all that the
    inputs have.

    name   what it is called in progress bars
    notes  where its rows are noted; None: nowhere
    """

    def __init__(self, inputs: Inputs, name: str, entries: list[Entry], notes: Notes | None = None):
        self.inputs, self.name, self.entries, self.notes = inputs, name, entries, notes
        self.asked: list[dict] | None = None  # where it is a list: how rows stand is added there, and none are made

    def __getattr__(self, name: str):
        if name == "inputs":  # of an object that is being made
            raise AttributeError(name)
        return getattr(self.inputs, name)

    @property
    def names(self) -> list[str]:
        """Of the SAEs."""
        return [entry.name for entry in self.entries]

    @property
    def table(self) -> list[dict]:
        """One row per SAE, without scores."""
        return [dict(entry.row) for entry in self.entries]

    def load_saes(self) -> dict[str, SAE]:
        """The SAEs by name."""
        return {entry.name: entry.load() for entry in self.entries}

    def of(self, entries: list[Entry]) -> "Subject":
        """The same inputs with other SAEs, or some of these."""
        other = copy.copy(self)
        other.entries = entries
        return other

    def rows(self, score: str, section: Section, make: "Callable[[Subject], list[dict]]", *further: Section) -> list:
        """Rows of a score, SAE by SAE: read back where they are kept, and where not, what `make(subject)` gives for a
        subject with the SAEs that lack them.

        A row rests on its SAE, on `section` and `further` of the profile, and on the code that `make` reaches. Raises
        CodeError where that has changed since it was loaded.
        """
        made = self.made_of(score, make, section, *further)
        if self.asked is not None:
            self.asked += [{"score": score, "sae": name} | self.notes.state(score, name, made[name]) for name in made]
            return []
        taken = self.notes.rows(score, made) if self.notes else {}
        files = {name: _file(score, each) for name, each in made.items() if name not in taken}
        if missing := [name for name, file in files.items() if not file.exists()]:
            for name, rows in self._scored(missing, make).items():
                write_json(files[name], rows)
        found = taken | {name: read_json(file) for name, file in files.items()}
        if self.notes:
            self.notes.add(score, {name: made[name] for name in files}, found)
        return [entry.row | row for entry in self.entries for row in found[entry.name]]

    def made_of(self, score: str, make: Callable, *sections: Section) -> dict[str, Made]:
        """What each SAE's rows of a score are made of."""
        how, code = [score, self.identity(*sections)], provenance.made_by(make)
        return {each.name: Made([each.recipe, *how], provenance.joined(each.code, code)) for each in self.entries}

    def _scored(self, names: list[str], make: Callable[["Subject"], list[dict]]) -> dict[str, list[dict]]:
        """What is made for some SAEs, without what is the SAE's and not the score's: it may be called otherwise
        elsewhere."""
        some = self.of([entry for entry in self.entries if entry.name in names])
        own, found = {entry.name: entry.row for entry in some.entries}, {name: [] for name in names}
        for row in make(some):
            mine = own[row["sae"]]
            found[row["sae"]].append({k: v for k, v in row.items() if k not in mine or mine[k] != v})
        return found


def _file(score: str, made: Made) -> Path:
    return cache_dir("scores", f"{score}-{run_id(made.ids)}.json")
