"""dvc.yaml names what its stages use, notebooks are projected and executed without a trace of when, errors come without
a traceback."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from masksae import provenance
from masksae.app import DEFAULT, cli, repro
from masksae.errors import CodeError, ConfigError
from masksae.files import PROFILES, write_json, write_text
from masksae.study.profile import Profile

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NOTEBOOKS = {stage["cmd"].split()[4]: name for name, stage in STAGES.items() if " run " in stage["cmd"]}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_stage_depends_on_its_notebook_and_on_the_code_below(notebook):
    assert f"build/${{profile}}/projection/{notebook}.json" in STAGES[NOTEBOOKS[notebook]]["deps"]


def test_every_notebook_has_a_stage_and_every_output_is_of_one_profile():
    files = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert files == sorted(NOTEBOOKS)
    assert STAGES["projection"]["deps"] == ["notebooks", "masksae", "requirements.lock"]
    for stage in STAGES.values():
        for kind in ("outs", "metrics", "plots"):
            for out in stage.get(kind, []):
                path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
                assert "/${profile}/" in path
                assert ("cache" in options) == (kind != "outs")  # elsewhere it would disable the run cache
        for params in stage.get("params", []):
            assert set(params["${profile_values}"]) <= set(Profile.model_fields)


@pytest.mark.parametrize("path", [p for p in sorted(PROFILES.glob("*.yaml")) if p.stem != "gate"], ids=lambda p: p.stem)
def test_every_profile_has_every_key_that_a_stage_depends_on(path):
    """DVC stops at a key that is not there, even one with a default. The gate has no notebooks."""
    keys = {
        key for stage in STAGES.values() for params in stage.get("params", []) for key in params["${profile_values}"]
    }
    assert keys <= set(yaml.safe_load(path.read_text()))


def test_a_missing_result_is_blamed_on_the_notebook_that_writes_it():
    from masksae.study.inputs import WRITES

    written = {
        Path(next(iter(out))).stem: stage["cmd"].split()[4]
        for stage in STAGES.values()
        for out in stage.get("metrics", [])
    }
    assert {name: notebook for notebook, names in WRITES.items() for name in names} == written


def test_a_stage_depends_on_the_results_that_its_notebook_reads():
    from masksae.study.inputs import WRITES

    known, readers = {name for names in WRITES.values() for name in names}, 0
    for notebook, stage in NOTEBOOKS.items():
        cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        read = {name for text in sources if "run.result(" in text for name in re.findall(r'"(\w+)"', text)} & known
        readers += bool(read)
        assert {f"results/${{profile}}/{name}.json" for name in read} <= {*STAGES[stage]["deps"]}, notebook
    assert readers >= 2


def test_default_profile():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert params == {
        "profile": "laptop",
        "profile_file": "masksae/profiles/laptop.yaml",
        "profile_values": "masksae/profiles/laptop.yaml",
        "root": ".",
    }
    assert DEFAULT == "laptop"


def md5_of(path: Path) -> str:
    """As DVC notes a file or a folder."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted((file.relative_to(path).as_posix(), md5_of(file)) for file in path.rglob("*") if file.is_file())
    entries = [{"md5": md5, "relpath": name} for name, md5 in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def test_the_lock_of_the_default_profile_is_of_the_committed_results():
    """So in a fresh clone `dvc status` says what is missing (executed notebooks, SAEs), and nothing is wrong."""
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    values, checked = yaml.safe_load((PROFILES / "laptop.yaml").read_text()), 0
    assert lock.keys() == STAGES.keys()
    for stage in lock.values():
        for out in stage["outs"]:
            if not out["path"].startswith("build/"):
                assert md5_of(ROOT / out["path"]) == out["md5"], out["path"]
                checked += 1
        for keys in stage.get("params", {}).values():
            assert {key: values[key] for key in keys} == keys
    assert checked >= 20


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_notebook(folder, *sources, name="01_try", outputs=()):
    cells = [nbformat.v4.new_code_cell(s, id=f"01-{i:02d}") for i, s in enumerate(sources)]
    cells[0].metadata["tags"] = ["parameters"]
    cells[-1].outputs = list(outputs)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"notebooks/{name}.ipynb")


