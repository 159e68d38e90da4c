"""Picture of notebook 04: trained SAEs beside their controls."""

from statistics import fmean

from masksae.study.figures.style import FAMILY, GREY
from masksae.study.report.controls import better, by_control
from masksae.study.report.labels import words
from masksae.study.scores.controls import CONTROLS

COLOUR = dict(zip(CONTROLS, (FAMILY[0], *FAMILY[3:])))


def draw_controls(rows: list[dict]):
    """A panel for each score at clean L0 = k, in it a column for the trained SAEs and for each control: one dot per
    pair, dots of a pair joined, a bar for the mean; the arrow says which way is better. Rows of `control_scores`."""
    import matplotlib.pyplot as plt

    by_kind, scores = by_control(rows), better(rows)
    kinds, seeds = [*by_kind], sorted({seed for pairs in by_kind.values() for seed in pairs})
    across = min(4, len(scores))
    down = -(-len(scores) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.1 * across, 2.9 * down), squeeze=False)
    for axis, (key, sign) in zip(axes.flat, scores.items()):
        for seed in seeds:
            at = [(place, by_kind[kind][seed][key]) for place, kind in enumerate(kinds) if seed in by_kind[kind]]
            axis.plot(*zip(*at), color=GREY, linewidth=0.6, alpha=0.5, zorder=1)
        for place, kind in enumerate(kinds):
            values = [row[key] for row in by_kind[kind].values()]
            axis.scatter([place] * len(values), values, color=COLOUR[kind], s=22, alpha=0.8, zorder=2)
            axis.scatter(place, fmean(values), color=COLOUR[kind], marker="_", s=500, linewidth=2.5, zorder=3)
        if "_auc_" not in key:  # chance is a half there
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.set_title(f"{words(key)} {'↑' if sign > 0 else '↓'}", fontsize="small")
        axis.set(xticks=range(len(kinds)), xticklabels=[CONTROLS[k].replace(" ", "\n") for k in kinds])
        axis.set(xlim=(-0.5, len(kinds) - 0.5))
        axis.tick_params(labelsize="small")
        axis.tick_params(axis="x", labelsize="x-small")
    for axis in axes.flat[len(scores) :]:
        axis.set_visible(False)
    figure.tight_layout()
    return figure
