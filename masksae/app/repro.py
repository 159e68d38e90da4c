"""What `dvc.yaml` and the Makefile call: `python -m masksae.app.repro repro PROFILE`, `run NOTEBOOK PROFILE`, `project PROFILE`.

The stages are written once, in the root's dvc.yaml, whose params.yaml names the default profile; a bare `dvc repro` runs that.
Another profile gets a folder build/NAME/ in which dvc.yaml is a link to the same file and params.yaml names the profile: its
own lock, its own outputs.
"""

import argparse
import contextlib
import os
import pydoc
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from masksae.app.cli import exit_status
from masksae.cache import contents
from masksae.errors import ConfigError
from masksae.files import PROFILES, ensure_writable, read_json, repository, write_json, write_text
from masksae.study.profile import Profile, load_profile, profile_path
from masksae.study.sections import Section

DEFAULT = "laptop"

PATIENCE = 30.0
"""Seconds that a stage has to end."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 bad input, 130 interrupted (both said in one line)."""
    parser = argparse.ArgumentParser(prog="python -m masksae.app.repro", description="Run the notebooks through DVC.")
    commands = parser.add_subparsers(required=True)
    repro = commands.add_parser("repro", help="bring every result of some profiles up to date")
    repro.add_argument("profiles", nargs="*", default=[DEFAULT], help="names or paths of YAML files")
    repro.set_defaults(run=lambda a: next(filter(None, map(reproduce, a.profiles)), 0))
    plan = commands.add_parser("plan", help="what a profile costs; needs no network")
    plan.add_argument("profiles", nargs="*", default=[DEFAULT])
    plan.add_argument("--measure", action="store_true", help="time a fraction of the work here, too: a minute")
    plan.set_defaults(run=lambda a: [print_plan(profile, a.measure) for profile in a.profiles] and None)
    verify = commands.add_parser("verify", help="published numbers beside ours; exit status 1 if some differ")
    verify.add_argument("profile", nargs="?", default="paper")
    verify.set_defaults(run=lambda a: print_verification(a.profile))
    upload = commands.add_parser("share", help="SAEs of a finished profile in SAELens' form, with a model card")
    upload.add_argument("profile", nargs="?", default=DEFAULT)
    upload.add_argument("--to", metavar="OWNER/NAME", help="push them to this repository of the hub")
    upload.set_defaults(run=lambda a: share_saes(a.profile, a.to))
    guide = commands.add_parser("guide", help="run the guide to a model of one's own, into docs/own-model.md")
    guide.set_defaults(run=lambda a: print(run_guide()))
    status = commands.add_parser("status", help="what `repro` would do")
    status.add_argument("profile", nargs="?", default=DEFAULT)
    status.set_defaults(run=lambda a: dvc("status", a.profile))
    run = commands.add_parser("run", help="execute one notebook (a DVC stage)")
    run.add_argument("notebook", help="such as 03_reconstruction")
    run.add_argument("profile")
    run.set_defaults(run=lambda a: execute(a.notebook, a.profile))
    project = commands.add_parser("project", help="write what matters of each notebook (a DVC stage)")
    project.add_argument("profile")
    project.set_defaults(run=lambda a: project_notebooks(a.profile))
    options = parser.parse_args(arguments)
    return exit_status(lambda: options.run(options))


def reproduce(profile) -> int:
    """`dvc repro` for a profile; a good profile is checked before, a summary printed after."""
    ask_for_terms(load_profile(profile).model.source)
    check_fit(profile)
    status = dvc("repro", profile)
    if status == 0:
        name = load_profile(profile).name
        print(f"\nResults: results/{name}/claims.json, figures/{name}/, build/{name}/*.ipynb (executed notebooks)\n")
        for key, value in read_json(repository() / "results" / name / "claims.json").items():
            print(f"  {key}  {value['verdict']:13} {value['claim']}")
        from masksae.app import site

        print(f"\nTo read: {site.build().as_uri()}")
    return status


def check_fit(profile) -> None:
    """Say what a run needs at most, and refuse one that cannot fit here. Raises ConfigError."""
    from masksae.app.plan import Plan
    from masksae.study.run import Run

    run = Run(profile)
    plan = Plan(run.profile)
    if not run.finished:
        memory, disk = (sum(parts.values()) / 1e9 for parts in (plan.memory(run.device), plan.disk()))
        print(
            f"{run.profile.name} needs up to {memory:.1f} GB of memory on {run.device} and {disk:.1f} GB of disk (`make plan`)",
            flush=True,
        )
        plan.check(run.device, run.kept_bytes)


def planned(profile, measure: bool) -> tuple:
    """What `plan_report` takes: the plan of a profile, the device, the bytes kept already, and with `measure` the hours it would take here."""
    from masksae.app.plan import Plan
    from masksae.study.run import Run

    run = Run(profile)
    plan, measured = Plan(run.profile), None
    if measure:
        from masksae.app.measure import hours_here

        measured = hours_here(plan, run.device)
    return plan, run.device, run.kept_bytes, measured


def print_plan(profile, measure: bool) -> None:
    """Print the cost of a profile; with `measure`, time a fraction of it here."""
    from masksae.app import plan_text

    print(plan_text.text(*planned(profile, measure)) + "\n")


