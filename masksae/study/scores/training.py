"""Scores of notebook 02: what was recorded while the SAEs were trained."""

from masksae.study.store import Subject

RECORDS = 60
"""Of an SAE's history that are shown, at most."""


def training_scores(run: Subject) -> list[dict]:
    """One row per SAE: its last record, and its history thinned out: {"step": [...], "loss": [...], ...}."""
    return run.rows("train", run.profile.training, _training_scores)


def _training_scores(run: Subject) -> list[dict]:
    saes = run.load_saes()
    return [row | saes[row["sae"]].history[-1] | {"history": thinned(saes[row["sae"]].history)} for row in run.table]


def thinned(history: list[dict]) -> dict[str, list]:
    """Every n-th record, the last among them, key by key.

    >>> thinned([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}])
    {'step': [0, 1], 'loss': [2.0, 1.0]}
    """
    kept = history[:: -(-len(history) // RECORDS)]
    kept += [history[-1]] if kept[-1] is not history[-1] else []
    return {key: [record[key] for record in kept] for key in history[-1]}
