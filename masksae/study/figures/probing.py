"""Pictures of notebooks 05 to 07: probes, task by task and in the mean, and the ablation of concepts."""

import pandas as pd

from masksae.study.figures.style import GREY, dots, grid_words, most_pairs, palette


def draw_probing(rows: list[dict], kind: str, score: str = "auc", raw: str = "raw_auc"):
    """Mean AUC (or another score) over tasks at matched clean L0, one panel per k, one dot per SAE; the dashed line is
    the probe on raw activations."""
    table = pd.DataFrame([row for row in rows if row["mode"] == "matched"])
    start, name = f"{kind}_{score}_", {"auc": "AUC"}.get(score, score)
    ks = [column.removeprefix(start) for column in table.columns if column.startswith(start)]
    ks = sorted((k for k in ks if k.isalnum()), key=lambda k: int(k) if k.isdigit() else 10**9)
    panels = [
        (table.assign(y=table[start + k]), f"mean {name},\nprobes on {k} latent{'' if k == '1' else 's'}") for k in ks
    ]
    return dots(panels, share=True, line=table[f"{kind}_{raw}"].iloc[0])


def draw_tasks(rows: list[dict], grid: str, k: int):
    """AUC task by task at matched clean L0, one dot per SAE of the arms with the most pairs, a bar for the probe on raw
    activations; hardest task below, other families on top."""
    import matplotlib.pyplot as plt

    part = most_pairs([row for row in rows if row["mode"] == "matched" and row["grid"] == grid])
    tasks = sorted(
        part[0]["tasks"], key=lambda task: (task["family"] != part[0]["tasks"][0]["family"], task["raw_auc"])
    )
    names = [task["task"] for task in tasks]
    colours = palette(dict.fromkeys(row["arm"] for row in part))
    figure, axis = plt.subplots(figsize=(7.5, 0.8 + 0.32 * len(names)))
    axis.scatter(
        [t["raw_auc"] for t in tasks], range(len(names)), marker="|", s=160, color=GREY, label="raw activations"
    )
    for place, (arm, colour) in enumerate(colours.items()):
        shift = (place - (len(colours) - 1) / 2) * min(0.25, 0.8 / len(colours))
        mine = [task for row in part if row["arm"] == arm for task in row["tasks"]]
        places = [(task["auc"][str(k)], names.index(task["task"]) + shift) for task in mine]
        axis.scatter(*zip(*places), s=14, color=colour, label=arm, alpha=0.8)
    axis.set(
        yticks=range(len(names)),
        yticklabels=[name.replace("_", " ") for name in names],
        xlabel=f"AUC, probes on {k} latents",
    )
    axis.set(title=f"{grid_words(grid)}, one dot per SAE")
    axis.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_perturbation(rows: list[dict], grid: str):
    """TPP and SCR against the number of ablated latents, at matched clean L0: a thin line per SAE, a thick one for the
    mean of an arm."""
    import matplotlib.pyplot as plt

    table = pd.DataFrame([row for row in rows if row["mode"] == "matched" and row["grid"] == grid])
    kinds = {"tpp": "TPP", "tpp_intended": "fall of the own probe"}
    kinds |= {"tpp_unintended": "fall of the other probes", "scr": "SCR"}
    columns = {kind: {int(c.rpartition("_")[2]): c for c in table if c.rpartition("_")[0] == kind} for kind in kinds}
    columns = {kind: by_n for kind, by_n in columns.items() if by_n}
    figure, axes = plt.subplots(1, len(columns), figsize=(3.4 * len(columns) + 1.2, 3.4), squeeze=False)
    for axis, (kind, by_n) in zip(axes[0], columns.items()):
        for arm, colour in palette(dict.fromkeys(table["arm"])).items():
            values = table.loc[table["arm"] == arm, list(by_n.values())]
            axis.plot(list(by_n), values.T, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(list(by_n), values.mean(), color=colour, linewidth=2.5, label=arm)
        axis.set(xscale="log", xticks=list(by_n), xticklabels=list(by_n), title=kinds[kind], xlabel="ablated latents")
        axis.minorticks_off()
        axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes[0, 0].set(ylabel="accuracy")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
