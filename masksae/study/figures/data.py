"""Pictures of notebook 01: a block of text with its masks, and the norms of the activations."""

import html

import pandas as pd

from masksae.data.tokens import token_texts
from masksae.study.figures.style import COLOURS, GREY, log_ticks, palette

MARK = f"background:{COLOURS['kept']};color:white;border-radius:3px;padding:0 2px;font-size:70%"

SHOWN = 90
"""Tokens of a block of text that are shown."""


def masked_text_html(tokenizer, ids, is_masked) -> str:
    """The first tokens of a block as the model sees it, masked positions marked; for display in a notebook."""
    parts = []
    for token, masked in zip(token_texts(tokenizer, ids[:SHOWN].tolist()), is_masked.tolist()):
        text = html.escape(token).replace("\n", "↵")
        parts.append(f'<span style="{MARK if masked else ""}">{text}</span>')
    return f'<div style="line-height:1.7;max-width:48em">{"".join(parts)}</div>'


def draw_norms(rows: list[dict]):
    """Norm of the residual stream at ordinary and masked positions, per arm; arms with the same masks lie within each
    other."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.4))
    table, lines = pd.DataFrame(rows), {False: "-", True: "--"}
    colours = palette(table["arm"])
    widths = {arm: 1.5 + 4 * place / len(colours) for place, arm in enumerate(reversed(colours))}
    for (arm, masked), part in table.groupby(["arm", "masked"], sort=False):
        axis.ecdf(part["norm"], color=colours[arm], linewidth=widths[arm], linestyle=lines[masked])
    axis.set(xscale="log", xlabel="norm of the residual stream (log scale)", ylabel="share of positions below")
    log_ticks(axis.xaxis, table["norm"])
    handles = [plt.Line2D([], [], color=colour, linewidth=2, label=arm) for arm, colour in colours.items()]
    handles += [
        plt.Line2D([], [], color=GREY, linestyle=line, label=f"{'masked' if masked else 'ordinary'} positions")
        for masked, line in lines.items()
    ]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
