"""Picture of the gate: every row that was taken, beside the bounds."""

from masksae.study.figures.style import FAMILY, GREY
from masksae.study.profile import Profile
from masksae.study.report.gate import failed

PANELS = {
    "ev_centred": "explained\nvariance",
    "main_f1": "main F1,\nletters",
    "context_main_f1": "main F1,\ncontexts",
    "dense_absorbers": "dense\nabsorbers",
    "mean_full": "absorption,\nletters",
    "context_full": "absorption,\ncontexts",
}


def draw_gate(profile: Profile, rows: list[dict]):
    """A line for each variant and SAE, a dot for each score, filled where the row passes; dotted lines are bounds. Rows
    of `gate_rows`."""
    import matplotlib.pyplot as plt

    bounds = profile.decisions.gate
    limits = {
        "main_f1": bounds.letters_f1,
        "context_main_f1": bounds.contexts_f1,
        "dense_absorbers": bounds.dense_absorbers,
    }
    kinds = dict.fromkeys(row["architecture"] for row in rows)
    colours = dict(zip(kinds, FAMILY))
    passes = [not failed(row, bounds) for row in rows]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12.5, 1.2 + 0.24 * len(rows)), sharey=True)
    for axis, (key, title) in zip(axes, PANELS.items()):
        for place, row in enumerate(rows):
            colour = colours[row["architecture"]]
            filled = colour if passes[place] else "none"
            axis.scatter(row[key] or 0.0, place, s=28, edgecolors=colour, facecolors=filled)
        if key in limits:
            axis.axvline(limits[key], color=GREY, linestyle=":", linewidth=1)
        for place in range(1, len(rows)):
            if rows[place]["variant"] != rows[place - 1]["variant"]:
                axis.axhline(place - 0.5, color=GREY, linewidth=0.4, alpha=0.5)
        axis.locator_params(axis="x", nbins=3)
        axis.margins(x=0.08)
        axis.set(xlabel=title)
        axis.tick_params(labelsize="small")
    names = [f"{row['variant'].replace('_', ' ')}: {row['grid']}" for row in rows]
    axes[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    handles = [plt.Line2D([], [], color=c, marker="o", linestyle="", label=kind) for kind, c in colours.items()]
    handles.append(
        plt.Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="", label="fails the gate")
    )
    axes[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.tight_layout()
    return figure
