"""Pictures, drawn from the rows of small results; nothing is computed here that a result file does not hold.

One style for all: seaborn, a colour-blind safe pair for the arms, grey text on a transparent background so that print and dark pages
both work, SVG and PNG without dates or random ids, so that the same results give the same bytes.
"""

import html

import pandas as pd

from masksae.files import write_text

COLOURS = {"unmasked": "#0072b2", "masked": "#d55e00"}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7fff", "#5e5e5e", "#b2182b")
FAMILY = (*COLOURS.values(), *OTHER_COLOURS)
GREY = "#808080"
MARKERS = "osD^vPX*<>hp"


def palette(arms) -> dict[str, str]:
    """Colour of each arm."""
    spare = iter(OTHER_COLOURS)
    return {arm: COLOURS.get(arm) or next(spare) for arm in arms}


def style() -> None:
    """Set the project's look; call once in a notebook."""
    import matplotlib
    import seaborn as sns

    grey = {key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    sns.set_theme(
        style="ticks", context="notebook", font="DejaVu Sans", rc={"axes.spines.top": False, "axes.spines.right": False}
    )
    matplotlib.rcParams.update(
        grey
        | {
            "svg.hashsalt": "masksae",
            "svg.fonttype": "path",
            "figure.dpi": 110,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.frameon": False,
            "grid.color": GREY,
        }
    )


def save_figure(run, name: str, figure, caption: str, *, simulated: bool = False) -> None:
    """Write figures/<profile>/NAME.svg, .png and the caption as .txt, with the scale of the run unless it is simulated; the same figure
    gives the same bytes."""
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


def masked_text_html(tokenizer, ids, is_masked, tokens: int = 90) -> str:
    """A block as the model sees it, masked positions marked; for display in a notebook."""
    parts = []
    for token, masked in list(zip(ids.tolist(), is_masked.tolist()))[:tokens]:
        text = html.escape(tokenizer.decode([token])).replace("\n", "↵")
        mark = (
            f"background:{COLOURS['masked']};color:white;border-radius:3px;padding:0 2px;font-size:70%"
            if masked
            else ""
        )
        parts.append(f'<span style="{mark}">{text}</span>')
    return f'<div style="line-height:1.7;max-width:48em">{"".join(parts)}</div>'


def draw_norms(rows: list[dict]):
    """Norm of the residual stream at ordinary and masked positions, per arm."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axis = plt.subplots(figsize=(7, 3.4))
    table = pd.DataFrame(rows)
    for (arm, masked), part in table.groupby(["arm", "masked"], sort=False):
        label = f"{arm} arm, {'masked' if masked else 'ordinary'} positions"
        look = dict(color=palette(table["arm"].unique())[arm], linewidth=2, linestyle="--" if masked else "-")
        axis.ecdf(part["norm"], label=label, **look)
    axis.set(xscale="log", xlabel="norm of the residual stream (log scale)", ylabel="share of positions below")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="lower right")
    return figure


def draw_training(histories: dict[str, tuple[str, str, list[dict]]]):
    """Explained variance and silent latents along training; one thin line per SAE. Values: (arm, grid, history)."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    records = [
        {"arm": arm, "grid": grid, "sae": sae, **record}
        for sae, (arm, grid, history) in histories.items()
        for record in history
    ]
    table = pd.DataFrame(records)
    grids = list(dict.fromkeys(table["grid"]))
    figure, axes = plt.subplots(
        2, len(grids), figsize=(1.2 + 3.1 * len(grids), 5), sharex=True, sharey="row", squeeze=False
    )
    for column, grid in zip(axes.T, grids):
        for axis, y, label in zip(
            column,
            ("explained_variance", "silent"),
            ("explained variance\nof the training batch", "latents silent in\nthe last 100 batches"),
        ):
            part = table[table["grid"] == grid]
            options = dict(units="sae", estimator=None, palette=palette(table["arm"].unique()), linewidth=1, alpha=0.8)
            sns.lineplot(part, x="step", y=y, hue="arm", ax=axis, legend=axis is axes[0, -1], **options)
            axis.set(ylabel=label)
        column[0].set(title=grid)
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylim(bottom=0)
    if axes[0, -1].get_legend():
        sns.move_legend(axes[0, -1], "lower right", title=None)
    figure.tight_layout()
    return figure


def draw_reconstruction(rows: list[dict]):
    """Clean L0 as trained, then explained variance and CE score at matched L0; one dot per SAE."""
    table = pd.DataFrame(rows)
    trained, matched = table[table["mode"] == "as_trained"], table[table["mode"] == "matched"]
    panels = [
        (trained.assign(y=trained["l0"] / trained["k"]), "clean L0 / k, as trained"),
        (matched.assign(y=matched["ev_centred"]), "explained variance (centred),\nat clean L0 = k"),
        (matched.assign(y=matched["ce_score"]), "CE score,\nat clean L0 = k"),
    ]
    return dots(panels)


