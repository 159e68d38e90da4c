"""Pictures of notebook 01: a block of text with its masks, and the norms of the activations."""

import html

import pandas as pd

from masksae.study.figures.style import COLOURS, palette

MARK = f"background:{COLOURS['kept']};color:white;border-radius:3px;padding:0 2px;font-size:70%"


def masked_text_html(tokenizer, ids, is_masked, tokens: int = 90) -> str:
    """A block as the model sees it, masked positions marked; for display in a notebook."""
    parts = []
    for token, masked in list(zip(ids.tolist(), is_masked.tolist()))[:tokens]:
        text = html.escape(tokenizer.decode([token])).replace("\n", "↵")
        parts.append(f'<span style="{MARK if masked else ""}">{text}</span>')
    return f'<div style="line-height:1.7;max-width:48em">{"".join(parts)}</div>'


def draw_norms(rows: list[dict]):
    """Norm of the residual stream at ordinary and masked positions, per arm."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axis = plt.subplots(figsize=(7, 3.4))
    table = pd.DataFrame(rows)
    for (arm, masked), part in table.groupby(["arm", "masked"], sort=False):
        label = f"{arm} arm, {'masked' if masked else 'ordinary'} positions"
        look = dict(color=palette(table["arm"].unique())[arm], linewidth=2, linestyle="--" if masked else "-")
        axis.ecdf(part["norm"], label=label, **look)
    axis.set(xscale="log", xlabel="norm of the residual stream (log scale)", ylabel="share of positions below")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="lower right")
    return figure