def projection(folder):
    repro.project_notebooks("smoke")
    return (folder / "build/smoke/projection/01_try.json").read_text()


def test_projection_sees_sources_and_tags_only(project):
    write_notebook(project, "profile = 1", "x = 1")
    plain = projection(project)
    write_notebook(project, "profile = 1", "x = 1", outputs=[nbformat.v4.new_output("stream", text="ran")])
    assert projection(project) == plain
    write_notebook(project, "profile = 1", "x = 2")
    assert projection(project) != plain
    assert json.loads(plain)["cells"][0] == {"type": "code", "source": "profile = 1", "tags": ["parameters"]}


def test_projection_sees_the_code_that_a_notebook_reaches_and_versions_of_libraries(project, monkeypatch):
    cells = "profile = 1", "%matplotlib inline\nfrom masksae import Run\nfrom masksae.study.report import claims"
    write_notebook(project, *cells)
    first = json.loads(projection(project))
    assert {"study.run", "training.step", "study.report.claims", "study.sections"} <= first["modules"].keys()
    assert not {"study.scores.probing", "app.repro"} & first["modules"].keys()
    assert "latents.html" in first["pages"] and first["versions"]["torch"]
    monkeypatch.setattr(provenance, "_version", lambda package: "99.1")
    monkeypatch.setattr(provenance, "_hash", lambda text: "edited")
    second = json.loads(projection(project))
    assert {*second["modules"].values()} == {"edited"} and second["versions"]["torch"] == "99.1"


def test_execution_injects_the_profile_and_leaves_no_trace_of_when(project, capfd):
    source = "import sys, time\nfrom tqdm.notebook import tqdm\nprint(profile)\nprint(time.time(), file=sys.stderr)"
    source += "\nfor _ in tqdm(range(3)): pass"
    write_notebook(project, 'profile = "other"', source)
    target, contents = project / "build/smoke/01_try.ipynb", []
    for _ in range(2):
        repro.execute("01_try", "smoke")
        contents.append(target.read_bytes())
    assert contents[0] == contents[1]
    assert (project / "build/smoke/times.json").is_file() and not (project / "results").exists()  # which git tracks
    outputs = [o for c in nbformat.read(target, 4).cells if c.cell_type == "code" for o in c.outputs]
    assert [o.text for o in outputs] == ["smoke\n"] and not list(target.parent.glob("*.failed.ipynb"))
    assert "smoke" in capfd.readouterr().out  # and the terminal saw it as it went


def test_a_notebook_that_fails_is_kept_for_reading(project):
    write_notebook(project, 'profile = "other"', "assert 1 + 1 == 3, 'arithmetic'")
    from papermill import PapermillExecutionError

    with pytest.raises(PapermillExecutionError, match="arithmetic"):
        repro.execute("01_try", "smoke")
    kept = list((project / "build/smoke").glob("*.ipynb"))
    assert [path.name for path in kept] == ["01_try.failed.ipynb"] and "arithmetic" in kept[0].read_text()


def test_a_stage_fails_whose_notebook_or_code_changes_while_it_runs(project, monkeypatch):
    """DVC would note the new text, and not run it: what it notes a stage depends on it looks up after the stage."""
    write_notebook(project, 'profile = "x"', "open('notebooks/01_try.ipynb', 'a').write(' ')")
    with pytest.raises(CodeError, match="01_try.ipynb changed while 01_try ran.*Run it again"):
        repro.execute("01_try", "smoke")
    assert not list((project / "build/smoke").glob("*.ipynb"))
    write_notebook(project, 'profile = "x"', "1")
    monkeypatch.setattr(provenance, "changed", lambda: ["training.step"])
    with pytest.raises(CodeError, match="training.step changed while"):
        repro.execute("01_try", "smoke")


