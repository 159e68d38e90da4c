"""Pictures of notebook 08: every cell of arm and kind of SAE, and what the share of masked tokens does."""

import pandas as pd

from masksae.study.figures.style import GREY, WIDTH, grid_words, palette
from masksae.study.report.effects import baseline_arm, effect

PANELS = {
    "l0_ratio": "clean L0 / k",
    "ev_centred": "explained\nvariance",
    "mean_full": "absorption,\nletters",
    "main_f1": "F1 of main\nlatents, letters",
    "context_full": "absorption,\ncontexts",
    "context_main_f1": "F1 of main\nlatents, contexts",
    "robustness_random_near_jaccard": "overlap near\na random token",
}
"""Scores of these pictures and what they are called there."""


def draw_cells(scores: pd.DataFrame):
    """Every cell's SAEs in a line: a dot per SAE, joined with the unmasked one of its pair, a bar for the mean. Merged
    scores of one mode (`report.effects.merge`)."""
    import matplotlib.pyplot as plt

    main, baseline = scores["grid"].iloc[0], baseline_arm(scores)
    table = scores.assign(l0_ratio=scores["l0"] / scores["k"])
    table = pd.concat([part for _, part in table.groupby("grid", sort=False)])
    place = {grid: "" if grid == main else f", {grid_words(grid)}" for grid in table["grid"]}
    table["cell"] = [arm.replace("_", " ") + place[grid] for arm, grid in zip(table["arm"], table["grid"])]
    cells, panels = list(dict.fromkeys(table["cell"])), [column for column in PANELS if column in table]
    arms = palette(dict.fromkeys(table["arm"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 1.4 + 0.32 * len(cells)), sharey=True)
    for axis, column in zip(axes, panels):
        for _, part in table.groupby(["grid", "seed"]):
            first = part[part["arm"] == baseline]
            for _, one in part[part["arm"] != baseline].iterrows():
                pair = pd.concat([first, one.to_frame().T])
                axis.plot(pair[column], [cells.index(c) for c in pair["cell"]], color=GREY, linewidth=0.5, alpha=0.4)
        for (arm, cell), part in table.groupby(["arm", "cell"], sort=False):
            y, colour = cells.index(cell), arms[arm]
            axis.scatter(part[column], [y] * len(part), color=colour, s=18, alpha=0.8, zorder=2)
            axis.scatter(part[column].mean(), y, color=colour, marker="|", s=240, linewidth=2.5, zorder=3)
        axis.axvline(table.loc[table["cell"] == cells[0], column].mean(), color=GREY, linestyle=":", linewidth=1)
        axis.locator_params(axis="x", nbins=3)
        axis.set(xlabel=PANELS[column], yticks=range(len(cells)), yticklabels=cells)
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    figure.tight_layout()
    return figure


def draw_shares(scores: pd.DataFrame, shares: dict[str, float], grid: str):
    """What the share of masked tokens changes: a panel per score, means of an arm less unmasked with their 95 %
    intervals, and thin the pairs that have SAEs of every arm. Merged scores of one mode.

    shares  p of each arm (`Profile.shares`)
    """
    import matplotlib.pyplot as plt

    part, first = scores[scores["grid"] == grid], baseline_arm(scores)
    panels = [column for column in PANELS if column in scores]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 * len(panels), 2.9), squeeze=False)
    for axis, column in zip(axes[0], panels):
        changed = part.pivot(index="seed", columns="arm", values=column)[[first, *shares]].dropna()
        for _, pair in changed.sub(changed[first], axis=0).iterrows():
            axis.plot([0, *shares.values()], pair, color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
        for arm, colour in palette(shares).items():
            found = effect(scores, column, grid, arm)
            bar = None if found.low is None else (found.high - found.low) / 2
            options = dict(color=colour, fmt="o", capsize=3, elinewidth=1.4, label=f"{arm}, {found.pairs} pairs")
            axis.errorbar(shares[arm], found.difference, yerr=bar, **options)
        axis.axhline(0, color=GREY, linestyle=":", linewidth=1)
        axis.set(title=PANELS[column], xlim=(0, 1.15 * max(shares.values())), xticks=[0, *shares.values()])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.title.set_size("medium")
    axes[0, 0].set_ylabel("masked less unmasked")
    axes[0, len(panels) // 2].set_xlabel("share p of tokens masked")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
