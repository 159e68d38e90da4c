"""Checks of the fields of a frozen config."""

from numbers import Integral

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
