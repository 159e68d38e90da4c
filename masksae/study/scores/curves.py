"""Scores of notebook 04 along training: absorption of the same-token kind and of the cross-token kind.

Absorption changes while an SAE trains, and a masked SAE is further behind on clean text at the same step. So the arms
are compared against steps and against clean explained variance, at snapshots that are finished SAEs of shorter runs
(with AuxK's limit of the whole run), at matched clean L0. Only a part of a run has snapshots.
"""

from masksae.metrics.reconstruction import active_counts, reconstruction
from masksae.parallel import in_threads
from masksae.saes.sae import SAE
from masksae.study.run import RunPart
from masksae.study.scores.absorption import context_score, letter_score
from masksae.study.scores.matched import matched_threshold

KINDS = {"letters": "same token (first letters)", "contexts": "cross-token (what came before)"}


def along_scores(run: RunPart) -> list[dict]:
    """One row per SAE of the main grid and snapshot of a part of a run, the finished SAE included: step, clean L0 as
    trained, explained variance at clean L0 = k, and absorption of first letters and of contexts, parent by parent. []
    where the part keeps no snapshots of such SAEs."""

    def make(run: RunPart) -> list[dict]:
        table = {row["sae"]: row for row in run.table}
        measures = letter_score(run), context_score(run)  # before the threads: two of them at once upset the model
        cells = [
            (table[name] | {"step": step}, sae)
            for step, saes in sorted(run.snapshots().items())
            for name, sae in saes.items()
        ]

        def score(cell) -> dict:
            row, sae = cell
            return row | _scores(run, sae, row["k"], *measures)

        return in_threads(score, cells, label=f"absorption along training, {run.name}", unit="SAE")

    main = run.of([entry for entry in run.entries if entry.row["grid"] == run.profile.main_grid.name])
    if not run.has_snapshots or not main.entries:
        return []
    return main.rows("along", run.profile.absorption, make, run.profile.contexts)


def _scores(run: RunPart, sae: SAE, k: float, letter_score, context_score) -> dict:
    threshold = matched_threshold(run, sae, k)
    clean = reconstruction(sae, run.held_out, threshold=threshold)
    letters, contexts = letter_score(sae, threshold), context_score(sae, threshold)
    return {
        "l0_as_trained": clean.l0 if threshold is None else _l0_as_trained(run, sae),
        "l0": clean.l0,
        "ev_centred": clean.ev_centred,
        "dead_latents": clean.dead_latents,
        "letters": letters.mean_full,
        "contexts": contexts.mean_full,
        "letters_specific": letters.mean_specific,
        "contexts_specific": contexts.mean_specific,
        "letters_dense_absorbers": letters.dense_absorbers,
        "contexts_dense_absorbers": contexts.dense_absorbers,
        "letters_main_f1": letters.main_f1,
        "contexts_main_f1": contexts.main_f1,
        "letters_items": {r.letter: r.full for r in letters.letters},
        "contexts_items": {r.letter: r.full for r in contexts.letters},
        "contexts_f1": {r.letter: r.probe_f1 for r in contexts.letters},
    }


def _l0_as_trained(run: RunPart, sae: SAE) -> float | None:
    """Clean L0 at the SAE's own threshold; None before that is estimated."""
    return active_counts(sae, run.held_out).sum().item() / len(run.held_out) if sae.threshold >= 0 else None
