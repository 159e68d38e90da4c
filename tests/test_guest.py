"""Somebody's own SAE: read in three forms, scored like a run's own, shown on one page; the command line over it."""

import json
import subprocess
import sys

import pytest
import torch
from browser import CHROMIUM, troubles
from test_stages import profile, project  # noqa: F401

from masksae import SAE, Run, cli, guest, scores
from masksae.errors import ConfigError


@pytest.fixture
def run(project):  # noqa: F811
    run = Run(profile(project))
    run.saes
    return run


@pytest.fixture
def folder(run):
    """A trained SAE of the run, in SAELens' form."""
    return run.load_saes()["unmasked-plain-s0"].to_saelens(run.build / "mine")


def test_three_forms_are_told_apart(run, tmp_path):
    sae = run.load_saes()["masked-matryoshka-s0"]
    for name, write in {"a": sae.to_saelens, "b": sae.to_dictionary_learning, "c": sae.save}.items():
        write(tmp_path / name)
        assert torch.equal(guest.load_sae(tmp_path / name).W_dec, sae.W_dec)
    with pytest.raises(ConfigError, match="holds none of sae_weights.safetensors, ae.pt, sae.safetensors"):
        guest.load_sae(tmp_path)


def test_a_guest_scores_what_the_run_scores(run, folder, tmp_path):
    own = {row["mode"]: row for row in scores.reconstruction_scores(run) if row["sae"] == "unmasked-plain-s0"}
    visitor = guest.Guest(run.source, folder, out=tmp_path / "out")
    found = {row["mode"]: row for row in guest.evaluate(visitor, ["reconstruction"])["reconstruction"]}
    for mode in ("as_trained", "matched"):
        for score in ("ev_centred", "l0", "ce_score", "dead_latents"):
            assert found[mode][score] == pytest.approx(own[mode][score], rel=1e-5), (mode, score)
    assert found["matched"]["k"] == 3 and json.loads((tmp_path / "out/reconstruction.json").read_text())
    [file, _] = guest.saebench(visitor, {"reconstruction": list(found.values())})
    assert json.loads(file.read_text())["eval_type_id"] == "core"
    other = guest.Guest(run.source, folder, out=tmp_path / "out", l0=5.0)
    assert guest.evaluate(other, ["reconstruction"])["reconstruction"][1]["l0"] == pytest.approx(5.0, rel=0.05)


def test_an_sae_without_a_k_of_its_own_is_matched_at_the_l0_it_has(run, folder, tmp_path):
    record = json.loads((folder / "cfg.json").read_text())
    del record["metadata"]["masksae"]  # as SAELens would have written it
    (folder / "cfg.json").write_text(json.dumps(record))
    visitor = guest.Guest(run.source, folder, out=tmp_path / "out")
    rows = guest.evaluate(visitor, ["reconstruction"])["reconstruction"]
    assert rows[0]["l0"] == pytest.approx(rows[1]["l0"], rel=0.02) and rows[0]["k"] == pytest.approx(
        rows[0]["l0"], abs=0.1
    )


def test_what_cannot_be_scored_is_refused(run, folder, tmp_path):
    with pytest.raises(ConfigError, match="no metric 'absorbtion'.*Did you mean 'absorption'"):
        guest.evaluate(guest.Guest(run.source, folder, out=tmp_path), ["absorbtion"])
    from masksae import BatchTopK, SAEConfig

    SAE(SAEConfig(24, 32, BatchTopK(3))).save(tmp_path / "wide")
    with pytest.raises(ConfigError, match="reads width 24, .* has 16"):
        guest.Guest(run.source, tmp_path / "wide", out=tmp_path)


def test_the_command_scores_and_shows(run, folder, tmp_path, capsys):
    command = [
        "evaluate",
        str(folder),
        "--profile",
        run.source,
        "--metrics",
        "reconstruction",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "explained variance" in told and "matched" in told and max(map(len, told.splitlines()[:-1])) <= 80
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["explained variance"].keys() == {"as_trained", "matched"}
    page = (tmp_path / "out/report.html").read_text()
    assert "mine" in page and "explained variance" in page and "@BODY@" not in page
    if CHROMIUM:
        assert troubles(tmp_path / "out", ["report.html"]) == []


def test_errors_are_one_line_and_a_status(run, folder, tmp_path, capsys):
    bad = ["evaluate", str(tmp_path), "--profile", run.source, "--out", str(tmp_path / "out")]
    assert cli.main(bad) == 2
    assert capsys.readouterr().err.startswith("masksae: ") and "Traceback" not in capsys.readouterr().err
    with pytest.raises(ConfigError):
        cli.main([*bad, "--debug"])


def test_other_commands(run, folder, tmp_path, capsys):
    assert cli.main(["export", str(folder), str(tmp_path / "dl"), "--to", "dictionary_learning"]) == 0
    assert torch.equal(guest.load_sae(tmp_path / "dl").W_dec, guest.load_sae(folder).W_dec)
    assert cli.main(["train", run.source, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert {line["sae"] for line in lines} == {row["sae"] for row in run.table} and all(
        SAE.load(line["folder"]) for line in lines
    )
    assert cli.main(["fetch", run.source]) == 0 and "blocks of train" in capsys.readouterr().out
    assert cli.main(["plan", run.source]) == 0 and "Space:" in capsys.readouterr().out


def test_help_needs_nothing_heavy():
    code = "import sys\nfrom masksae import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("fetch", "plan", "train", "evaluate", "explore", "export"):
        assert f"masksae {name}" in result.stdout
