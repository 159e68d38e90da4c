"""Pictures of notebook 00: absorption in the simulated world, against P(parent | word) and share of masked tokens."""

import pandas as pd

from masksae.study.figures.style import palette

PARENTS = {"same": "parent set by the same token", "cross": "parent set by a context token"}
ARMS = ("unmasked", "kept", "dropped")


def draw_curves(rows: list[dict], p: float):
    """Full absorption against P(cross-token parent | word), at the first k and at clean L0 = k, and dashed the F1 of
    the main latents; bars are 95 % intervals over worlds."""
    table = pd.DataFrame(rows)
    part = table[(table["k"] == table["k"].iloc[0]) & table["p"].isin([0.0, p])]
    return _draw(part, "q", "P(cross-token parent | word)", f1=True)


def draw_phases(rows: list[dict]):
    """Full absorption against the share of masked tokens, at the first k, the largest q and clean L0 = k; bars are 95 %
    intervals over worlds."""
    table = pd.DataFrame(rows)
    part = table[(table["k"] == table["k"].iloc[0]) & (table["q"] == table["q"].max())]
    start = part[part["arm"] == "unmasked"]
    lines = [part[part["arm"] != "unmasked"], *(start.assign(arm=arm) for arm in ARMS[1:])]
    return _draw(pd.concat(lines), "p", "share of masked tokens")


def _draw(table: pd.DataFrame, x: str, label: str, f1: bool = False):
    """A panel for each rule and kind of parent, a line for each arm."""
    import matplotlib.pyplot as plt

    table, rules = table[table["mode"] == "matched"], list(dict.fromkeys(table["rule"]))
    size = dict(figsize=(9, 0.6 + 2.9 * len(rules)), sharex=True, sharey=True, squeeze=False)
    figure, axes = plt.subplots(len(rules), len(PARENTS), **size)
    for row, rule in zip(axes, rules):
        for axis, (kind, title) in zip(row, PARENTS.items()):
            for arm, colour in palette(ARMS).items():
                groups = table[(table["rule"] == rule) & (table["arm"] == arm)].groupby(x)
                if len(groups) == 0:
                    continue
                look = dict(color=colour, marker="o", markersize=4, capsize=2)
                mean, error = groups[kind].mean(), groups[kind].sem() * t_critical(groups[kind].count())
                axis.errorbar(mean.index, mean, yerr=error, label=arm, **look)
                if f1:
                    axis.plot(groups[f"{kind}_f1"].mean(), color=colour, linestyle="--", linewidth=1)
            axis.set(title=f"{rule}: {title}", ylim=(-0.03, 1.03))
    for axis in axes[-1]:
        axis.set(xlabel=label)
    for axis in axes[:, 0]:
        axis.set(ylabel="full absorption" + f1 * " (dashed: F1)")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def t_critical(count):
    """Factor of a 95 % interval of Student's t, for numbers of values."""
    from scipy import stats

    return stats.t.ppf(0.975, (count - 1).clip(lower=1))
