"""Pictures of notebooks 04, 09 and 10: absorption, along training, against what it costs, and by whom."""

import math

import numpy as np
import pandas as pd

from masksae.study.explore import Story
from masksae.study.figures.style import FAMILY, GREY, dots, grid_words, log_ticks, most_pairs, palette
from masksae.study.scores.curves import KINDS

MARKERS = "osD^vPX*<>hpd8"


def draw_absorption(rows: list[dict]):
    """Mean full absorption per SAE, as trained and at matched clean L0."""
    table = pd.DataFrame(rows)
    panels = [
        (table[table["mode"] == mode].assign(y=lambda t: t["mean_full"]), f"mean full absorption,\n{label}")
        for mode, label in (("as_trained", "as trained"), ("matched", "at clean L0 = k"))
    ]
    return dots(panels, share=True, bottom=0)


def draw_items(rows: list[dict], grid: str, items: str):
    """Full absorption per letter (`items` "letters") or per context ("parents") at matched clean L0, one dot per SAE of
    the arms with the most pairs."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    part = most_pairs([row for row in rows if row["mode"] == "matched" and row["grid"] == grid])
    table = pd.DataFrame(
        {"arm": row["arm"], "item": item["letter"], "full": item["full"]} for row in part for item in row[items]
    )
    figure, axis = plt.subplots(figsize=(max(9, 0.42 * table["item"].nunique()), 3))
    options = dict(dodge=True, jitter=False, palette=palette(table["arm"].unique()), size=4, alpha=0.8, ax=axis)
    sns.stripplot(table, x="item", y="full", hue="arm", order=sorted(table["item"].unique()), **options)
    axis.set(xlabel=None, ylabel="full absorption", title=f"{grid_words(grid)}, one dot per SAE", ylim=(-0.02, None))
    if items == "parents":
        plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    axis.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_fronts(trained: pd.DataFrame, matched: pd.DataFrame):
    """Absorption of every SAE against what it costs: clean L0, as trained; explained variance, at clean L0 = k. Colour
    is the arm, marker the grid. Low absorption is up."""
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
    log_ticks(axes[0].xaxis, trained["l0"])
    axes[1].set(xlabel="explained variance (centred), at clean L0 = k")
    axes[0].invert_yaxis()
    handles = [plt.Line2D([], [], color=colour, linewidth=5, label=arm) for arm, colour in colours.items()]
    handles += [
        plt.Line2D([], [], color=GREY, marker=marker, linestyle="", label=grid_words(grid))
        for grid, marker in zip(grids, MARKERS * len(grids))
    ]
    axes[1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.tight_layout()
    return figure


def draw_summary(scores: pd.DataFrame):
    """Absorption and explained variance of every SAE at matched clean L0: the two sides of the trade."""
    panels = [
        (scores.assign(y=scores["mean_full"]), "mean full absorption,\nat clean L0 = k"),
        (scores.assign(y=scores["ev_centred"]), "explained variance (centred),\nat clean L0 = k"),
    ]
    return dots(panels)


def draw_along(rows: list[dict]):
    """The headline: full absorption at clean L0 = k along training, one row per kind, against steps and against clean
    explained variance. A thick line is the mean of an arm, bars are its 95 % interval over seeds, thin lines are
    SAEs; dashed, the mean of its specific part."""
    import matplotlib.pyplot as plt

    table = pd.DataFrame(rows)
    arms = list(dict.fromkeys(table["arm"]))
    figure, axes = plt.subplots(len(KINDS), 2, figsize=(10.5, 7.2), sharey="row", sharex="col")
    for line, (kind, title) in zip(axes, KINDS.items()):
        for arm, colour in palette(arms).items():
            part = table[table["arm"] == arm]
            for _, one in part.sort_values("step").groupby("seed"):
                for axis, x in zip(line, ("step", "ev_centred")):
                    axis.plot(one[x], one[kind], color=colour, linewidth=0.6, alpha=0.35)
            specific = f"{kind}_specific"
            mean = part.groupby("step")[["ev_centred", kind, specific]].mean()
            for axis, x in zip(line, (mean.index, mean["ev_centred"])):
                axis.errorbar(x, mean[kind], yerr=_half_interval(part, kind), color=colour, linewidth=2.2, capsize=3,
                              elinewidth=1, marker="o", markersize=4, label=arm)  # fmt: skip
                axis.plot(x, mean[specific], color=colour, linewidth=1.4, linestyle="--")
        line[0].set(ylabel=f"mean full absorption,\n{title}", ylim=(0, 1.15 * table[kind].max()), xscale="log")
    handles, _ = axes[0, 1].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color=GREY, linestyle="--", label="specific"))
    axes[0, 1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    ticks = sorted(table["step"].unique())
    ticks = [t for t, following in zip(ticks, [*ticks[1:], math.inf]) if following > 1.3 * t]
    axes[-1, 0].set(xlabel="training steps (log scale)", xticks=ticks, xticklabels=ticks)
    axes[-1, 0].minorticks_off()
    axes[-1, 1].set(xlabel="clean explained variance at L0 = k")
    figure.tight_layout()
    return figure


def _half_interval(part: pd.DataFrame, column: str):
    """Half the 95 % t interval of the mean over seeds at each step; 0 for a single seed."""
    from scipy import stats

    groups = part.groupby("step")[column]
    count, error = groups.count(), groups.std().fillna(0) / np.sqrt(groups.count())
    return [stats.t.ppf(0.975, n - 1) * e if n > 1 else 0.0 for n, e in zip(count, error)]


def draw_absorbers(stories: dict[str, dict[str, Story]]):
    """A panel per kind of parent, a dot per absorber, larger the more words it absorbed: on which share of all words it
    fires, and how far it points along the parent. Kind -> arm -> story."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(stories), figsize=(4.4 * len(stories) + 1.4, 3.6), sharex=True, sharey=True, squeeze=False
    )
    for axis, (kind, by_arm) in zip(axes[0], stories.items()):
        for arm, colour in palette(by_arm).items():
            keys, missed = ["fires on", "cosine with parent"], by_arm[arm].missed
            columns = ["absorber", *keys]
            counts = pd.DataFrame(missed, columns=columns).groupby(columns).size().reset_index(name="n")
            label = f"{arm}: {len(missed)} words, {len(counts)} absorbers"
            axis.scatter(counts[keys[0]], counts[keys[1]], color=colour, s=12 + 6 * counts["n"], alpha=0.6, label=label)
        axis.set(title=kind, xlabel="share of words on which\nthe absorber fires (log scale)", xscale="log")
        log_ticks(axis.xaxis, [])
        axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.1), markerscale=0.7)
    if not any(story.missed for by_arm in stories.values() for story in by_arm.values()):
        axes[0, 0].set_xlim(0.001, 1)  # a logarithmic axis without a dot has no ends of its own
    axes[0, 0].set(ylabel="decoder cosine of the absorber\nwith the parent's direction")
    figure.tight_layout()
    return figure


def draw_noise(table: list[dict]):
    """Standard deviation of absorption by source, one group of bars for each arm and for their difference. Rows of
    `noise_table`."""
    import matplotlib.pyplot as plt

    frame = pd.DataFrame(table)
    names, sources = list(dict.fromkeys(frame["of"])), list(dict.fromkeys(frame["source"]))
    figure, axis = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(sources)
    for place, (source, colour) in enumerate(zip(sources, (*FAMILY, GREY))):
        sd = [frame.loc[(frame["of"] == name) & (frame["source"] == source), "sd"].iloc[0] for name in names]
        x = [i + (place - (len(sources) - 1) / 2) * width for i in range(len(names))]
        axis.bar(x, sd, width=0.9 * width, color=colour, label=source)
    labels = [name.replace(" less ", "\nless\n") for name in names]
    axis.set(xticks=range(len(names)), xticklabels=labels, ylabel="standard deviation of\nmean full absorption")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), title="source")
    return figure