def test_the_kernel_is_this_python_whatever_is_registered(project, monkeypatch):
    spec = {"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}
    write_json(project / "jupyter/kernels/python3/kernel.json", spec)
    monkeypatch.setenv("JUPYTER_PATH", str(project / "jupyter"))
    write_notebook(project, 'profile = "other"', "import sys\nprint(sys.executable)")
    repro.execute("01_try", "smoke")
    outputs = [o for c in nbformat.read(project / "build/smoke/01_try.ipynb", 4).cells for o in c.outputs]
    assert [output.text for output in outputs] == [f"{sys.executable}\n"]


def test_each_profile_has_a_pipeline_of_its_own(project):
    text = (ROOT / "masksae/profiles/smoke.yaml").read_text().replace("name: smoke", "name: mine", 1)
    for folder in ("a", "b"):
        (project / folder).mkdir()
        (project / folder / "mine.yaml").write_text(text)
    assert repro.pipeline_file("laptop") == Path("dvc.yaml")
    assert repro.pipeline_file("a/mine.yaml") == Path("build/mine/dvc.yaml")
    assert (project / "build/mine/dvc.yaml").resolve() == project / "dvc.yaml"
    params = yaml.safe_load((project / "build/mine/params.yaml").read_text())
    values = "build/mine/values.yaml"
    assert params == {"profile": "mine", "profile_file": "a/mine.yaml", "profile_values": values, "root": "../.."}
    assert repro.pipeline_file("a/mine.yaml") == Path("build/mine/dvc.yaml")
    with pytest.raises(ConfigError, match="belongs to the profile a/mine.yaml, not to b/mine.yaml"):
        repro.pipeline_file("b/mine.yaml")


def test_a_stage_gets_the_path_of_a_profile_as_it_is(project):
    """Through DVC and a shell, as in dvc.yaml; the path holds all that either could read as its own."""
    assert all(stage["cmd"].endswith(" ${profile_file}") for stage in STAGES.values())
    file = 'a b\'s "c" $HOME ${profile} `id` *é \\ ; exit 3 #/mine.yaml'
    text = (ROOT / "masksae/profiles/smoke.yaml").read_text().replace("name: smoke", "name: mine", 1)
    write_text(project / file, text)
    say = "import sys; open('said', 'w').write(sys.argv[1])"
    stage = {"wdir": "${root}", "cmd": f'"{sys.executable}" -c "{say}" ${{profile_file}}'}
    write_text(project / "dvc.yaml", yaml.safe_dump({"stages": {"say": stage}}))
    write_text(project / "params.yaml", (ROOT / "params.yaml").read_text())
    write_text(project / ".dvc/config", "[core]\n    no_scm = True\n    analytics = false\n")
    for _ in range(2):  # the second time build/mine is there
        assert repro.dvc("repro", file) == 0
    assert (project / "said").read_text() == file


@pytest.mark.parametrize("left", ["", '{"write": {"/a'])
def test_a_lock_that_a_kill_left_torn_does_not_stop_the_next_run(project, left):
    (project / "dvc.yaml").write_text("stages: {try: {cmd: echo done > said}}")
    write_text(project / ".dvc/config", "[core]\n    no_scm = True\n    analytics = false\n")
    write_text(project / ".dvc/tmp/rwlock", left)
    assert repro.dvc("repro", "laptop") == 0 and (project / "said").read_text() == "done\n"
    held = {"write": {str(project / "x"): {"pid": os.getpid(), "cmd": "dvc"}}, "read": {}}
    write_json(project / ".dvc/tmp/rwlock", held)
    assert repro.dvc("status", "laptop") == 0
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == held  # a whole one is another DVC's


@pytest.mark.parametrize("folder", ["a\nb", "-a", "a\u2028b"])
def test_a_path_that_no_command_can_hold_is_refused(project, folder):
    text = (ROOT / "masksae/profiles/smoke.yaml").read_text().replace("name: smoke", "name: mine", 1)
    write_text(project / folder / "mine.yaml", text)
    with pytest.raises(ConfigError, match="cannot stand in a command.*Rename it") as caught:
        repro.dvc("repro", f"{folder}/mine.yaml")
    assert "\n" not in str(caught.value) and not (project / "build").exists()


def test_a_shipped_profile_that_moved_is_still_itself(project):
    (project / "build/smoke").mkdir(parents=True)
    (project / "build/smoke/params.yaml").write_text("profile: smoke\nprofile_file: profiles/smoke.yaml\nroot: ../..\n")
    assert repro.pipeline_file("smoke") == Path("build/smoke/dvc.yaml")
    params = yaml.safe_load((project / "build/smoke/params.yaml").read_text())
    assert params["profile_file"].endswith("masksae/profiles/smoke.yaml") and params["profile_values"]


def test_outside_a_clone_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status", "laptop"]) == 2
    assert f"{tmp_path} is in no clone of the project" in capsys.readouterr().err


STAND_IN = """
import sys
from pathlib import Path
print("ran", *sys.argv[1:], flush=True)
outs = {"project": ["projection/00_mechanism.json"], "run": ["00_mechanism.ipynb"]}[sys.argv[1]]
places = [Path("build/laptop", out) for out in outs]
if sys.argv[1] == "project":
    made = Path("notebooks/00_mechanism.ipynb").read_text().split("outputs")[0] + Path("masksae/masking.py").read_text()
else:
    made, places = "{}", [*places, Path("results/laptop/mechanism.json"), Path("figures/laptop/00_mechanism/a.svg")]
for place in places:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(made)
"""


def test_what_cannot_change_a_result_reruns_nothing(project, monkeypatch):
    """The real dvc.yaml and .dvcignore under real DVC; a stand-in for the commands."""
    for name in (
        "dvc.yaml",
        "params.yaml",
        "requirements.lock",
        ".dvcignore",
        ".dvc/config",
        "masksae/profiles/laptop.yaml",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text((ROOT / name).read_text())
    for folder in ("masksae/app", "masksae/__pycache__"):
        (project / folder).mkdir()
    core, app, notebook = (
        project / name for name in ("masksae/masking.py", "masksae/app/cli.py", "notebooks/00_mechanism.ipynb")
    )
    core.write_text("")
    app.write_text(STAND_IN)
    (project / "masksae/__main__.py").write_text("import masksae.app.cli")
    notebook.write_text("sources outputs")
    bin_, old = str(Path(sys.executable).parent), os.environ["PATH"]
    environment = os.environ | {"PYTHONPATH": ".", "PATH": os.pathsep.join([bin_, old])}

    def ran() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", "mechanism"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]

    assert ran() == ["project", "run"] and ran() == []
    app.write_text(STAND_IN + "# another word")
    (project / "masksae/__main__.py").write_text("import masksae.app.cli  # too")
    (project / "masksae/__pycache__/a.pyc").write_text("x")
    assert ran() == []
    notebook.write_text("sources outputs of a run")
    assert ran() == ["project"]
    notebook.write_text("other sources outputs")
    assert ran() == ["project", "run"]
    core.write_text("x = 1")
    assert ran() == ["project", "run"]


def test_a_short_profile_gets_every_key_that_a_stage_depends_on(project):
    (project / "mine.yaml").write_text(
        "name: mine\nmodel: {source: smollm2-135m, block: 4, mask_token: <|endoftext|>}\n"
        "text: {sources: [web-news], train_tokens: 9000}\n"
        "saes: [{name: a, selection: {rule: batch_topk, k: 9}, n_latents: 64}]\n"
    )
    repro.pipeline_file("mine.yaml")
    keys = {
        key for stage in STAGES.values() for params in stage.get("params", []) for key in params["${profile_values}"]
    }
    values = yaml.safe_load((project / "build/mine/values.yaml").read_text())
    assert keys <= set(values) and values["blocks"][0]["pairs"] == [0, 1, 2] and values["arms"][1]["p"] == 0.3


def test_a_notebook_that_is_not_there_is_told_in_a_line(project, capsys):
    write_notebook(project, "1")
    assert cli.main(["run", "01_tri", "smoke"]) == 2
    told = capsys.readouterr().err
    assert "notebooks/01_tri.ipynb. Did you mean '01_try'?" in told and told.count("\n") == 1
    assert not list(project.glob("build/smoke/*.ipynb"))


@pytest.mark.parametrize("command", ["repro", "status", "project"])
def test_bad_profiles_are_told_in_a_line(command, capsys, project):
    assert cli.main([command, "smok"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("masksae: There is no profile 'smok'. Did you mean 'smoke'") and "Traceback" not in told


@pytest.fixture
def start(project):
    """Starts `masksae repro` in a process of its own: real DVC, and a stage that says when it is busy, and by which
    processes; to be stopped."""
    write_text(project / ".dvc/config", "[core]\n    no_scm = True\n    analytics = false\n")
    code = (
        "import sys\nfrom masksae.app import exits, repro\n"
        "sys.exit(exits.exit_status(lambda: repro.dvc('repro', 'laptop')))"
    )

    def started(stage: str):
        (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"try": {"cmd": stage}}}))
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run in the background
        )  # fmt: skip
        begun = list(itertools.takewhile("busy\n".__ne__, process.stdout))  # or all it says, if it ends before
        assert process.poll() is None, begun
        return process, psutil.Process(process.pid).children(recursive=True)

    return started


