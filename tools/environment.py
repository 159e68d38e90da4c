"""The project's virtual environments: `python3 tools/environment.py .venv` (or .venv-peers) makes one, and is silent
where it is ready.

An environment is built as .venvs/NAME/HASH and stays there, because its scripts hold that path; `.venv` is a link that
turns to it once it is whole. So what works goes on working until its successor does: offline, on a full disk, after
Ctrl-C. The hash is of what decides the packages, and no time of a file counts. Only the standard library: this runs
before anything is installed.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venvs"
LOCKS = {".venv": "requirements.lock", ".venv-peers": "requirements-peers.lock"}
PACKAGES = {
    ".venv": ["-r requirements.lock"],
    ".venv-peers": ["--no-deps -r requirements-peers.lock", "--no-deps --target {place}/nnsight-0.3 nnsight==0.3.7"],
}
"""Arguments of `pip install`, one call after the other."""

PROJECT = "--no-build-isolation --no-deps -e ."
"""The same for this project itself, in place; it is done again whenever pyproject.toml says something else, in
seconds."""

STRIP = "if [ -x .venv/bin/python ]; then .venv/bin/python -m nbstripout --keep-id; else cat; fi"
"""Git's filter for notebooks: outputs never reach a commit."""


class Failed(Exception):
    """A command that failed: the line of its output that says why."""


def main(name: str) -> int:
    """Exit status: 0 ready (or as it was, with a warning), 1 there is none."""
    if sys.version_info < (3, 11):  # noqa: UP036 (whatever `python3` is)
        sys.exit("Python 3.11 or later is needed, this is {}.{}. Set PYTHON=.".format(*sys.version_info))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    link, place = ROOT / name, HOME / name.lstrip(".") / packages_hash(name)
    if is_ready(link, place):
        return 0
    try:
        HOME.mkdir(exist_ok=True)
        with open(HOME / "lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a second `make` waits for the first
            if not is_ready(link, place):
                bring_up_to_date(name, link, place)
        return 0
    except (Failed, OSError) as error:
        if is_usable(link):
            print(f"masksae: {name} is not up to date and is used as it is, because: {error}", file=sys.stderr)
            return 0
        remedy = f"Is there a network, and room on the disk? Then the same command again. All that was said: {HOME}/log"
        print(f"masksae: {name} could not be made: {error}. {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"masksae: interrupted; {name} is as it was.", file=sys.stderr)
        return 130


def packages_hash(name: str) -> str:
    """Of everything that decides which packages lie where: pins, commands, Python, and this folder, whose path scripts
    hold."""
    parts = [(ROOT / LOCKS[name]).read_text(encoding="utf-8"), *PACKAGES[name], str(ROOT)]
    parts += [sys.implementation.cache_tag, sysconfig.get_platform()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def project_hash() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def is_usable(place: Path) -> bool:
    """Whether an environment was finished once, and its Python is still there."""
    return (place / ".ready").exists() and os.access(place / "bin" / "python", os.X_OK)


def is_ready(link: Path, place: Path) -> bool:
    return is_usable(place) and link.resolve() == place and (place / ".ready").read_text() == project_hash()


def bring_up_to_date(name: str, link: Path, place: Path) -> None:
    """Raises Failed or OSError; the environment that `link` points to is then as it was."""
    if not is_usable(place):
        print(f"setting up {name} (once, a few minutes)", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        try:
            run(sys.executable, "-m", "venv", place)
            for arguments in [*PACKAGES[name], PROJECT]:
                install(place, arguments)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    elif (place / ".ready").read_text() != project_hash():
        install(place, PROJECT)
    (place / ".ready").write_text(project_hash())
    turn(link, place)
    if name == ".venv" and (ROOT / ".git").exists() and shutil.which("git"):
        for key, value in {"clean": STRIP, "smudge": "cat", "required": "false"}.items():
            run("git", "config", f"filter.nbstripout.{key}", value)


def install(place: Path, arguments: str) -> None:
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, *(argument.format(place=place) for argument in arguments.split()))


def run(*command) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace")
        (HOME / "log").write_text(said, encoding="utf-8")
        lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"{command[0]} failed"]
        raise Failed(next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]))


def turn(link: Path, place: Path) -> None:
    """Point the link at an environment in one step, and remove those that came before."""
    if link.is_dir() and not link.is_symlink():  # a folder, as `python -m venv .venv` makes one
        os.replace(link, place.parent / "folder")
    new = place.parent / "link"
    new.unlink(missing_ok=True)
    new.symlink_to(place.relative_to(ROOT))  # as seen from where it goes
    os.replace(new, link)
    for old in place.parent.iterdir():
        if old != place:
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
