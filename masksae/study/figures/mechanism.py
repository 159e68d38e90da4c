"""Pictures of notebook 00: absorption in the simulated world, against sparsity and in the plane of what was varied."""

import pandas as pd

from masksae.study.figures.style import COLOURS, GREY, OTHER_COLOURS

PARENTS = {"same": "parent set by the same token", "cross": "parent set by the context token"}
ARMS = {"unmasked": COLOURS["unmasked"], "masked, kept": COLOURS["masked"], "masked, dropped": OTHER_COLOURS[0]}


def draw_curves(rows: list[dict], p: float):
    """Absorption against clean L0 as trained, k growing along each line; bars are 95 % intervals over worlds."""
    import matplotlib.pyplot as plt

    table = pd.DataFrame(rows)
    first = table["n_latents"].iloc[0]
    table = table[(table["mode"] == "as_trained") & (table["n_latents"] == first) & table["p"].isin([0.0, p])]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
    for axis, (parent, title) in zip(axes, PARENTS.items()):
        for arm, colour in ARMS.items():
            groups = table[table["arm"] == arm].groupby("k")
            mean, error = groups[["l0", parent]].mean(), groups[parent].sem() * t_critical(groups[parent].count())
            axis.errorbar(mean["l0"], mean[parent], yerr=error, color=colour, marker="o", label=arm, capsize=2)
        axis.set(title=title, xlabel="clean L0, as trained")
    axes[0].set(ylabel="full absorption", ylim=(0, None))
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def t_critical(count):
    """Factor of a 95 % interval of Student's t, for numbers of values."""
    from scipy import stats

    return stats.t.ppf(0.975, (count - 1).clip(lower=1))


def draw_phases(effects: list[dict], p: float):
    """Change of absorption by masking at matched clean L0, in the plane of k and p, and of k and width; bold where the
    95 % interval excludes 0."""
    import matplotlib.pyplot as plt

    table = pd.DataFrame(effects)
    first = table["n_latents"].iloc[0]
    planes = {
        "p": (table[table["n_latents"] == first], "share of masked tokens"),
        "n_latents": (table[table["p"] == p], "latents"),
    }
    planes = {key: plane for key, plane in planes.items() if plane[0][key].nunique() > 1} or {"p": planes["p"]}
    figure, axes = plt.subplots(len(PARENTS), len(planes), figsize=(1.5 + 3.7 * len(planes), 5), squeeze=False)
    for row, (parent, title) in zip(axes, PARENTS.items()):
        for axis, (key, (plane, label)) in zip(row, planes.items()):
            part = plane[plane["parent"] == parent]
            shown = part.pivot(index=key, columns="k", values="difference").sort_index()
            image = axis.imshow(shown, cmap="PuOr_r", vmin=-0.7, vmax=0.7, aspect="auto", origin="lower")
            for _, cell in part.iterrows():
                clear = cell["low"] is not None and cell["low"] * cell["high"] > 0
                place = list(shown.columns).index(cell["k"]), list(shown.index).index(cell[key])
                dark = abs(cell["difference"]) > 0.45
                look = dict(weight="bold" if clear else "normal", color="white" if dark else "black")
                text = f"{cell['difference']:+.2f}".replace("-", "−")
                axis.text(*place, text, ha="center", va="center", fontsize=9, **look)
            axis.set(xticks=range(shown.shape[1]), xticklabels=[f"{k:g}" for k in shown.columns], ylabel=label)
            axis.set(yticks=range(len(shown)), yticklabels=[f"{v:g}" for v in shown.index], title=title)
    for axis in axes[-1]:
        axis.set(xlabel="k, mean number of active latents")
    figure.tight_layout()
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="change of full absorption")
    bar.outline.set_edgecolor(GREY)
    return figure
