"""Ids cover the content of what a result is made of, and nothing else."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import profile

from masksae import Run, cache


def test_two_that_want_the_same_tensors_make_them_once(tmp_path, monkeypatch):
    """The second waits, and its own would have been in the way."""
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path))
    begun, made = threading.Event(), []

    def make():
        made.append(1)
        begun.set()
        time.sleep(0.2)
        return {"x": torch.ones(2)}

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.kept_tensors, "kind", ["key"], make)
        begun.wait()
        second = pool.submit(cache.kept_tensors, "kind", ["key"], make)
        assert all(torch.equal(each.result()["x"], torch.ones(2)) for each in (first, second))
    assert len(made) == 1


def ids(run: Run) -> dict[str, list[str]]:
    """The ids of a run's activations, of its SAEs, and of what some of its scores rest on besides."""
    streams = [run.stream_folder(group.arm, group.pair).name for group in run.profile.groups]
    sections = [run.profile.evaluation, run.profile.probing, run.profile.perturbation, run.profile.text]
    return {
        "streams": streams,
        "saes": [run.id_of(member) for member in run.profile.members],
        "scores": [cache.run_id(run.identity(s)) for s in sections],
    }


def lm_weights(folder):
    file = folder / "model/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def words(folder):
    file = folder / "text.jsonl"
    file.write_text(file.read_text().replace("the", "thy"))


def labels(folder):
    (folder / "task.csv").write_text("prompt,target\nx,0\n")


@pytest.mark.parametrize(
    "change, moved",
    [(lm_weights, {"streams", "saes"}), (words, {"streams", "saes", "scores"}), (labels, {"scores"})],
)
def test_other_content_under_the_same_name_moves_the_ids_that_rest_on_it(project, change, moved):
    (project / "task.csv").write_text("prompt,target\n")
    path = profile(project)
    before = ids(Run(path))
    assert ids(Run(path)) == before
    change(project)
    after = ids(Run(path))
    assert {key for key in before if after[key] != before[key]} == moved


def test_content_is_what_counts_and_not_where_it_lies(project, tmp_path):
    first = cache.contents([str(project / "text.jsonl")])
    (project / "copy").mkdir()
    shutil.copy(project / "text.jsonl", project / "copy/text.jsonl")
    assert cache.contents(["copy/text.jsonl#field=text"]) == first and first[0].keys() == {"."}
    assert cache.contents(["smollm2-135m", "hub:owner/name@abc", "6_hist_fig_isamerican"]) == []
    assert cache.contents(["hub:owner/name"]) == ["main"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_hashes_are_looked_up_only_where_nothing_changed(data):
    """The same size and the same time of change do not hide another content."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MASKSAE_CACHE"], file = f"{folder}/cache", Path(folder) / "x"
        try:
            one, other = data.draw(st.lists(st.binary(min_size=3, max_size=3), min_size=2, max_size=2, unique=True))
            file.write_bytes(one)
            time = file.stat().st_mtime_ns
            first = cache.contents([str(file)])
            file.write_bytes(other)
            os.utime(file, ns=(time, time))
            assert cache.contents([str(file)]) != first
            file.write_bytes(one)
            assert cache.contents([str(file)]) == first
        finally:
            del os.environ["MASKSAE_CACHE"]


def test_each_pair_has_its_own_masks_and_the_unmasked_arm_none(project):
    arms = [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.3}]
    arms += [{"name": "dropped", "p": 0.3, "drop_masked": True}, {"name": "noise", "p": 0.0, "noise": 0.5}]
    run = Run(profile(project, arms=arms, blocks=[{"saes": ["plain"], "pairs": [0, 1]}]))
    unmasked, masked, dropped, noise = ([run.stream_folder(arm, pair) for pair in (0, 1)] for arm in run.profile.arms)
    assert len({*unmasked, *masked}) == 3  # arms of one pair share a forward, and noise is added to what is there
    assert dropped == masked and noise == unmasked
    assert len({run.id_of(member) for member in run.profile.members}) == len(run.profile.members) == 8
    masked = run.profile.arms[1]
    masks = [run.corrupt(masked, run.ids("train"), pair)[1] for pair in (0, 1)]
    agreement = (masks[0] == masks[1]).double().mean().item()
    assert agreement == pytest.approx(0.3**2 + 0.7**2, abs=0.03)
    assert {member.config(8).own_order for member in run.profile.members} == {True}
