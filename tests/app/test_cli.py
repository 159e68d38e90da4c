"""The command line: what it prints, in which form, and with which exit status."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, troubles
from tiny_project import profile

import masksae
from masksae import SAE
from masksae.app import cli
from masksae.app.exits import exit_status
from masksae.errors import ConfigError
from masksae.files import write_text
from masksae.study.report.results import present

COMMANDS = (
    "repro", "status", "plan", "fetch", "train", "pairs", "gate", "match", "check", "compare", "verify", "reliability",
    "share", "site", "evaluate", "explore", "export", "guide", "run", "project",
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]


def told(capsys, *command):
    """What a command prints on stdout; it succeeds."""
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == 0
    return capsys.readouterr().out


def test_evaluate(run, folder, tmp_path, capsys):
    command = ["evaluate", folder, "--profile", run.source, "--metrics", "reconstruction", "--out", tmp_path / "out"]
    text = told(capsys, *command)
    assert "explained variance" in text and "matched" in text and max(map(len, text.splitlines()[:-1])) <= 80
    assert json.loads(told(capsys, *command, "--json"))["explained variance"].keys() == {"as_trained", "matched"}
    page = (tmp_path / "out/report.html").read_text()
    assert "mine" in page and "explained variance" in page and "@BODY@" not in page
    if CHROMIUM:
        assert troubles(tmp_path / "out", ["report.html"]) == []


def test_evaluate_and_explore_of_an_sae_of_another_model(run, tmp_path, capsys):
    sae = run.saes["unmasked-plain-s0"].to_saelens(tmp_path / "theirs", model_name="gpt2", hook_name="blocks.7")
    options = [str(sae), "--profile", str(run.source), "--out", str(tmp_path / "out")]
    for command in (["evaluate", *options], ["explore", *options, "--context", "the"]):
        assert cli.main(command) == 2
        assert "trained on gpt2 at blocks.7" in (said := capsys.readouterr().err) and "--anyway" in said
    assert "explained variance" in told(capsys, "evaluate", *options, "--metrics", "reconstruction", "--anyway")


def test_train(run, capsys):
    text = told(capsys, "train", run.source)
    assert max(map(len, text.splitlines()[:-3])) <= 80 and "unmasked-plain-s0" in text
    found = json.loads(told(capsys, "train", run.source, "--json"))
    assert {row["sae"] for row in found} == {row["sae"] for row in run.table}
    assert all(isinstance(SAE.load(row["folder"]), SAE) and 0 < row["explained_variance"] < 1 for row in found)


def test_train_names_the_next_step(run, capsys):
    line = told(capsys, "train", run.source).splitlines()[-1]
    next_, *command = shlex.split(line)
    options = cli.parser().parse_args(command[1:])
    assert (next_, command[0]) == ("Next:", "masksae") and SAE.load(options.sae) and options.profile == str(run.source)


def test_pages_of_two_saes_lie_beside_each_other(run, folder, tmp_path, monkeypatch, capsys):
    from masksae.study import explore

    story = explore.Story("starts with S", (0,), 0.5, 4, [], 0.9)
    monkeypatch.setattr(explore.Explorer, "letter", lambda *_: story)  # random weights pass no gate
    pages = set()
    for name in ("first", "second <b>"):  # a name is text, and no HTML
        shutil.copytree(folder, tmp_path / name)
        command = ["explore", tmp_path / name, "--letter", "s", "--profile", run.source, "--out", tmp_path / "out"]
        pages.add(told(capsys, *command).strip())
    assert pages == {str(tmp_path / "out" / f"{name}-starts-with-S.html") for name in ("first", "second-b-")}
    assert "second &lt;b&gt;" in (tmp_path / "out/second-b--starts-with-S.html").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["evaluate", "x", "--l0", "-3"], "'-3' is no mean number of active latents; give one above 0"),
        (["evaluate", "x", "--l0", "nan"], "'nan' is no mean number"),
        (["evaluate", "x", "--l0", "inf"], "'inf' is no mean number"),
        (["evaluate", "x", "--l0", "many"], "'many' is no mean number"),
        (["evaluate", "x", "--metrics", "typo"], "there is no metric 'typo'. Known: reconstruction"),
        (["evaluate", "x", "--metrics", "absorbtion,"], "there is no metric 'absorbtion'. Did you mean 'absorption'"),
        (["evaluate", "x", "--metrics", ""], "there is no metric ''"),
        (["explore", "x", "--letter", "ab"], "'ab' is no letter from a to z"),
        (["explore", "x", "--letter", ""], "'' is no letter"),
        (["explore", "x", "--letter", "é"], "'é' is no letter"),
    ],
)
def test_hostile_arguments_are_refused_before_anything_is_loaded(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full"])
def test_closed_streams(redirection):
    command = f'"{sys.executable}" -m masksae plan smoke {redirection}'
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == (2 if "full" in redirection else 0) and "Traceback" not in result.stderr, result.stderr


def test_a_poor_terminal():
    """Dumb, 20 columns wide, in a locale without our dashes and arrows."""
    poor = {"TERM": "dumb", "COLUMNS": "20", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments, status in (["train", "--help"], 0), (["plan", "smoke"], 0), (["plan", "smö"], 2):
        command = [sys.executable, "-m", "masksae", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | poor)
        assert result.returncode == status and "Traceback" not in result.stderr, result.stderr


def test_export(folder, tmp_path, capsys):
    text = told(capsys, "export", folder, tmp_path / "dl", "--to", "dictionary_learning", "--json")
    assert json.loads(text) == {"folder": str(tmp_path / "dl")}
    assert torch.equal(masksae.load_sae(tmp_path / "dl").W_dec, masksae.load_sae(folder).W_dec)
    told(capsys, "export", folder, tmp_path / "lens", "--to", "saelens", "--model", "m", "--hook", "blocks.3")
    metadata = json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("m", "blocks.3")
    told(capsys, "export", tmp_path / "lens", tmp_path / "again", "--to", "saelens", "--hook", "blocks.4")
    metadata = json.loads((tmp_path / "again/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("m", "blocks.4")
    assert cli.main(["export", str(folder), str(tmp_path / "x"), "--to", "saelens", "--layer", "3"]) == 2
    assert "saelens have no field for layer" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_fetch_and_plan(run, capsys):
    assert "blocks of train" in told(capsys, "fetch", run.source)
    assert json.loads(told(capsys, "fetch", run.source, "--json"))["blocks"]["train"] == 200
    text = told(capsys, "plan", run.source)
    assert "Space:" in text and max(map(len, text.splitlines()[3:-1])) <= 80
    plan = json.loads(told(capsys, "plan", "paper", "--json"))
    assert (
        plan["flop"].keys() == {"activations", "training", "evaluation"} and plan["hours"]["H100 SXM"]["training"] > 1
    )
    assert plan["memory_bytes"]["cuda"] > 5e9 and plan["saes"] == 24


def test_what_only_reads_makes_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told(capsys, "plan", "paper", "--json")
    assert cli.main(["reliability", "paper"]) == 2
    assert "claims.json is missing" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert cli.main(["check"]) == 2
    assert "No shipped profile has results" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_errors_are_one_line_and_a_status(run, tmp_path, capsys):
    bad = ["evaluate", str(tmp_path), "--profile", run.source, "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.main(bad) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("masksae: ") and shown.err.count("\n") == 1
    with pytest.raises(ConfigError):
        cli.main([*bad, "--debug"])
    assert cli.main(["train", "laptpo"]) == 2 and "Did you mean 'laptop'?" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "print_plan", interrupted)
    assert cli.main(["plan", "smoke"]) == 130 and "interrupted; what was finished is kept" in capsys.readouterr().err


def test_a_file_that_is_closed_to_the_user_is_told_in_a_line(as_nobody, tmp_path, capfd):
    file = tmp_path / "closed"
    file.touch(0o000)

    def read():
        assert exit_status(file.read_text) == 2

    assert as_nobody(read) is None
    told = capfd.readouterr().err
    assert told.startswith(f"masksae: {file}") and "permissions" in told and told.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m masksae plan paper --json | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "{\n", "")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda c: " ".join(c) or "masksae")
def test_help_teaches_in_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in COMMANDS) if not command else f"\n  masksae {command[0]}" in text


class Began(BaseException):
    """Raised in the place of long work."""


def examples() -> list[list[str]]:
    """The arguments of every example of every --help."""
    [commands] = [action for action in cli.parser()._actions if action.choices]
    helps = [command.format_help().partition("\nexamples:\n")[2] for command in commands.choices.values()]
    lines = [line.strip() for shown in helps for line in shown.splitlines() if line.strip()]
    assert all(line.startswith("masksae ") for line in lines) and len(helps) == len(COMMANDS)
    return [shlex.split(re.split(r" {2,}| \| ", line)[0])[1:] for line in lines]


@pytest.fixture
def reader(new_project, monkeypatch):
    """A reader's clone of this project, with a profile, an SAE and committed results; long work begins but is not
    done."""
    (new_project / "dvc.yaml").unlink()
    for name in ("notebooks", "dvc.yaml", "params.yaml"):
        (new_project / name).symlink_to(ROOT / name)
    profile(new_project, "mine")
    SAE(masksae.SAEConfig(16, 32, masksae.TopK(3))).save("MY_SAE")
    for folder in (new_project, new_project.parent / "other"):
        shutil.copytree(ROOT / "results/laptop", folder / "results/laptop", dirs_exist_ok=True)
    write_text(new_project / "build/laptop/01_data.ipynb", (ROOT / "notebooks/01_data.ipynb").read_text())
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "results"], [*person, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    monkeypatch.setenv("MASKSAE_ACCEPT_TERMS", "gemma3-270m")

    def begin(*_, **__):
        raise Began

    for place in (
        "masksae.app.repro.run_group", "masksae.app.plan.Plan.check", "masksae.app.measure.hours_here",
        "masksae.app.notebooks.execute", "masksae.app.site._render", "masksae.data.packages._download",
        "masksae.data.hub._patiently", "masksae.data.models.load_model", "huggingface_hub.snapshot_download",
        "masksae.study.run.Run.train_group",
    ):  # fmt: skip
        monkeypatch.setattr(place, begin)


def test_every_example_of_every_help_starts(reader, capsys):
    """In an empty cache: what is quick is done, what is long begins."""
    refused = []
    for arguments in examples():
        try:
            status = cli.main(arguments)
        except Began:
            status = 0
        if status not in (0, 1):
            refused.append((arguments, capsys.readouterr().err))
    assert refused == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"--grid": "matryoshka"}, "--grid: profile overnight has no 'matryoshka'. Did you mean 'matryoshka"),
        ({"--arm": "keptt"}, "--arm: profile overnight has no 'keptt'. Did you mean 'kept'?"),
        ({"--arm": "noise", "--like": "droped"}, "--like: profile overnight has no 'droped'. Did you mean 'dropped'?"),
        ({"--arm": "noise", "--like": "unmasked"}, "--like unmasked is the arm"),
        ({"--arm": "unmasked", "--like": "kept"}, "--arm unmasked is the arm"),
        ({"--grid": "topk20"}, "--grid topk20: topk keeps k latents of every token"),
        ({"--pilot": "100"}, "--pilot: found 100, expected"),
        ({"--pilot": "-1"}, "--pilot: found -1, expected"),
    ],
)
def test_a_search_for_what_is_not_there_is_refused_at_once(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--arm": "kept", "--grid": "matryoshka_clean", "--pilot": "99"} | options
    assert cli.main(["match", "overnight", *chain.from_iterable(given.items())]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"masksae: {words}") and told.count("\n") == 1


def test_one_parser_knows_every_command():
    [commands] = [action for action in cli.parser()._actions if action.choices]
    assert tuple(commands.choices) == COMMANDS and set(cli.EXAMPLES) == set(COMMANDS)


def test_several_profiles_run_up_to_the_first_that_fails(monkeypatch):
    begun = []
    monkeypatch.setattr("masksae.app.repro.reproduce", lambda profile: begun.append(profile) or int(profile == "b"))
    assert cli.main(["repro", "a", "b", "c"]) == 1 and begun == ["a", "b"]
    assert cli.main(["repro"]) == 0 and begun[2:] == ["laptop"]


def test_scores_that_can_be_trusted(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = present(ROOT)[0]
    assert told(capsys, "reliability", first).strip() in (ROOT / "docs/metrics.md").read_text()
    rows = json.loads(told(capsys, "reliability", first, "--json"))
    assert rows[0]["score"] == "explained variance" and 0 < rows[0]["between seeds"] < 0.1


def test_an_unfinished_profile_has_no_scores_to_trust(run, capsys):
    assert cli.main(["reliability", run.source]) == 2 and "Run notebook 09_paper" in capsys.readouterr().err


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom masksae.app import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
