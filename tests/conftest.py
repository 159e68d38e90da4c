"""Fixtures of several rooms: tiny random models, a project around one of them, a run whose SAEs are trained."""

import contextlib
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_project import VOCABULARY, make_project, profile, tiny_model

with contextlib.suppress(
    ImportError
):  # of the peers; it cannot be imported after nnsight, which changes builtins that it hashes
    import beartype  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the cores have a worker each


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.stem != "test_smoke")


@pytest.fixture(params=["llama", "gpt_neox", "gemma2"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def language_model():
    """What `from_model` reads of a `LanguageModel`."""
    return SimpleNamespace(model=tiny_model("llama"))


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def new_project(tmp_path, monkeypatch):
    """A folder with a tiny model and some text, nothing made of them yet, an empty cache; the working folder."""
    make_project(tmp_path)
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_cache(tmp_path_factory):
    """The cache of a run of the tiny profile. Ids cover contents, not paths: in a copy, projects find SAEs."""
    from masksae import Run

    folder = tmp_path_factory.mktemp("trained")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKSAE_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        Run(profile(folder)).saes
    return folder / "cache"


@pytest.fixture
def project(new_project, trained_cache):
    """As `new_project`, and a cache in which the SAEs of the tiny profile are trained."""
    shutil.copytree(trained_cache, new_project / "cache")
    return new_project


@pytest.fixture
def run(project):
    """A run of the tiny profile."""
    from masksae import Run

    run = Run(profile(project))
    run.saes
    return run


@pytest.fixture
def folder(run):
    """A trained SAE of the run, in SAELens' form."""
    return run.saes["unmasked-plain-s0"].to_saelens(run.build / "mine")


@pytest.fixture
def as_nobody(tmp_path):
    """Run a function in a forked child without root's rights, and return what it raised (type name, message) or
    None."""
    import os
    import pickle

    for folder in tmp_path.parents[:3]:  # pytest's own folders, which are closed to others
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o055)

    def run(function):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                function()
                outcome = None
            except BaseException as error:
                outcome = (type(error).__name__, str(error))
            os.write(write, pickle.dumps(outcome))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            outcome = pickle.loads(pipe.read())
        os.waitpid(child, 0)
        return outcome

    return run
