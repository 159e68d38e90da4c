"""One HTML page about somebody's own SAE: its scores as trained and at matched clean L0, with pictures; no other file, no network."""

import base64
import html
import io
from pathlib import Path

from masksae.files import write_text
from masksae.study.figures import absorption, probing, style
from masksae.study.figures.style import scale_note
from masksae.study.own_sae import Guest, failed
from masksae.study.report.page import page

SCORES = {
    "reconstruction": {
        "l0": "L0, latents active on a clean token", "ev_centred": "explained variance", "ce_score": "CE score: 1 is the model as it is, 0 zeros in place",
        "dead_latents": "dead latents on the held-out text", "dense_latents": "latents active on more than a tenth of it",
    },
    "absorption": {
        "mean_full": "full absorption, first letters", "mean_fraction": "absorption fraction, first letters",
        "dense_absorbers": "share of it credited to dense latents",
    },
    "contexts": {"context_full": "full absorption, what came before the word"},
    "probing": {"probing_raw_auc": "probing, raw activations, AUC", "probing_auc_": "probing on {} latents, AUC"},
    "ood": {"ood_raw_auc": "shifted texts, raw activations, AUC", "ood_auc_": "shifted texts, {} latents, AUC"},
    "perturbation": {"tpp_": "TPP, {} latents ablated", "scr_": "SCR, {} latents ablated"},
}  # fmt: skip
"""Scores of the table; a name that ends in an underscore stands for one score for each number of latents."""


def write(guest: Guest, found: dict[str, list[dict]]) -> Path:
    """Write `report.html` into the guest's folder."""
    config, profile = guest.sae.config, guest.profile
    head = (
        f"<h1>{html.escape(guest.name)}</h1><p>{html.escape(guest.table[0]['architecture'])}, {config.n_latents:,} latents on width {config.d_model}, read from "
        f"<code>{html.escape(str(guest.folder))}</code>. Scored on {html.escape(profile.model.source)}, {html.escape(profile.model.place)}.</p>"
        "<p><b>As trained</b> uses the SAE's own threshold. <b>Matched</b> moves it so that clean L0 is exactly the value shown: compare SAEs there, since "
        "most scores get better with more latents.</p>"
    )
    parts = [head, table(found)]
    parts += [f"<p><b>{metric}</b> could not be taken: {html.escape(why)}</p>" for metric, why in failed(found).items()]
    found = {metric: rows for metric, rows in found.items() if metric not in failed(found)}
    parts += [*(_figure(*drawn) for drawn in _drawings(guest, found))]
    parts.append(f"<p>{html.escape(scale_note(profile))}</p>")
    return write_text(guest.results / "report.html", page(f"{guest.name}, masksae", "\n".join(parts)))


def rows(found: dict[str, list[dict]]) -> list[tuple[str, dict[str, float]]]:
    """(score in words, value by mode) of all that was measured; {"failed": why} for a metric that could not be taken."""
    listed = []
    for metric, names in SCORES.items():
        if metric in failed(found):
            listed.append((f"{metric}: could not be taken", {"failed": failed(found)[metric]}))
            continue
        by_mode = {row["mode"]: row for row in found.get(metric, ())}
        for name, words in names.items():
            first = next(iter(by_mode.values()), {})
            keys = [key for key in first if key == name or (name.endswith("_") and key.removeprefix(name).isdigit())]
            keys.sort(key=lambda key, name=name: int(key.removeprefix(name) or 0) if name.endswith("_") else 0)
            listed += [
                (words.format(key.removeprefix(name)), {mode: row[key] for mode, row in by_mode.items()})
                for key in keys
            ]
    return listed


def number(value) -> str:
    """A score as text.

    >>> number(23), number(0.5), number(None)
    ('23', '0.500', '–')
    """
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def table(found: dict[str, list[dict]]) -> str:
    """HTML of `rows`."""
    lines = [
        f"<tr><td>{html.escape(words)}</td>"
        + "".join(f"<td>{number(values.get(m))}</td>" for m in ("as_trained", "matched"))
        + "</tr>"
        for words, values in rows(found)
    ]
    return f"<table><tr><th>score</th><th>as trained</th><th>matched</th></tr>{''.join(lines)}</table>"


def _drawings(guest: Guest, found: dict[str, list[dict]]):
    """(figure, caption) of each picture that the scores allow."""
    style.style()
    if "absorption" in found:
        caption = (
            "Full absorption by first letter: how often the letter's main latents are silent and another carries it."
        )
        yield absorption.draw_items(found["absorption"], guest.name, "letters"), caption
    if "contexts" in found:
        yield absorption.draw_items(found["contexts"], guest.name, "parents"), "The same for what came before the word."
    if "probing" in found:
        ks = guest.profile.probing.ks
        yield (
            probing.draw_tasks(found["probing"], guest.name, ks[0]),
            f"Probes on {ks[0]} latents, task by task; the bar is the probe on raw activations.",
        )
    if "ood" in found:
        ks = guest.profile.probing.shifted_ks
        yield (
            probing.draw_tasks(found["ood"], guest.name, ks[0]),
            f"Probes on {ks[0]} latents under a shift of the texts.",
        )


def _figure(figure, caption: str) -> str:
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, transparent=True, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{source}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
