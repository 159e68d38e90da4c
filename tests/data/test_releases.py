"""SAEs of a release, from a real server on this machine: found, checked, kept, and refused with the reason."""

import functools
import http.server
import json
import re
import threading
import zipfile

import pytest
import torch
from tiny_project import profile

import masksae
from masksae import Run
from masksae.app import upload
from masksae.data import releases
from masksae.errors import ConfigError, SourceError
from masksae.files import cache_dir, sha256

NAME = "tiny/masked-plain-s0"


class Counting(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def served(project, monkeypatch, tmp_path):
    """The release of the tiny run behind an address: (run, folder, server)."""
    run, register = Run(profile(project)), tmp_path / "releases.json"
    register.write_text(json.dumps({"address": "http://localhost:9/", "sha256": {"other/sae": "0" * 64}}))
    folder = upload.release(run, register)
    monkeypatch.setattr(releases, "REGISTER", register)
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Counting, directory=folder))
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MASKSAE_RELEASES", f"http://localhost:{server.server_port}")
    yield run, folder, server
    server.shutdown()
    server.server_close()


def test_a_released_sae_is_the_one_that_was_trained_and_is_fetched_once(served):
    run, _, server = served
    trained = run.saes["masked-plain-s0"]
    x = torch.randn(64, trained.config.d_model, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        sae = masksae.load_sae(f"release:{NAME}")
        assert torch.equal(sae.encode(x), trained.encode(x)) and torch.equal(sae(x), trained(x))
    assert sae.history == trained.history and server.asked == ["/tiny-masked-plain-s0.zip"]


def test_the_release_holds_the_first_block_a_card_and_sums_that_are_true(served):
    run, folder, _ = served
    main = {f"tiny-{row['sae']}.zip" for row in run.table if row["grid"] == "plain"}
    assert main < {f"tiny-{row['sae']}.zip" for row in run.table}  # the second block is not in it
    assert {file.name for file in folder.iterdir()} == main | {"README.md", "SHA256SUMS"}
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        value, name = line.split("  ")
        assert sha256(folder / name) == value
    assert 'load_sae("release:tiny/' in (folder / "README.md").read_text()


def test_the_same_saes_give_the_same_archives_and_other_profiles_stay_registered(served):
    run, folder, _ = served
    before, register = (folder / "SHA256SUMS").read_text(), releases.REGISTER
    assert upload.release(run, register) == folder and (folder / "SHA256SUMS").read_text() == before
    known = json.loads(register.read_text())["sha256"]
    assert known["other/sae"] == "0" * 64 and NAME in known


def test_sae_lens_form_is_in_the_archive(served):
    _, folder, _ = served
    with zipfile.ZipFile(folder / releases.archive_name(NAME)) as archive:
        assert sorted(archive.namelist()) == ["cfg.json", "sae_weights.safetensors"]


def test_another_file_is_refused_and_not_kept(served):
    _, folder, _ = served
    file = folder / releases.archive_name(NAME)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(SourceError, match="serves another tiny-masked-plain-s0.zip than was released"):
        masksae.load_sae(f"release:{NAME}")
    assert not list(cache_dir("releases").glob("*.zip"))


def test_a_damaged_copy_is_fetched_again(served):
    _, _, server = served
    copy = releases.fetch(NAME)
    copy.write_bytes(b"x")
    assert zipfile.is_zipfile(releases.fetch(NAME)) and len(server.asked) == 2


def test_what_cannot_be_had_says_why(served, monkeypatch):
    _, _, server = served
    with pytest.raises(ConfigError, match=re.escape("Did you mean 'tiny/masked-plain-s0'?")):
        masksae.load_sae("release:tiny/maskd-plain-s0")
    with pytest.raises(SourceError, match="404.*put the file into"):
        releases.fetch("other/sae")
    monkeypatch.setenv("MASKSAE_RELEASES", "http://localhost:9/")
    with pytest.raises(SourceError, match="MASKSAE_RELEASES"):
        releases.fetch(NAME)
    monkeypatch.setenv("MASKSAE_RELEASES", "nothing")
    with pytest.raises(ConfigError, match="no address of archives: 'nothing'"):
        releases.fetch(NAME)


def test_before_a_release_it_is_said(tmp_path, monkeypatch):
    register = tmp_path / "releases.json"
    register.write_text(json.dumps({"address": "http://localhost:9/", "sha256": {}}))
    monkeypatch.setattr(releases, "REGISTER", register)
    with pytest.raises(ConfigError, match="no SAEs are released yet.*masksae share overnight --release"):
        masksae.load_sae("release:overnight/kept-topk20-s100")
