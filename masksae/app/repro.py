"""The pipeline: its notebooks, run by DVC in the order of what they need.

The stages are written once, in the root's dvc.yaml, whose params.yaml names the default profile; a bare `dvc repro`
runs that. Another profile gets a folder build/NAME/ in which dvc.yaml is a link to the same file and params.yaml names
the profile: its own lock, its own outputs.
"""

import contextlib
import functools
import json
import os
import pydoc
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from masksae import provenance
from masksae.app import DEFAULT
from masksae.cache import contents
from masksae.errors import CodeError, ConfigError, require
from masksae.files import PROFILES, ensure_writable, read_json, repository, sha256, write_json, write_text
from masksae.study import times
from masksae.study.profile import Profile, load_profile, profile_path
from masksae.study.report.tables import to_text
from masksae.study.sections import Section

PATIENCE = 30.0
"""Seconds that a stage has to end."""


def reproduce(profile) -> int:
    """`dvc repro` for a profile; a good profile is checked before, a summary printed after."""
    ask_for_terms(load_profile(profile).model.source)
    check_fit(profile)
    if load_profile(profile).keep_pairs:
        print(taken(profile), flush=True)
        work_off_pairs(profile)
    status = dvc("repro", profile)
    if status == 0:
        name = load_profile(profile).name
        print(f"\nResults: results/{name}/claims.json, figures/{name}/, build/{name}/*.ipynb (executed notebooks)\n")
        from masksae.app import site
        from masksae.study.report.claims import spoken

        for key, value in read_json(repository() / "results" / name / "claims.json").items():
            print(f"  {key}  {spoken(value):16} {value['claim']}")
        print(f"\n{to_text(times.table(times.times(repository() / 'build' / name)))}")
        print(f"\n{site.where_to_read()}")
    return status


def taken(profile) -> str:
    """What a run of a profile that keeps its pairs takes from the results, by what has changed since they were made,
    and how to make it afresh; "" where there is nothing to take."""
    from masksae.study.check import check, has_results, since
    from masksae.study.run import Run

    run = Run(profile, writes=False)
    rows = check(run) if has_results(run.results) else []
    kept = [row for row in rows if row["state"] not in ("missing", "another profile")]
    if not kept:
        return ""
    pairs = os.path.relpath(run.results / "pairs", repository())
    said = f"{len(kept)} of {len(rows)} scores are taken from {pairs}, as they were made. To make them afresh: "
    return "\n  ".join([f"{said}`git rm -r {pairs}` first.", *since(kept)])


def work_off_pairs(profile) -> None:
    """Train and score a profile pair by pair, each kept in results/NAME/pairs as it is finished."""
    from masksae.study.run import Run
    from masksae.study.work import work_off

    work_off(Run(profile))


def check_fit(profile) -> None:
    """Say what a run still needs at most, and refuse one that cannot fit here. Raises ConfigError."""
    from masksae.app.plan import Plan
    from masksae.study.check import missing
    from masksae.study.run import Run

    run = Run(profile)
    parts, first = missing(run), run.parts[0]
    if first.part not in parts and any(map(run.missing, first.groups)):
        print(
            f"Notebook 10 looks into the SAEs of {first.name}, which are not here: they are trained for it.", flush=True
        )
        parts = [first.part, *parts]
    if parts:
        plan = Plan(run.profile, parts)
        memory, disk = (sum(parts.values()) / 1e9 for parts in (plan.memory(run.device), plan.disk()))
        needs = f"{run.profile.name} needs about {memory:.1f} GB of memory on {run.device} and {disk:.1f} GB of disk"
        print(f"{needs} (`masksae plan {profile}`)", flush=True)
        plan.check(run.device, run.kept_bytes)


def planned(profile, measure: bool) -> tuple:
    """What `plan.text` takes: the plan of a profile, the device, the bytes kept already, and with `measure` the hours
    it would take here."""
    from masksae.app.plan import Plan
    from masksae.study.run import Run

    run = Run(profile, writes=False)
    plan, measured = Plan(run.profile), None
    if measure:
        from masksae.app.measure import hours_here

        measured = hours_here(plan, run.device)
    return plan, run.device, run.kept_bytes, measured


def run_guide() -> Path:
    """Run docs/own_model.ipynb as it stands, in build/guide/; its page is docs/own-model.md."""
    from masksae.app.notebooks import execute, save_markdown

    root = repository()
    ask_for_terms("gemma3-270m")
    folder = ensure_writable(root / "build" / "guide")
    executed = execute(root / "docs" / "own_model.ipynb", folder / "own_model.ipynb", {}, cwd=folder)
    return save_markdown(executed, root / "docs" / "own-model.md")


def ask_for_terms(source: str) -> None:
    """Show the terms of a model that has some, once, and ask. Raises SourceError if they are refused, or if nobody is
    there to ask."""
    from masksae.data.models import accept_terms, require_terms, terms

    text = terms(source)
    if text and sys.stdin and sys.stdin.isatty():
        pydoc.pager(text)
        if input(f"Do you accept these terms, for {source}? Type yes: ").strip().lower() == "yes":
            accept_terms(source)
    require_terms(source)


