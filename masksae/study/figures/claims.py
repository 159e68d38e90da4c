"""Picture of notebook 09: what C1 to C3 rest on, in every grid."""

from masksae.study.figures.style import FAMILY, GREY, log_ticks
from masksae.study.report import labels
from masksae.study.report.claims import endpoints


def draw_everywhere(verdicts: dict[str, dict], architectures: dict[str, str]):
    """A panel per primary endpoint of C1 to C3: the difference of every grid with its 95 % interval against the clean
    L0 of its unmasked SAEs. The band is the margin, hollow is what is not measurable. The scale is that of grids with
    three pairs and more; wider intervals leave the panel.

    verdicts       as in claims.json
    architectures  of each grid
    """
    import matplotlib.pyplot as plt

    rows = [row for claim, _, row in endpoints(verdicts) if claim in ("C1", "C2", "C3") and row.get("primary")]
    rows += [row for cells in verdicts["C4"]["cells"].values() for row in cells.values()]
    rows = [row for row in rows if "difference" in row]
    panels = {
        name: [row for row in rows if row["endpoint"] == name] for name in dict.fromkeys(r["endpoint"] for r in rows)
    }
    kinds = list(dict.fromkeys(architectures[row["grid"]] for row in rows))
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(3.2 * len(panels) + 1, 3.2), squeeze=False)
    for axis, part in zip(axes[0], panels.values()):
        for row in part:
            kind, ends = kinds.index(architectures[row["grid"]]), (row["low"], row["high"])
            x, y, colour = row["clean_l0"][0] * 1.08**kind, row["difference"], FAMILY[kind]
            bar = None if row["low"] is None else [[abs(y - end)] for end in ends]
            face = "none" if row["verdict"] == "not measurable" else colour
            options = dict(color=colour, markerfacecolor=face, label=kinds[kind], capsize=3, elinewidth=1.2)
            axis.errorbar(x, y, yerr=bar, fmt="o", **options)
        margin = part[0]["margin"]
        axis.axhspan(-margin, margin, color=GREY, alpha=0.15, linewidth=0)
        axis.axhline(0, color=GREY, linewidth=0.8)
        reach = [abs(end) for row in part if row["pairs"] > 2 for end in (row["low"], row["high"])]
        axis.set(title=labels.words(part[0]["score"]), xscale="log", xlabel="clean L0, unmasked (log scale)")
        axis.set_ylim(*(1.1 * max([*reach, 2 * margin]) * side for side in (-1, 1)))
        log_ticks(axis.xaxis, [row["clean_l0"][0] for row in part])
    axes[0, 0].set_ylabel("masked less unmasked")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    axes[0, -1].legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
