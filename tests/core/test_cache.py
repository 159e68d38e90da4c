"""Ids cover all that a result is made of, and nothing else."""

import ast
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

INPUTS, RUN, SCORE = "study.inputs", "study.run", "study.scores.absorption"
CHAIN = {
    "data/texts.py": ("_text", INPUTS),
    "data/blocks.py": ("token_blocks", INPUTS),
    "masking.py": ("mask_tokens", INPUTS),
    "tracing.py": ("_run_to", INPUTS),
    "activations.py": ("_order", INPUTS),
    "study/inputs.py": ("replacement", INPUTS),
    "saes/sparse.py": ("sparse_step", RUN),
    "saes/loss.py": ("aux_loss", RUN),
    "training/step.py": ("_descend", RUN),
    "study/run.py": ("_train", RUN),
    "metrics/reconstruction.py": ("calibrated_threshold", SCORE),
    "metrics/absorption.py": ("absorbed", SCORE),
    "study/scores/matched.py": ("matched_threshold", SCORE),
}
"""A function of each module on the way from text to a score, and the first id of code that rests on it."""

REST_ON = {INPUTS: [INPUTS, RUN, SCORE], RUN: [RUN], SCORE: [SCORE]}
"""The ids of code that rest on another; scores are kept under the ids of their SAEs besides, so these need not name
what trains."""


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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that ids are taken of."""
    shutil.copytree(cache.PACKAGE, tmp_path / "masksae", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "PACKAGE", tmp_path / "masksae")
    return tmp_path / "masksae"


def edit(path, function: str, line: str) -> None:
    """Put a line at the beginning of a function's body."""
    lines = path.read_text(encoding="utf-8").split("\n")
    tree = ast.parse("\n".join(lines))
    found = next(node for node in ast.walk(tree) if getattr(node, "name", None) == function)
    first = found.body[1] if ast.get_docstring(found) else found.body[0]
    lines.insert(first.lineno - 1, " " * first.col_offset + line)
    time = path.stat().st_mtime_ns
    path.write_text("\n".join(lines), encoding="utf-8")
    os.utime(path, ns=(time + 10**9, time + 10**9))


@pytest.mark.parametrize("file", CHAIN)
def test_an_edit_on_the_way_to_a_score_moves_the_ids_from_there_on(package, file):
    before, (function, first) = {name: cache.code_id(name) for name in REST_ON}, CHAIN[file]
    edit(package / file, function, "assert not None")
    assert [name for name in REST_ON if cache.code_id(name) != before[name]] == REST_ON[first]


def test_scores_rest_on_the_ids_of_their_saes(project, monkeypatch):
    [part, *_], made = Run(profile(project)).parts, []
    make = lambda: [{"n": made.append(1) or len(made)}]
    score = lambda: part.rows("try", part.profile.evaluation, make)
    assert score() == score() == [{"n": 1}]
    monkeypatch.setattr(Run, "id_of", lambda self, group: "trained by other code")
    assert score() == [{"n": 2}]


@pytest.mark.parametrize(
    "module",
    [
        "study/figures/style",
        "study/report/tables",
        "study/stats",
        "app/site",
        "app/repro",
        "progress",
        "errors",
        "files",
    ],
)
def test_pictures_pages_and_messages_move_no_id(package, module):
    before = cache.code_id(SCORE)
    path = package / f"{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nNEW = 1\n", encoding="utf-8")
    assert cache.code_id(SCORE) == before


def test_words_layout_and_annotations_move_no_id(package):
    path, before = package / "masking.py", cache.code_id(INPUTS)
    text = path.read_text(encoding="utf-8")
    for old, new in (
        ('"""Replace each token', '"""Put something in the place of each token'),
        ("# fmt: skip", "# left as it is"),
        ("must lie in [0, 1], found", "must lie between 0 and 1, found"),
        ("token_id: int", "token_id: object"),
        (") -> tuple[Tensor, Tensor]:", "):"),
        ("    n, s = ids.shape\n", "\n    n, s = (\n        ids.shape\n    )\n"),
    ):
        assert old in text
        text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)
        assert cache.code_id(INPUTS) == before
    path.write_text(text.replace("uniform[:, 0] < p", "uniform[:, 0] <= p"), encoding="utf-8")
    os.utime(path, ns=(path.stat().st_mtime_ns + 10**10,) * 2)
    assert cache.code_id(INPUTS) != before


def test_a_function_outside_the_package_is_known_by_its_file():
    assert cache.code_of(edit) == cache.code_of(words) != cache.code_of(profile)
    made = {}
    exec(compile("def make(): return {}", "<a cell>", "exec"), made)
    assert cache.code_of(made["make"]) == cache.run_id({})


def ids(run: Run) -> dict[str, list[str]]:
    """The ids of a run's activations, of its SAEs, and of what some of its scores rest on besides."""
    streams = [run.stream_folder(group.arm, group.pair).name for group in run.profile.groups]
    sections = [run.profile.evaluation, run.profile.probing, run.profile.perturbation, run.profile.text]
    return {
        "streams": streams,
        "groups": [run.id_of(group) for group in run.profile.groups],
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
    [(lm_weights, {"streams", "groups"}), (words, {"streams", "groups", "scores"}), (labels, {"scores"})],
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
    assert len({run.id_of(group) for group in run.profile.groups}) == len(run.profile.groups) == 6
    masked = run.profile.arms[1]
    masks = [run.corrupt(masked, run.ids("train"), pair)[1] for pair in (0, 1)]
    agreement = (masks[0] == masks[1]).double().mean().item()
    assert agreement == pytest.approx(0.3**2 + 0.7**2, abs=0.03)
    assert {member.config(8).own_order for member in run.profile.members} == {True}
