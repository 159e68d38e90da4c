"""What a run took: noted stage by stage beside the results, and shown with its sum."""

import time

import pytest

from masksae.study import times


def test_stages_are_noted_one_by_one_and_a_later_run_takes_the_place_of_an_earlier(tmp_path):
    with times.timed(tmp_path, "train"):
        time.sleep(0.2)
    times.note(tmp_path, "probing", 90.0)
    times.note(tmp_path, "probing", 60.0)
    found = times.times(tmp_path)
    assert 0.2 <= found["stages"]["train"]["seconds"] < 20 and found["stages"]["probing"]["seconds"] == 60
    assert all(0.05 < stage["memory_gb"] < 64 for stage in found["stages"].values())
    assert found["machine"]["cores"] >= 1 and found["machine"]["gflops"] > 1


def test_a_stage_that_fails_is_not_noted(tmp_path):
    with pytest.raises(RuntimeError), times.timed(tmp_path, "train"):
        raise RuntimeError
    assert times.times(tmp_path) == {"machine": {}, "stages": {}}


def test_the_table_ends_with_the_sum_of_seconds_and_the_largest_memory():
    stages = {"a": {"seconds": 60.0, "memory_gb": 1.0}, "b": {"seconds": 3.0, "memory_gb": 3.25}}
    assert times.table({"machine": {}, "stages": stages})[1:] == [
        ["a", "0:01:00", "1.0 GB"],
        ["b", "0:00:03", "3.2 GB"],
        ["in all", "0:01:03", "3.2 GB"],
    ]