def draw_family(rows: list[dict]):
    """Unexplained variance (log scale, less is up) against clean L0, both as trained: a panel per arm, a line per architecture."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    table = pd.DataFrame([row for row in rows if row["mode"] == "as_trained"])
    arms, names = list(dict.fromkeys(table["arm"])), list(dict.fromkeys(table["architecture"]))
    figure, axes = plt.subplots(
        1, len(arms), figsize=(4.2 * len(arms) + 1.6, 3.8), sharex=True, sharey=True, squeeze=False
    )
    for axis, arm in zip(axes[0], arms):
        for name, colour, marker in zip(names, FAMILY, "osD^vP"):
            part = table[(table["arm"] == arm) & (table["architecture"] == name)]
            mean = part.groupby("k")[["l0", "ev_centred"]].mean().sort_values("l0")
            axis.plot(mean["l0"], 1 - mean["ev_centred"], color=colour, linewidth=1.2)
            axis.scatter(part["l0"], 1 - part["ev_centred"], color=colour, marker=marker, s=30, label=name, alpha=0.9)
        axis.set(xscale="log", yscale="log", title=arm, xlabel="clean L0, as trained (log scale)")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="unexplained variance (centred)\nof clean held-out text (log scale)")
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def draw_absorption(rows: list[dict]):
    """Mean full absorption per SAE, as trained and at matched clean L0."""
    table = pd.DataFrame(rows)
    panels = [
        (table[table["mode"] == mode].assign(y=lambda t: t["mean_full"]), f"mean full absorption,\n{label}")
        for mode, label in (("as_trained", "as trained"), ("matched", "at clean L0 = k"))
    ]
    return dots(panels, share=True, bottom=0)


def draw_items(rows: list[dict], grid: str, items: str):
    """Full absorption per letter (`items` "letters") or per context ("parents") at matched clean L0, one dot per SAE."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    part = [row for row in rows if row["mode"] == "matched" and row["grid"] == grid]
    table = pd.DataFrame(
        {"arm": row["arm"], "item": item["letter"], "full": item["full"]} for row in part for item in row[items]
    )
    figure, axis = plt.subplots(figsize=(9, 3))
    options = dict(dodge=True, jitter=False, palette=palette(table["arm"].unique()), size=4, alpha=0.8, ax=axis)
    sns.stripplot(table, x="item", y="full", hue="arm", order=sorted(table["item"].unique()), **options)
    axis.set(xlabel=None, ylabel="full absorption", title=f"{grid}, one dot per SAE", ylim=(-0.02, None))
    if items == "parents":
        plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    axis.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_fronts(trained: pd.DataFrame, matched: pd.DataFrame):
    """Absorption of every SAE against what it costs: clean L0, as trained; explained variance, at clean L0 = k. Colour is the arm, marker the
    grid. Low absorption is up."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    grids, colours = list(dict.fromkeys(matched["grid"])), palette(dict.fromkeys(matched["arm"]))
    for axis, table, x in ((axes[0], trained, "l0"), (axes[1], matched, "ev_centred")):
        for arm, colour in colours.items():
            for grid, marker in zip(grids, MARKERS * len(grids)):
                part = table[(table["arm"] == arm) & (table["grid"] == grid)]
                axis.scatter(part[x], part["mean_full"], color=colour, marker=marker, s=30, alpha=0.85)
        axis.grid(alpha=0.3)
    axes[0].set(
        xscale="log", xlabel="clean L0, as trained (log scale)", ylabel="mean full absorption\nof first letters"
    )
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter("")
    axes[0].set_xticks(sorted(set(matched["k"])), minor=False)
    axes[1].set(xlabel="explained variance (centred), at clean L0 = k")
    axes[0].invert_yaxis()
    handles = [plt.Line2D([], [], color=colour, linewidth=5, label=arm) for arm, colour in colours.items()]
    handles += [
        plt.Line2D([], [], color=GREY, marker=marker, linestyle="", label=grid)
        for grid, marker in zip(grids, MARKERS * len(grids))
    ]
    axes[1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.tight_layout()
    return figure


def dots(panels, share: bool = False, bottom=None, line=None):
    """One dot per SAE against the grid, arms side by side, pairs of the same seed joined by a line; a dashed line at `line`."""
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


def draw_summary(scores: pd.DataFrame):
    """Absorption and explained variance of every SAE at matched clean L0: the two sides of the trade."""
    panels = [
        (scores.assign(y=scores["mean_full"]), "mean full absorption,\nat clean L0 = k"),
        (scores.assign(y=scores["ev_centred"]), "explained variance (centred),\nat clean L0 = k"),
    ]
    return dots(panels)
