"""Amounts and times as people write them."""


def amount(value: float, unit: str) -> str:
    """A number with a prefix.

    >>> amount(2.5e17, "FLOP"), amount(640e6, "B")
    ('250 PFLOP', '640 MB')
    """
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(hours: float) -> str:
    """Hours, in the unit that they ask for.

    >>> duration(0.01), duration(0.5), duration(30)
    ('36 s', '30 min', '30 h')
    """
    return f"{hours * 3600:.0f} s" if hours < 1 / 60 else f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.3g} h"