def print_verification(profile) -> int:
    """Print the reference checks of a profile; 1 if some number differs."""
    from masksae.app import verify
    from masksae.study.run import Run

    run = Run(profile)
    checks = verify.verify(run)
    print(verify.text(checks, run.profile.name))
    return int(any(check.verdict == "differs" for check in checks))


def share_saes(profile, repository: str | None) -> None:
    """Build the folder for the hub, and push it if a repository is named."""
    from masksae.app import upload
    from masksae.study.run import Run

    print(upload.upload(Run(profile), repository) if repository else upload.build(Run(profile)))


def run_guide() -> Path:
    """Run docs/own_model.ipynb as it stands, in build/guide/; its page is docs/own-model.md."""
    from masksae.app.notebooks import execute, save_markdown

    root = repository()
    ask_for_terms("gemma3-270m")
    folder = ensure_writable(root / "build" / "guide")
    executed = execute(root / "docs" / "own_model.ipynb", folder / "own_model.ipynb", {}, cwd=folder)
    return save_markdown(executed, root / "docs" / "own-model.md")


def ask_for_terms(source: str) -> None:
    """Show the terms of a model that has some, once, and ask. Raises SourceError if they are refused, or if nobody is there to ask."""
    from masksae.data.models import accept_terms, require_terms, terms

    text = terms(source)
    if text and sys.stdin and sys.stdin.isatty():
        pydoc.pager(text)
        if input(f"Do you accept these terms, for {source}? Type yes: ").strip().lower() == "yes":
            accept_terms(source)
    require_terms(source)


def dvc(command: str, profile) -> int:
    """Run a DVC command on a profile's pipeline."""
    file = pipeline_file(profile)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # the stages call `python`
    command_line = [sys.executable, "-m", "dvc", command, str(file)]
    return run_group(command_line, cwd=repository(), env=os.environ | {"PATH": path})


def run_group(command: list[str], **options) -> int:
    """Exit status of a command whose whole family (DVC, its stage, the stage's kernel) ends when we are told to end.

    It gets a process group of its own, and from us one SIGINT, whichever signal came and whoever sent it: DVC waits for its stage then, and
    lets go of its locks. What has not ended after PATIENCE seconds is killed.
    """
    process = subprocess.Popen(command, process_group=0, **options)
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _upgrade_params() -> None:
    """DVC reads the pipelines of all profiles whichever it runs: give those made by version 0.1 the key that they lack."""
    for path in (repository() / "build").glob("*/params.yaml"):
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "profile_values" not in params:
            write_text(path, yaml.safe_dump(params | {"profile_values": params["profile_file"]}))


def pipeline_file(profile) -> Path:
    """The dvc.yaml of a profile, made on first use, relative to the project's root. Raises ConfigError."""
    name, file = load_profile(profile).name, os.path.relpath(profile_path(profile), repository())
    _upgrade_params()
    if name == DEFAULT:
        return Path("dvc.yaml")
    folder = ensure_writable(repository() / "build" / name)
    values = file
    if profile_path(profile).resolve().parent != PROFILES:
        values = f"build/{name}/values.yaml"
        write_text(folder / "values.yaml", yaml.safe_dump(_values(load_profile(profile)), sort_keys=False))
    params = {"profile": name, "profile_file": file, "profile_values": values, "root": "../.."}
    if (folder / "params.yaml").exists():
        made_for = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["profile_file"]
        if made_for != file:
            raise ConfigError(
                f"build/{name} belongs to the profile {made_for}, not to {file}. Rename one of them, or remove build/{name}."
            )
    write_text(folder / "params.yaml", yaml.safe_dump(params))
    if not (folder / "dvc.yaml").is_symlink():
        (folder / "dvc.yaml").symlink_to("../../dvc.yaml")
    return Path("build") / name / "dvc.yaml"


def _values(profile: Profile) -> dict:
    """What DVC compares of a reader's own profile: every key that a stage names, though the file may leave most out; and beside the
    names of files in a section, what is in them."""
    values = profile.model_dump(mode="json")
    for name in Profile.model_fields:
        section = getattr(profile, name)
        if isinstance(section, Section) and (found := contents(section.named_data)):
            values[name]["contents"] = found
    return values


def project_notebooks(profile) -> None:
    """Write build/NAME/projection/NN.json for each notebook: type, source and tags of its cells, and nothing that running it alters."""
    import nbformat

    root = repository()
    folder = root / "build" / load_profile(profile).name / "projection"
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        kept = [{"type": c.cell_type, "source": c.source, "tags": c.metadata.get("tags", [])} for c in cells]
        write_json(folder / f"{path.stem}.json", kept)


def execute(notebook: str, profile) -> None:
    """Execute a notebook of a profile into build/NAME/; the same run gives the same bytes."""
    from masksae.app.notebooks import execute

    root = repository()
    target = root / "build" / load_profile(profile).name / f"{notebook}.ipynb"
    execute(root / "notebooks" / f"{notebook}.ipynb", target, {"profile": str(profile)}, cwd=root)


if __name__ == "__main__":
    sys.exit(main())
