"""Pictures of training and reconstruction, drawn from rows of results."""

import html

import pandas as pd

from masksae.study.figures.style import COLOURS, FAMILY, dots, palette


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
