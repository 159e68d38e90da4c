"""Pictures of notebooks 02 and 03: SAEs along training, and what they reconstruct."""

import itertools

import pandas as pd

from masksae.study.figures.style import GREY, KINDS, dots, grid_words, log_ticks, palette

ACROSS = 6
"""Panels beside each other, at most."""

ALONG = {
    "explained_variance": "explained variance\nof the training batch",
    "silent": "latents silent in\nthe last 100 batches",
}


def draw_training(rows: list[dict]):
    """Explained variance and silent latents along training, one above the other for each grid; one thin line per SAE.
    Rows of `training_scores`."""
    import matplotlib.pyplot as plt

    grids, colours = list(dict.fromkeys(row["grid"] for row in rows)), palette(row["arm"] for row in rows)
    across, down = min(ACROSS, len(grids)), -(-len(grids) // ACROSS)
    size = dict(figsize=(2.8 + 3.1 * across, 5 * down), sharex=True, squeeze=False)
    figure, axes = plt.subplots(2 * down, across, **size)
    histories = [pd.DataFrame(row["history"]) for row in rows]
    tops = {"explained_variance": 1, "silent": max(1, 1.05 * max(history["silent"].max() for history in histories))}
    for number in range(across * down):
        for place, (score, label) in enumerate(ALONG.items()):
            axis = axes[2 * (number // across) + place, number % across]
            if number >= len(grids):
                axis.remove()
                continue
            for row, history in zip(rows, histories):
                if row["grid"] == grids[number]:
                    axis.plot(history["step"], history[score], color=colours[row["arm"]], linewidth=1, alpha=0.8)
            axis.set(ylim=(0, tops[score]), ylabel=label if number % across == 0 else None)
            axis.tick_params(labelbottom=bool(place))
            axis.set(title=None if place else grid_words(grids[number]), xlabel="step" if place else None)
    lines = [plt.Line2D([], [], color=colour, label=arm) for arm, colour in colours.items()]
    axes[0, -1].legend(handles=lines, loc="upper left", bbox_to_anchor=(1, 1))
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
    """Unexplained variance (log scale, less is up) against clean L0, both as trained: colour is the arm, marker the
    architecture, or rival of one; a line joins what differs in k alone. Arms with one kind of SAE are left out where
    others have several."""
    import matplotlib.pyplot as plt

    table = pd.DataFrame([row for row in rows if row["mode"] == "as_trained"])
    table["kind"] = [kind(grid, architecture) for grid, architecture in zip(table["grid"], table["architecture"])]
    grids = table.groupby("arm", sort=False)["grid"].nunique()
    table = table[table["arm"].map(grids) > (grids.max() > 1)]
    colours, markers = palette(table["arm"]), dict(zip(table["kind"].unique(), itertools.cycle("osD^vPX*<>")))
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    for (arm, name), part in table.groupby(["arm", "kind"], sort=False):
        mean = part.groupby("k")[["l0", "ev_centred"]].mean().sort_values("l0")
        axis.plot(mean["l0"], 1 - mean["ev_centred"], color=colours[arm], linewidth=1.2)
        axis.scatter(part["l0"], 1 - part["ev_centred"], color=colours[arm], marker=markers[name], s=36, alpha=0.85)
    axis.set(xscale="log", yscale="log", xlabel="clean L0, as trained (log scale)")
    axis.set(ylabel="unexplained variance (centred)\nof clean held-out text (log scale)")
    log_ticks(axis.xaxis, table["l0"])
    log_ticks(axis.yaxis, 1 - table["ev_centred"])
    axis.grid(alpha=0.3)
    axis.invert_yaxis()
    handles = [plt.Line2D([], [], color=colour, linewidth=5, label=arm) for arm, colour in colours.items()]
    handles += [plt.Line2D([], [], color=GREY, marker=m, linestyle="", label=name) for name, m in markers.items()]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def kind(grid: str, architecture: str) -> str:
    """What SAEs are in one word: a rival that shares its architecture with others by its own name.

    >>> kind("ortsae20", "TopK"), kind("matryoshka20", "Matryoshka BatchTopK"), kind("mine", "TopK")
    ('OrtSAE', 'Matryoshka BatchTopK', 'TopK')
    """
    words = grid_words(grid).partition(",")[0]
    return words if words in KINDS.values() and words not in architecture else architecture
