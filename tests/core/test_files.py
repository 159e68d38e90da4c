"""Files appear whole or not at all, and errors of writing say what to do."""

import errno
import os

import pytest
import torch

from masksae import files
from masksae.errors import DataError, MasksaeError, OutputError


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "result"
    with pytest.raises(RuntimeError), files.atomic_dir(target) as tmp:
        (tmp / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with files.atomic_dir(target) as tmp:
        (tmp / "a").write_text("1")
    with files.atomic_dir(target, files.ANYTHING) as tmp:
        (tmp / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"] and list(target.parent.iterdir()) == [target]


def test_the_old_folder_survives_a_failed_replacement(tmp_path):
    target = tmp_path / "result"
    with files.atomic_dir(target) as tmp:
        (tmp / "a").write_text("1")
    with pytest.raises(RuntimeError), files.atomic_dir(target, files.ANYTHING) as tmp:
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
    with pytest.raises(DataError, match="y.json cannot be read: No such file"):
        files.read_json(tmp_path / "y.json")


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
        with files.atomic_dir(target, files.ANYTHING) as tmp:
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "a").read_text() == "kept" and issubclass(OutputError, MasksaeError)


def test_a_folder_that_holds_anything_else_is_not_written_over(tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    with files.atomic_dir(target, ("*.json",)) as tmp:
        (tmp / "a.json").write_text("1")
    with files.atomic_dir(target, ("*.json",)) as tmp:
        (tmp / "b.json").write_text("2")
    (target / "chapters").mkdir()
    (target / "chapters" / "one.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"chapters/one.tex, and writing there would delete it"):
        with files.atomic_dir(target, ("*.json",)):
            pytest.fail("the block ran")
    assert (target / "chapters" / "one.tex").read_text() == "years of work" and (target / "b.json").exists()
    with pytest.raises(OutputError, match="is a file, and a folder is to be written there"):
        with files.atomic_dir(target / "b.json"):
            pytest.fail("the block ran")
    assert (target / "b.json").read_text() == "2" and not list(target.glob(".*"))


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for text in ("1", "2"):
        with files.atomic_dir(tmp_path / "out", files.ANYTHING) as tmp:
            (tmp / "a").write_text(text)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a").read_text() == "2"


@pytest.mark.parametrize("umask, folder, file", [(0o077, 0o700, 0o600), (0o022, 0o755, 0o644), (0o002, 0o775, 0o664)])
def test_the_umask_says_who_may_read(tmp_path, umask, folder, file):
    before = os.umask(umask)
    try:
        with files.atomic_dir(tmp_path / "sae") as tmp:
            files.save_tensors({"x": torch.zeros(1)}, tmp / "sae.safetensors")
            (tmp / "config.json").write_text("{}")
        with files.atomic_file(tmp_path / "pool") as tmp:
            files.save_tensors({"x": torch.zeros(1)}, tmp)
        files.write_json(tmp_path / "new" / "x.json", 1)
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    folders = {"sae", "new"}
    assert modes == {name: folder if name in folders else file for name in modes} and len(modes) == 6


def test_two_users_share_a_cache(tmp_path, as_nobody):
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        with files.atomic_dir(tmp_path / "cache" / "group" / "sae") as tmp:
            files.save_tensors({"x": torch.ones(1)}, tmp / "x.safetensors")
        assert as_nobody(lambda: files.read_safetensors(tmp_path / "cache/group/sae/x.safetensors")) is None
        assert as_nobody(lambda: files.write_text(tmp_path / "cache/group/other", "theirs")) is None
    finally:
        os.umask(before)
