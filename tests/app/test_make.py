"""`make setup` on a tiny project, with real environments and no network: one that works goes on working, whatever
becomes of its successor."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
import zipfile

def build_editable(folder, *_):
    with zipfile.ZipFile(f"{folder}/mine-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mine.pth", "/nowhere")
        wheel.writestr("mine-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: mine\\nVersion: 1\\n")
        wheel.writestr("mine-1.dist-info/WHEEL", \
"Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("mine-1.dist-info/RECORD", "")
    return "mine-1-py3-none-any.whl"
"""
PROJECT = (
    '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    '[project]\nname = "mine"\nversion = "1"\n'
)


def add_wheel(folder: Path, version: int) -> None:
    """A package "tiny" whose command prints its version."""
    folder.mkdir(exist_ok=True)
    record = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", f"def main(): print('tiny', {version})\n")
        wheel.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        wheel.writestr(
            f"{record}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{record}/entry_points.txt", "[console_scripts]\ntiny = tiny:main\n")
        wheel.writestr(f"{record}/RECORD", "")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "a bläh project"
    shutil.copytree(ROOT / "tools", folder / "tools")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "requirements.lock").write_text("tiny==1\n")
    return folder


def make(project, *targets):
    """Exit status, and what was said."""
    wheels = str(project.parent / "wheels")
    quiet = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    offline = quiet | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "PYTHON": sys.executable, "PYTHONPATH": ""}
    done = subprocess.run(["make", "-s", *targets], cwd=project, env=offline, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def environments(project) -> list[str]:
    return sorted(path.name for path in (project / ".venvs/venv").glob("*"))


def tiny(project) -> str:
    return subprocess.run([project / ".venv/bin/tiny"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_an_environment_works_until_its_successor_does(project):
    wheels = project.parent / "wheels"
    (project / ".venv").mkdir()  # of a setup that was broken off, by a version that made a folder
    status, said = make(project, "setup")
    assert status == 2 and "setting up .venv" in said
    [told] = [line for line in said.splitlines() if line.startswith("masksae: ")]
    assert told.startswith("masksae: .venv could not be made: ERROR: No matching distribution found for tiny==1.")
    assert "network" in told and not (project / ".venv/bin").exists() and environments(project) == []

    add_wheel(wheels, 1)
    assert make(project, "setup") == (0, "setting up .venv (once, a few minutes)\n") and tiny(project) == "tiny 1"
    [first] = environments(project)
    later = 4e9  # a clock that was wrong
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(project / name, (later, later))
    assert make(project, "setup") == (0, "")

    (project / "pyproject.toml").write_text(PROJECT + 'description = "more"\n')
    made = (project / ".venv/bin/tiny").stat().st_mtime_ns
    assert make(project, "setup") == (0, "") and environments(project) == [first]
    assert (project / ".venv/bin/tiny").stat().st_mtime_ns == made

    (project / "requirements.lock").write_text("tiny==2\n")
    status, said = make(project, "setup")
    assert status == 0 and tiny(project) == "tiny 1" and environments(project) == [first]
    assert said.splitlines()[1:] == [
        "masksae: .venv is not up to date and is used as it is, because: ERROR: No matching distribution found for "
        "tiny==2"
    ]

    add_wheel(wheels, 2)
    assert make(project, "setup")[0] == 0 and tiny(project) == "tiny 2"
    assert len(environments(project)) == 1 and environments(project) != [first]
    assert make(project, "clean") == (0, "") and not list(project.glob(".venv*"))


def test_a_place_that_cannot_be_written(project):
    """What is there is used: here a .venv that is a folder, as every version before made it."""
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").symlink_to(sys.executable)
    (project / ".venv/.ready").touch()
    (project / ".venvs").write_text("not a folder")
    status, said = make(project, "setup")
    assert status == 0 and "used as it is, because" in said and said.count("\n") == 1


def test_git_strips_notebooks_and_passes_them_on_without_an_environment(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools/environment.py")
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    done = subprocess.run(["sh", "-c", environment.STRIP], cwd=tmp_path, input="{}", capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{}", "")


def test_an_old_python_is_told_so():
    code = (
        "import sys\nsys.version_info = (3, 9, 1)\n"
        "sys.path.insert(0, 'tools')\nimport environment\nenvironment.main('.venv')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "Python 3.11 or later is needed, this is 3.9. Set PYTHON=.\n"
