"""One look for all pictures: seaborn, a colour-blind safe pair for the arms, grey text on a transparent background so
that print and dark pages both work, SVG and PNG without dates or random ids, so that the same results give the same
bytes.
"""

from masksae.files import write_text

COLOURS = {"unmasked": "#0072b2", "kept": "#d55e00", "dropped": "#009e73"}
"""Of the arms of the shipped profiles that stand in most pictures."""

OTHER_COLOURS = ("#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7fff", "#5e5e5e", "#b2182b")
"""Of further arms, in their order."""

FAMILY = (*COLOURS.values(), *OTHER_COLOURS)
"""Of what is no arm: architectures, sources of variance."""

GREY = "#808080"


def palette(arms) -> dict[str, str]:
    """Colour of each arm."""
    spare = iter(OTHER_COLOURS)
    return {arm: COLOURS.get(arm) or next(spare) for arm in arms}


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


def dots(panels, share: bool = False, bottom=None, line=None):
    """One dot per SAE against the grid, arms side by side, pairs of the same seed joined by a line; a dashed line at
    `line`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(min(4.2 * len(panels), 13), 3.6), sharey=share, squeeze=False)
    for axis, (table, label) in zip(axes[0], panels):
        grids, arms = list(dict.fromkeys(table["grid"])), list(dict.fromkeys(table["arm"]))
        place = {arm: (i - (len(arms) - 1) / 2) * 0.5 / max(1, len(arms) - 1) for i, arm in enumerate(arms)}
        for (grid, _), pair in table.groupby(["grid", "seed"], sort=False):
            x = [grids.index(grid) + place[arm] for arm in pair["arm"]]
            axis.plot(x, pair["y"], color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
        for arm, colour in palette(arms).items():
            part = table[table["arm"] == arm]
            axis.scatter(
                [grids.index(g) + place[arm] for g in part["grid"]], part["y"], color=colour, s=26, label=arm, zorder=2
            )
        if line is not None:
            axis.axhline(line, color=GREY, linestyle="--", linewidth=1)
        axis.set(xticks=range(len(grids)), xticklabels=grids, ylabel=label, xlim=(-0.6, len(grids) - 0.4))
        if len(grids) > 1:
            plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    for axis in axes[0]:
        axis.set_ylim(bottom=bottom)
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