def dvc(command: str, profile) -> int:
    """Run a DVC command on a profile's pipeline. Raises ConfigError outside a clone, or without DVC."""
    require("pipeline", "dvc", "papermill")
    if not (repository() / "dvc.yaml").exists():
        raise ConfigError(f"{repository()} is in no clone of the project (there is no dvc.yaml). Change into one.")
    file = pipeline_file(profile)
    if (repository() / "build" / load_profile(profile).name / "projection").exists():
        project_notebooks(profile)  # another version of a library is no file that DVC could look at
    _drop_torn_lock(repository() / ".dvc/tmp/rwlock")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # the stages call `python`
    command_line = [sys.executable, "-m", "dvc", command, str(file)]
    return run_group(command_line, cwd=repository(), env=os.environ | {"PATH": path})


def _drop_torn_lock(file: Path) -> None:
    """Remove DVC's list of what its stages hold if a kill left it empty or cut short, since DVC would not start then.
    Another DVC that is at work could not go on with such a file either."""
    from dvc.lock import make_lock

    if file.exists():
        with make_lock(f"{file}.lock", tmp_dir=str(file.parent)):  # as DVC does to write it
            try:
                json.loads(file.read_bytes())
            except ValueError:
                file.unlink()


def run_group(command: list[str], **options) -> int:
    """Exit status of a command whose whole family (DVC, its stage, the stage's kernel) ends when we are told to end.

    It gets a process group of its own, and from us one SIGINT, whichever signal came and whoever sent it: DVC waits for
    its stage then, and lets go of its locks. What has not ended after PATIENCE seconds, or at a second signal, is
    killed. A shell that starts us in the background has its children ignore SIGINT; these do not.
    """
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, process_group=0, preexec_fn=heed, **options)
    try:
        return process.wait()
    except BaseException:
        try:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        finally:  # a second Ctrl-C ends the waiting
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def pipeline_file(profile) -> Path:
    """The dvc.yaml of a profile, made on first use, relative to the project's root. Raises ConfigError."""
    loaded, path = load_profile(profile), profile_path(profile)
    name, file = loaded.name, os.path.relpath(path, repository())
    if name == DEFAULT:
        return Path("dvc.yaml")
    if not file.isprintable() or file.startswith("-"):  # DVC runs each line of a command by itself
        raise ConfigError(
            f"{file!r} cannot stand in a command of the pipeline: expected a path in printable characters that does "
            "not start with a dash. Rename it."
        )
    folder = ensure_writable(repository() / "build" / name)
    values = file
    if path.resolve().parent != PROFILES or loaded.keep_pairs:
        values = f"build/{name}/values.yaml"
        write_text(folder / "values.yaml", yaml.safe_dump(_values(loaded), sort_keys=False))
    params = {"profile": name, "profile_file": shlex.quote(file), "profile_values": values, "root": "../.."}
    if values != file and (folder / "params.yaml").exists():  # a shipped name is nobody else's
        made_for = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["profile_file"]
        if made_for != params["profile_file"]:
            raise ConfigError(
                f"build/{name} belongs to the profile {made_for}, not to {file}. Rename one of them; if the file "
                f"was only moved, remove build/{name}/params.yaml."
            )
    write_text(folder / "params.yaml", yaml.safe_dump(params))
    if not (folder / "dvc.yaml").is_symlink():
        (folder / "dvc.yaml").symlink_to("../../dvc.yaml")
    return Path("build") / name / "dvc.yaml"


def _values(profile: Profile) -> dict:
    """What DVC compares of a reader's own profile: every key that a stage names, though the file may leave most out;
    and beside the names of files in a section, what is in them, and what is in the kept pairs, which stages read."""
    values = profile.model_dump(mode="json")
    for name in Profile.model_fields:
        section = getattr(profile, name)
        if isinstance(section, Section) and (found := contents(section.named_data)):
            values[name]["contents"] = found
    pairs = sorted((repository() / "results" / profile.name / "pairs").glob("*.json"))
    values["training"]["kept_pairs"] = {file.name: sha256(file) for file in pairs if profile.keep_pairs}
    return values


def project_notebooks(profile) -> None:
    """Write build/NAME/projection/NN.json for each notebook, all that its stage depends on but the profile: type,
    source and tags of its cells, and nothing that running it alters; the modules that they reach, whatever only a
    reader sees left out; and versions of libraries."""
    import nbformat

    root = repository()
    folder = root / "build" / load_profile(profile).name / "projection"
    pages = {file.name: sha256(file) for file in sorted((provenance.PACKAGE / "study").rglob("*.html"))}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        kept = [{"type": c.cell_type, "source": c.source, "tags": c.metadata.get("tags", [])} for c in cells]
        lines = "\n".join(cell.source for cell in cells if cell.cell_type == "code").splitlines()
        text = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
        code = provenance.made_by(*provenance.imported(text), neutral=frozenset())
        write_json(folder / f"{path.stem}.json", {"cells": kept, "pages": pages, **code})


def execute(notebook: str, profile) -> None:
    """Execute a notebook of a profile into build/NAME/; the same run gives the same bytes."""
    from masksae.app.notebooks import execute

    root, name = repository(), load_profile(profile).name
    target, source = root / "build" / name / f"{notebook}.ipynb", root / "notebooks" / f"{notebook}.ipynb"
    read = {file: file.read_bytes() for file in (source, profile_path(profile)) if file.is_file()}
    with times.timed(root / "build" / name, notebook):
        execute(source, target, {"profile": str(profile)}, cwd=root)
        # DVC notes what a stage depends on only after it: what it would note now is not what was run
        changed = provenance.changed() + [file.name for file, data in read.items() if file.read_bytes() != data]
        if changed:
            target.unlink()
            raise CodeError(
                f"{', '.join(changed)} changed while {notebook} ran, so it may have used either text. Run it again; "
                "what is finished is kept."
            )
