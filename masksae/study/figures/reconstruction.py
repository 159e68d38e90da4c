"""Pictures of notebooks 02 and 03: SAEs along training, and what they reconstruct."""

import pandas as pd

from masksae.study.figures.style import FAMILY, dots, palette


def draw_training(rows: list[dict]):
    """Explained variance and silent latents along training; one thin line per SAE. Rows of `training_scores`."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    table = pd.concat(
        [pd.DataFrame(row["history"]).assign(**{k: row[k] for k in ("arm", "grid", "sae")}) for row in rows]
    )
    table = table.reset_index(drop=True)
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
    """Unexplained variance (log scale, less is up) against clean L0, both as trained: a panel per arm, a line per
    architecture."""
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
