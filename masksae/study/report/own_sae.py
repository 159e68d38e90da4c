"""One HTML page about somebody's own SAE: its scores as trained and at matched clean L0, with pictures; no other file,
no network."""

import base64
import html
import io
from pathlib import Path

from masksae.files import write_text
from masksae.study.figures import absorption, probing, style
from masksae.study.own_sae import METRICS, OwnSAE, failed
from masksae.study.report import labels
from masksae.study.report.page import page
from masksae.study.report.tables import number, to_html

MODES = ("as_trained", "matched")

SHOWN = (
    *("l0", "ev_centred", "ce_score", "dead_latents", "dense_latents"),
    *("mean_full", "mean_specific", "dense_absorbers", "main_f1", "main_recall", "mean_fraction"),
    *("context_full", "context_specific", "context_main_f1"),
    *("probing_raw_auc", "probing_auc_", "ood_raw_auc", "ood_auc_", "tpp_", "scr_"),
    *("robustness_random_near_jaccard", "robustness_random_near_recon", "robustness_random_near_x"),
)
"""Scores of the table, in its order."""

LETTERS = "Full absorption by first letter: how often the letter's main latents are silent and another carries it."


def write(own: OwnSAE, scores: dict[str, list[dict]]) -> Path:
    """Write `report.html` into the SAE's folder of results; `scores` of `own_sae.evaluate`."""
    config, model = own.sae.config, own.profile.model
    head = (
        f"<h1>{html.escape(own.name)}</h1><p>{html.escape(own.table[0]['architecture'])}, {config.n_latents:,} latents "
        f"on width {config.d_model}, read from <code>{html.escape(str(own.folder))}</code>. "
        f"Scored on {html.escape(model.source)}, {html.escape(model.place)}.</p>"
        "<p><b>As trained</b> uses the SAE's own threshold. <b>Matched</b> moves it so that clean L0 is exactly the "
        "value shown: compare SAEs there, since most scores get better with more latents.</p>"
    )
    if own.k is None:
        head += (
            f"<p>This SAE is silent: L0 {own.l0:.2g} on the clean text. It has no matched scores and no pictures.</p>"
        )
    parts, reasons = [head, to_html(table(scores))], failed(scores)
    parts += [f"<p><b>{metric}</b> could not be taken: {html.escape(why)}</p>" for metric, why in reasons.items()]
    taken = {metric: rows for metric, rows in scores.items() if own.k and metric not in reasons}
    parts += [*(_figure(*drawn) for drawn in _drawings(own, taken))]
    parts.append(f"<p>{html.escape(style.scale_note(own.profile))}</p>")
    return write_text(own.results / "report.html", page(f"{own.name}, masksae", "\n".join(parts)))


def rows(scores: dict[str, list[dict]]) -> list[tuple[str, dict[str, float]]]:
    """(score in words, value by mode) of all that was measured; {"failed": why} for a metric that could not be
    taken."""
    listed = []
    for metric in METRICS:
        if metric in failed(scores):
            listed.append((f"{metric}: could not be taken", {"failed": failed(scores)[metric]}))
            continue
        by_mode = {row["mode"]: row for row in scores.get(metric, ())}
        keys = next(iter(by_mode.values()), {})
        for start in (start for start in SHOWN if labels.SCORES[start].result == metric):
            for key in labels.measured(start, keys):
                words = labels.words(key) + labels.SCORES[start].more
                listed.append((words, {mode: row[key] for mode, row in by_mode.items()}))
    return listed


def table(scores: dict[str, list[dict]]) -> list[list[str]]:
    """`rows` as cells, the titles first."""
    lines = [[words, *(number(values.get(mode)) for mode in MODES)] for words, values in rows(scores)]
    return [["score", *(mode.replace("_", " ") for mode in MODES)], *lines]


def _drawings(own: OwnSAE, scores: dict[str, list[dict]]):
    """(figure, caption) of each picture that the scores allow."""
    style.style()
    for metric, items, caption in (
        ("absorption", "letters", LETTERS),
        ("contexts", "parents", "The same for what came before the word."),
    ):
        if metric in scores:
            yield absorption.draw_items(scores[metric], own.name, items), caption
    options = own.profile.probing
    for metric, ks, caption in (
        ("probing", options.ks, ", task by task; the bar is the probe on raw activations."),
        ("ood", options.shifted_ks, " under a shift of the texts."),
    ):
        if metric in scores:
            yield probing.draw_tasks(scores[metric], own.name, ks[0]), f"Probes on {ks[0]} latents{caption}"


def _figure(figure, caption: str) -> str:
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, transparent=True, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    source = base64.b64encode(data.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
