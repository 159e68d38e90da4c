"""The package's errors. Each message names the thing, the value found, what was expected and the remedy."""

import contextlib


class MasksaeError(Exception):
    """Any error that masksae raises on purpose; catch this one to catch them all."""


class ConfigError(MasksaeError, ValueError):
    """A configuration value that cannot work; raised before anything expensive starts."""


class DataError(MasksaeError, ValueError):
    """Input data (ids, text, activations) that does not meet what the function needs."""


class SourceError(MasksaeError, RuntimeError):
    """A model, text or probe file that cannot be fetched, verified or read."""


class CheckpointError(MasksaeError, RuntimeError):
    """A checkpoint that is damaged, or belongs to another configuration."""


class OutputError(MasksaeError, OSError):
    """A folder or a disk that results cannot be written to."""


class JobError(MasksaeError, RuntimeError):
    """Jobs in other processes, or on a cluster, that failed."""


def require(extra: str, *modules: str) -> None:
    """Raise ConfigError if packages of an optional part of masksae are not installed; call it before long work.

    >>> require("evaluate", "json")
    """
    import importlib.util

    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"This needs {', '.join(missing)}, not installed here. `pip install 'masksae[{extra}]'`.")


@contextlib.contextmanager
def readable(path):
    """Turn what a damaged or foreign file at `path` makes Python raise into a CheckpointError."""
    try:
        yield
    except MasksaeError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        MemoryError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{path} is damaged, or not what it says it is ({type(error).__name__}: {error}). Restore it from a copy, "
            "or move it away."
        ) from error


def nearest(word: str, known) -> str:
    """A hint for a misspelt `word`: " Did you mean 'x'?" plus the known names.

    >>> nearest("batchtopk", ["batch_topk", "topk"])
    " Did you mean 'batch_topk'? Known: batch_topk, topk."
    """
    import difflib

    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."
