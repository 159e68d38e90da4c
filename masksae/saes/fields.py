"""What frozen configs share: checks of their fields, and kinds of them that are known by name."""

import re
import sys
from numbers import Integral
from pathlib import Path

from masksae import provenance
from masksae.errors import ConfigError


def whole(name: str, value, least: int = 1, most: int | None = None) -> int:
    """A whole number, NumPy's too, as an int. Raises ConfigError for anything else, and outside of least .. most."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most and number > most):
        kind = {1: "a positive integer"}.get(least, f"an integer of at least {least}")
        limit = "" if most is None else f", {most} at most"
        raise ConfigError(f"{name} must be {kind}{limit}, found {value!r}.")
    return number


def keep_whole(config, name: str, least: int = 1, most: int | None = None) -> None:
    """Check a field and keep it as an int. Raises ConfigError."""
    value = whole(f"{type(config).__name__}.{name}", getattr(config, name), least, most)
    object.__setattr__(config, name, value)


def check_positive(config, *names: str) -> None:
    """Raise ConfigError for fields that are no positive finite numbers."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{type(config).__name__}.{name} must be a positive number, found {value!r}.")


def snake_case(name: str) -> str:
    """A kind's name in profiles.

    >>> [snake_case(name) for name in ("TopK", "BatchTopK", "JumpReLU", "ReLU", "Gated", "OrtSAE")]
    ['topk', 'batch_topk', 'jump_relu', 'relu', 'gated', 'ortsae']
    """
    return re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()


def register(known: dict[str, type], kind: type, what: str) -> None:
    """Make a class known by its name. Raises ConfigError if another module has one of that name in profiles."""
    for name, other in known.items():
        same = (name, other.__module__) == (kind.__name__, kind.__module__)  # a cell that is run again, for example
        if snake_case(name) == snake_case(kind.__name__) and not same:
            raise ConfigError(f"{other.__module__} has a {what} {name} already. Call {kind} something else.")
    known[kind.__name__] = kind
    if file := getattr(sys.modules.get(kind.__module__), "__file__", None):
        provenance.remember(Path(file).resolve(), anew=True)  # somebody's own, as it is loaded
