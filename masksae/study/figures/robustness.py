"""Picture of notebook 07's second half: what one replaced token does to the tokens after it."""

import pandas as pd

from masksae.study.figures.style import GREY, palette
from masksae.study.report.labels import REPLACED
from masksae.study.scores.robustness import KINDS, REACHES

PANELS = {"jaccard": "overlap of active latents\n(Jaccard index)", "recon": "relative change of\nthe reconstruction"}


def draw_robustness(rows: list[dict], grid: str):
    """Overlap of active latents (above) and change of the reconstruction (below) for each kind of replacement, near the
    replaced token and farther on; SAEs of one grid at matched clean L0. One dot per SAE, arms side by side, pairs
    joined by a line; a dashed bar is the change of the activation itself."""
    import matplotlib.pyplot as plt

    table = pd.DataFrame([row for row in rows if row["mode"] == "matched" and row["grid"] == grid])
    colours = palette(dict.fromkeys(table["arm"]))
    place = {arm: (i - (len(colours) - 1) / 2) * 0.6 / max(1, len(colours) - 1) for i, arm in enumerate(colours)}
    figure, axes = plt.subplots(2, len(KINDS), figsize=(3.4 * len(KINDS) + 1, 6), sharex=True, sharey="row")
    for kind, column in zip(KINDS, axes.T):
        for axis, score in zip(column, PANELS):
            for at, reach in enumerate(REACHES):
                key = f"robustness_{kind}_{reach}_{score}"
                for _, pair in table.groupby("seed", sort=False):
                    x = [at + place[arm] for arm in pair["arm"]]
                    axis.plot(x, pair[key], color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
                for arm, colour in colours.items():
                    y = table.loc[table["arm"] == arm, key]
                    axis.scatter(
                        [at + place[arm]] * len(y), y, color=colour, s=26, label=arm if at == 0 else None, zorder=2
                    )
                if score == "recon":
                    moved = table[f"robustness_{kind}_{reach}_x"].iloc[0]
                    axis.hlines(
                        moved, at - 0.4, at + 0.4, color=GREY, linestyle="--", label=None if at else "activation"
                    )
            axis.set(xticks=range(len(REACHES)), xlim=(-0.6, len(REACHES) - 0.4))
            axis.set_xticklabels([f"{first} to {last} after" for first, last in REACHES.values()])
        column[0].set(title=f"replaced by {REPLACED[kind]}")
    for axis, label in zip(axes[:, 0], PANELS.values()):
        axis.set(ylabel=label)
    axes[1, 0].set_ylim(bottom=0)
    axes[1, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