def living(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended within two seconds; one that nobody has asked about since it ended (a zombie) has."""
    for _ in range(20):
        found = []
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [each] if each.status() != psutil.STATUS_ZOMBIE else []
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_dvc_its_stage_and_the_kernel_in_a_line(number, project, start):
    """To our process alone, as `kill` sends it: a real kernel in the middle of a cell, nothing left, no lock held."""
    busy = "import os, time\nopen('kernel', 'w').write(str(os.getpid()))\nprint('busy', flush=True)\ntime.sleep(99)"
    write_notebook(project, 'profile = "x"', busy)
    process, family = start("python -m masksae run 01_try laptop")
    assert int((project / "kernel").read_text()) in {each.pid for each in family}
    process.send_signal(number)
    said, _ = process.communicate(timeout=40)
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert said.endswith("masksae: interrupted; what was finished is kept, and the same command goes on.\n")
    assert len(said.splitlines()) <= 4, said  # the stage's own, and DVC's about the stage
    assert living(family) == []
    assert subprocess.run([sys.executable, "-m", "dvc", "status", "-q"]).returncode in (0, 1)


def test_a_second_interrupt_ends_at_once_what_does_not_heed_the_first(project, start):
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('busy', flush=True)\ntime.sleep(99)"
    )
    (project / "deaf.py").write_text(deaf)
    process, family = start("python deaf.py")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(5) == 130 and living(family) == []
    finally:
        for each in living(family):
            each.kill()
    assert "Traceback" not in process.stdout.read()


def test_a_notebook_that_nobody_interrupts_ends_without_a_word(project, capfd):
    """Jupyter interrupts a kernel before it asks it to end; here that always meets one that has just answered and is
    not yet idle."""
    slow = "import time\nhandlers = get_ipython().kernel.shell_handlers\nanswer = handlers['kernel_info_request']\n"
    slow += "async def late(*message): await answer(*message); time.sleep(2)\nhandlers['kernel_info_request'] = late"
    write_notebook(project, 'profile = "x"', slow)
    repro.execute("01_try", "smoke")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_nobody_is_asked_through_a_closed_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    repro.ask_for_terms("smollm2-135m")
