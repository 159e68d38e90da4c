"""Records of training as they come: JSON lines that survive a kill, adapters that are refused in time."""

import json

import pytest
import torch

import masksae
from masksae import ActivationStream, BatchTopK, SAEConfig, TrainConfig
from masksae.errors import ConfigError, OutputError
from masksae.training import logs

CONFIGS = [SAEConfig(8, 32, BatchTopK(2), seed=seed) for seed in (0, 1)]


def stream():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    return ActivationStream.from_array(x, batch_size=100, seed=0)


def run(log, steps=60, **keys):
    recipe = TrainConfig(60, warmup=5, threshold_start=10, log_every=7, checkpoint_every=20)
    return masksae.train(CONFIGS, stream(), recipe, log=log, progress=False, **keys)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_lines_are_the_history(tmp_path):
    saes = run(logs.JsonLines(tmp_path / "log.jsonl", ["a", "b"]))
    found = records(tmp_path / "log.jsonl")
    for name, sae in zip("ab", saes):
        assert [{k: v for k, v in r.items() if k != "sae"} for r in found if r["sae"] == name] == sae.history
    assert found[-1]["step"] == 59


def test_a_log_changes_no_byte():
    for with_log, without in zip(run(lambda *_: None), run(None)):
        assert all(torch.equal(a, b) for a, b in zip(with_log.state_dict().values(), without.state_dict().values()))


def test_a_run_that_goes_on_has_every_record_once(tmp_path):
    class Killed(Exception):
        pass

    file = logs.JsonLines(tmp_path / "log.jsonl", ["a", "b"])

    def until(number, record):
        file(number, record)
        if record["step"] == 49:  # after the checkpoint of step 40
            raise Killed

    with pytest.raises(Killed):
        run(until, checkpoint_dir=tmp_path / "kept")
    with open(tmp_path / "log.jsonl", "a") as torn:
        torn.write('{"sae": "b", "step"')
    saes = run(logs.JsonLines(tmp_path / "log.jsonl", ["a", "b"]), checkpoint_dir=tmp_path / "kept")
    steps = [r["step"] for r in records(tmp_path / "log.jsonl") if r["sae"] == "b"]
    assert steps == [r["step"] for r in saes[1].history] and len(set(steps)) == len(steps)


def test_snapshots_on_branches_are_not_logged(tmp_path):
    seen = []
    recipe = TrainConfig(60, warmup=5, threshold_start=10, log_every=7, snapshots=(30,))
    masksae.train(
        CONFIGS, stream(), recipe, log=lambda i, r: seen.append((i, r["step"])), checkpoint_dir=tmp_path, progress=False
    )
    assert len(seen) == len(set(seen))


def test_an_adapter_that_is_unknown_or_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKSAE_LOG", "tensorbord")
    with pytest.raises(ConfigError, match="MASKSAE_LOG names 'tensorbord'. Did you mean 'tensorboard'"):
        logs.chosen(tmp_path, ["a"])
    for name in logs.ADAPTERS:
        monkeypatch.setenv("MASKSAE_LOG", name)
        monkeypatch.setitem(__import__("sys").modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            logs.chosen(tmp_path, ["a"])


def test_a_full_disk_is_said_in_a_line(tmp_path):
    log = logs.JsonLines(tmp_path / "log.jsonl", ["a"])
    log(0, {"step": 0})
    log._file.close()
    log._file = open("/dev/full", "w")
    with pytest.raises(OutputError, match="log.jsonl: the disk is full"):
        log(0, {"step": 1})
