"""Training interrupted: by kills, full disks, bad checkpoints; and its snapshots. The bytes are those of a run left
alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_training import EVERY, D, F, configs, run, same, sparse_world, stream, train_config

from masksae import (
    ActivationStream,
    AuxK,
    BatchTopK,
    SAEConfig,
    TopK,
    load_snapshots,
)  # fmt: skip
from masksae.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("stop_at", [1, 10, 27, 59])
def test_resumes_to_the_same_bytes(tmp_path, stop_at):
    class Stop(Exception):
        pass

    class Stopping(ActivationStream):
        def batches(self, views):
            for i, batch in enumerate(super().batches(views)):
                if i == stop_at:
                    raise Stop
                yield batch

    source = stream()
    source.__class__ = Stopping
    with pytest.raises(Stop):
        run(sae_configs=EVERY, source=source, checkpoint_dir=tmp_path)
    assert stop_at < 10 or json.loads((tmp_path / "checkpoint/state.json").read_text())["step"] == stop_at // 10 * 10
    resumed = run(sae_configs=EVERY, checkpoint_dir=tmp_path)
    assert same(resumed, run(sae_configs=EVERY))
    assert [r["step"] for r in resumed[0].history] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 59]
    assert same(run(sae_configs=EVERY, checkpoint_dir=tmp_path), resumed)  # finished: nothing is trained again


SUPPORT = Path(__file__).resolve().parents[1] / "support"
KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import masksae.files
from small_training import EVERY, run, train_config
countdown = {countdown}
def dying(function):
    def call(*args):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
run(train_config(checkpoint_every=3, snapshots=(20, 40)), EVERY, checkpoint_dir={folder!r})
print("finished")
"""


