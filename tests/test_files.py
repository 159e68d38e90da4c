"""Files appear whole or not at all, and errors of writing say what to do."""

import errno

import pytest

from masksae import files
from masksae.errors import MasksaeError, OutputError


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "result"
    with pytest.raises(RuntimeError), files.atomic_dir(target) as tmp:
        (tmp / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with files.atomic_dir(target) as tmp:
        (tmp / "a").write_text("1")
    with files.atomic_dir(target) as tmp:
        (tmp / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"] and list(target.parent.iterdir()) == [target]


def test_the_old_folder_survives_a_failed_replacement(tmp_path):
    target = tmp_path / "result"
    with files.atomic_dir(target) as tmp:
        (tmp / "a").write_text("1")
    with pytest.raises(RuntimeError), files.atomic_dir(target) as tmp:
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    target.rename(tmp_path / ".old-result")  # killed between the two renames
    assert (files.recover(target) / "a").read_text() == "1"


def test_text_and_json(tmp_path):
    path = files.write_json(tmp_path / "new" / "x.json", {"b": 1, "a": [0.1, None, "ä"]})
    assert files.read_json(path) == {"b": 1, "a": [0.1, None, "ä"]} and b"\r" not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o644 and [p.name for p in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(ValueError):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path)["b"] == 1


def test_run_id_sees_every_value():
    base = {"a": 1, "b": [1, 2]}
    others = [{"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 1.5, "b": [1, 2]}, {"a": 1}]
    assert len({files.run_id(v) for v in [base, *others]}) == 5 and len(files.run_id(base)) == 12


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path))
    assert files.cache_dir("a", "b") == tmp_path / "a" / "b"
    monkeypatch.delenv("MASKSAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert files.cache_dir() == tmp_path / "x" / "masksae"


def test_read_only_folder(tmp_path, as_nobody):
    tmp_path.chmod(0o555)
    name, message = as_nobody(lambda: files.ensure_writable(tmp_path / "results"))
    assert name == "OutputError" and "permission denied" in message and "results" in message


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(OutputError, match="a part of this path is a file"):
        files.ensure_writable(tmp_path / "results" / "laptop")


def test_full_disk(tmp_path, monkeypatch):
    target = tmp_path / "result"
    with files.atomic_dir(target) as tmp:
        (tmp / "a").write_text("kept")
    with pytest.raises(OutputError, match=r"disk is full.*MASKSAE_CACHE.*What was finished before is kept"):
        with files.atomic_dir(target) as tmp:
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "a").read_text() == "kept" and issubclass(OutputError, MasksaeError)
