"""One look for all pictures: seaborn, a colour for each arm of which the first three are safe for the colour-blind,
grey text on a transparent background so that print and dark pages both work, SVG and PNG without dates or random ids,
so that the same results give the same bytes.
"""

import itertools
import re
from collections import Counter

from masksae.files import write_text

COLOURS = {
    "unmasked": "#0072b2",
    "kept": "#d55e00",
    "dropped": "#009e73",
    "noise": "#cc79a7",
    "random_token": "#e69f00",
    "fewer_tokens": "#56b4e9",
    "p10": "#8c6d31",
    "p50": "#7f7fff",
    "denoising": "#66a61e",
    "fresh": "#b2182b",
}
"""Of the arms of the shipped profiles: the same in every picture, whichever others it has."""

FAMILY = tuple(COLOURS.values())
"""Of what is no arm: architectures, sources of variance."""

GREY = "#767676"
"""Of text: 4.5 to 1 on white, 4.2 to 1 on black. A lighter one makes JupyterLab put a dark card behind the picture."""

WIDTH = 13
"""Of the widest picture, in inches."""

KINDS = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
    "balanced": "balanced prefixes",
    "ortsae": "OrtSAE",
    "c2r": "C2R",
    "frozen": "frozen decoder",
}
"""What the grids of the shipped profiles are called before their number, in words."""


def palette(arms) -> dict[str, str]:
    """Colour of each arm; arms that no shipped profile has take what is left, in their order.

    >>> palette(["unmasked", "mine", "kept"])
    {'unmasked': '#0072b2', 'mine': '#009e73', 'kept': '#d55e00'}
    """
    arms = list(dict.fromkeys(arms))
    taken = {COLOURS.get(arm) for arm in arms}
    spare = itertools.cycle([colour for colour in FAMILY if colour not in taken] or FAMILY)
    return {arm: COLOURS.get(arm) or next(spare) for arm in arms}


def grid_words(grid: str) -> str:
    """A grid as a label; a name that is not made like those of the shipped profiles stays, without underscores.

    >>> grid_words("matryoshka20"), grid_words("matryoshka20_32"), grid_words("matryoshka_clean"), grid_words("my_own")
    ('Matryoshka, L0 20', 'Matryoshka, L0 20, 32', 'Matryoshka, clean', 'my own')
    """
    found = re.match(r"([a-z]+|c2r)(\d*)(?:_(\w+))?$", grid)
    if not found or found[1] not in KINDS:
        return grid.replace("_", " ")
    return ", ".join(filter(None, (KINDS[found[1]], found[2] and f"L0 {found[2]}", (found[3] or "").replace("_", " "))))


def style() -> None:
    """Set the project's look; call once in a notebook."""
    import matplotlib
    import seaborn as sns

    spines = {"axes.spines.top": False, "axes.spines.right": False}
    sns.set_theme(style="ticks", context="notebook", font="DejaVu Sans", rc=spines)
    greys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    fixed = {"svg.hashsalt": "masksae", "svg.fonttype": "path", "figure.dpi": 110, "legend.frameon": False}
    matplotlib.rcParams.update(dict.fromkeys(greys, GREY) | dict.fromkeys(clear, "none") | fixed)


def save_figure(run, name: str, figure, caption: str, *, simulated: bool = False) -> None:
    """Write figures/<profile>/NAME.svg, .png and the caption as .txt, with the scale of the run unless it is simulated;
    the same figure gives the same bytes."""
    path = run.figures / name
    note = f"Profile {run.profile.name}." if simulated else scale_note(run.profile)
    write_text(path.with_suffix(".txt"), f"{caption} {note}\n")
    for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
        figure.savefig(path.with_suffix(suffix), metadata=metadata, transparent=True, bbox_inches="tight", dpi=150)


def scale_note(profile) -> str:
    """Where numbers come from, for captions: profile, model, tokens."""
    text, training = profile.text, profile.training
    return (
        f"Profile {profile.name}: {profile.model.source}, {profile.model.place}, {text.train_tokens:,} tokens "
        f"an arm x {training.epochs} epochs, up to {text.held_out_tokens:,} held-out tokens."
    )


def most_pairs(rows: list[dict]) -> list[dict]:
    """Rows of the arms that have as many SAEs as any: for pictures with a place for each item, where all arms of a
    profile would stand in each other's way."""
    counts = Counter(row["arm"] for row in rows)
    return [row for row in rows if counts[row["arm"]] == max(counts.values())]


def log_ticks(scale, values) -> None:
    """Ticks of a logarithmic axis (`axis.xaxis`) over these values: 1, 2, 5 of each decade, or as on a linear one where
    they are so close that none of those may lie between them, or the one value that they all have."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

    locator = LogLocator(subs=(1, 2, 5))
    if len(values) and max(values) < 1.001 * min(values):
        locator = FixedLocator([round(min(values), 3)])
    elif len(values) and max(values) <= 5 * min(values):
        locator = MaxNLocator(5, steps=(1, 2, 5, 10))
    scale.set_major_locator(locator)
    scale.set_major_formatter("{x:g}")
    scale.set_minor_formatter("")


def dots(panels, share: bool = False, bottom=None, line=None):
    """One dot per SAE against the grid, the arms of a grid side by side with a bar for their mean, a line through the
    SAEs of a pair; a dashed line at `line`. As many panels in a row as leave room for the grids' names."""
    import matplotlib.pyplot as plt

    slots = [table.groupby("grid", sort=False)["arm"].unique() for table, _ in panels]
    inches = max(1.2 + sum(0.3 + 0.16 * len(arms) for arms in grids) for grids in slots)
    across = min(len(panels), max(1, int(WIDTH / inches)))
    down = -(-len(panels) // across)
    once = across == 1 and len({tuple(grids.index) for grids in slots}) == 1  # grids are named below the last panel
    size = (min(across * max(4.2, inches), WIDTH), 3.6 * down - 0.8 * once * (down - 1))
    figure, axes = plt.subplots(down, across, figsize=size, sharex=once, sharey=share, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (table, label), grids in zip(axes.flat, panels, slots):
        place, ticks, x = {}, {}, 0
        for grid, arms in grids.items():  # a place for an arm, one and a half between grids
            place |= {(grid, arm): x + i for i, arm in enumerate(arms)}
            ticks[grid_words(grid)] = x + (len(arms) - 1) / 2
            x += len(arms) + 1.5
        table = table.assign(x=[place[key] for key in zip(table["grid"], table["arm"])])
        for _, pair in table.groupby(["grid", "seed"], sort=False):
            axis.plot(pair["x"], pair["y"], color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
        for arm, colour in palette(table["arm"]).items():
            part = table[table["arm"] == arm]
            axis.scatter(part["x"], part["y"], color=colour, s=26, label=arm, alpha=0.8, zorder=2)
            means = part.groupby("x")["y"].mean()
            axis.scatter(means.index, means, color=colour, marker="_", s=160, linewidth=2.5, zorder=3)
        if line is not None:
            axis.axhline(line, color=GREY, linestyle="--", linewidth=1)
        axis.set(xticks=list(ticks.values()), xticklabels=list(ticks), ylabel=label, xlim=(-1, x - 1.5))
        if len(grids) > 1:
            plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    for axis in figure.axes:
        axis.set_ylim(bottom=bottom)
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