@pytest.mark.parametrize("most", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again_at_every_kind_of_moment(most, tmp_path):
    """SIGKILL before the n-th rename or flush, n from a seeded list: in checkpoints, snapshots and between two
    renames."""
    generator, kills = torch.Generator().manual_seed(0), 0
    for attempt in range(12):
        countdown = int(torch.randint(1, 30, (), generator=generator)) if attempt < most else 10**9
        code = KILLED.format(tests=str(SUPPORT), countdown=countdown, folder=str(tmp_path / "run"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        kills += 1
    assert kills >= most // 2 + 1 and done.stdout == "finished\n"
    undisturbed = train_config(checkpoint_every=3, snapshots=(20, 40))
    assert same(
        run(undisturbed, EVERY, checkpoint_dir=tmp_path / "run"),
        run(undisturbed, EVERY, checkpoint_dir=tmp_path / "other"),
    )
    a, b = load_snapshots(tmp_path / "run"), load_snapshots(tmp_path / "other")
    assert list(a) == list(b) == [20, 40] and all(same(a[n], b[n]) for n in a)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 400 kB; without the right to mount one, the test is run by a user who has it (CI is
    root)."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_last_checkpoint(small_disk):
    from masksae.errors import OutputError

    filler = small_disk / "filler"
    run(train_config(steps=30), EVERY, checkpoint_dir=small_disk / "run")
    shutil.rmtree(small_disk / "run")
    with pytest.raises(OutputError, match="disk is full.*finished before is kept"):

        class Filling(ActivationStream):
            def batches(self, views):
                for i, batch in enumerate(super().batches(views)):
                    if i == 25:
                        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
                    yield batch

        source = stream()
        source.__class__ = Filling
        run(sae_configs=EVERY, source=source, checkpoint_dir=small_disk / "run")
    assert json.loads((small_disk / "run/checkpoint/state.json").read_text())["step"] == 20
    assert os.listdir(small_disk / "run") == ["checkpoint"]
    filler.unlink()
    assert same(run(sae_configs=EVERY, checkpoint_dir=small_disk / "run"), run(sae_configs=EVERY))


@pytest.mark.parametrize("decay", [0.2, 0.0], ids=["decay", "no decay"])
def test_a_snapshot_is_the_sae_of_a_shorter_run(tmp_path, decay):
    """Byte for byte that of `steps = n` with the other values left, and of `branch(n)` where n steps end before the
    threshold begins."""
    config = train_config(snapshots=(16, 20, 30, 47, 60), sparsity_warmup=12, decay=decay)
    whole = run(config, EVERY, checkpoint_dir=tmp_path)
    found = load_snapshots(tmp_path)
    assert list(found) == [16, 20, 30, 47, 60] and same(found[60], whole)
    for n in (16, 20, 30, 47):
        alone = train_config(steps=n, sparsity_warmup=12, decay=decay) if n > 21 else config.branch(n)
        assert same(found[n], run(alone, EVERY))


def test_a_snapshot_before_the_threshold_starts_has_one_of_its_own(tmp_path):
    """Of a run too short for the trunk's `threshold_start`: clean L0 near k, as a run of its own with its own defaults
    has it."""
    sae_configs = [SAEConfig(D, F, BatchTopK(4)), SAEConfig(D, F, TopK(4))]
    config = train_config(400, threshold_start=200, threshold_ema=0.98, snapshots=(40, 100, 200, 201))
    run(config, sae_configs, checkpoint_dir=tmp_path)
    for saes in load_snapshots(tmp_path).values():
        assert all(sae.threshold > 0 for sae in saes)
        assert 3 < (saes[0].encode(sparse_world()[0]) > 0).sum(1).double().mean() < 5.5


def test_a_finished_sae_has_a_threshold_however_late_it_begins():
    for sae in run(train_config(30, threshold_start=29), EVERY[:2]):
        assert sae.threshold > 0


def test_revival_on_a_branch_is_that_of_the_whole_run(tmp_path):
    """What `AuxK` takes from the run's length is fixed for its snapshots too, since they share its trunk."""
    free, fixed = ([SAEConfig(D, F, BatchTopK(2), aux=AuxK(dead_after_tokens=n))] for n in (None, 60 * 200 // 16))
    a, b = (
        run(train_config(snapshots=(40,)), c, checkpoint_dir=tmp_path / str(i)) for i, c in enumerate((free, fixed))
    )
    assert same(a, b) and same(*(load_snapshots(tmp_path / str(i))[40] for i in (0, 1)))


def test_snapshots_of_a_mistyped_folder(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder typo"):
        load_snapshots("typo")
    (tmp_path / "snapshots/step-many").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="damaged, or not what it says"):
        load_snapshots(tmp_path)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: type(c.selection).__name__)
def test_every_snapshot_has_unit_rows_and_takes_raw_activations(tmp_path, config):
    """Scale and norms are folded in: the SAE of activations 64 times as large is that SAE, 64 times as large."""
    x = sparse_world()[0]
    for size in (1, 64):
        source = ActivationStream.from_array(x * size, batch_size=200, seed=0)
        run(train_config(snapshots="log"), [config], source, checkpoint_dir=tmp_path / str(size))
    small, large = load_snapshots(tmp_path / "1"), load_snapshots(tmp_path / "64")
    assert list(small) == list(large) == [30, 60]
    for n in small:
        (a,), (b,) = small[n], large[n]
        torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(F))
        if config.selection.estimates_threshold:
            assert a.threshold > 0
            assert b.threshold / a.threshold == pytest.approx(64, rel=1e-3)
        error = (b(64 * x) - 64 * a(x)).norm() / (64 * a(x)).norm()
        assert error < 1e-3


def test_snapshots_of_another_configuration_or_of_the_past(tmp_path):
    with pytest.raises(ConfigError, match="give checkpoint_dir"):
        run(train_config(snapshots="log"))
    run(train_config(snapshots=(30,)), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="step 40 would have to leave at step 32, and training is at step 60"):
        run(train_config(snapshots=(30, 40)), checkpoint_dir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="another configuration"):
        run(train_config(snapshots=(30,), lr=1e-3), checkpoint_dir=tmp_path)


def test_interrupted_between_the_two_renames(tmp_path):
    run(train_config(checkpoint_every=10), checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / ".old-checkpoint")
    assert same(run(checkpoint_dir=tmp_path), run()) and not (tmp_path / ".old-checkpoint").exists()


def test_checkpoint_of_another_configuration(tmp_path):
    run(checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="train differ"):
        run(train_config(lr=1e-3), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="saes differ"):
        run(sae_configs=configs(aux=AuxK(k=3)), checkpoint_dir=tmp_path)
    assert same(run(checkpoint_dir=tmp_path), run())


def test_truncated_checkpoint(tmp_path):
    run(checkpoint_dir=tmp_path)
    file = tmp_path / "checkpoint/state.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        run(checkpoint_dir=tmp_path)


def test_read_only_folder(tmp_path, as_nobody):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    source = stream()
    kind, message = as_nobody(lambda: run(source=source, checkpoint_dir=folder / "x"))
    assert kind == "OutputError" and "permission denied" in message
