"""Scores of notebook 03: explained variance, L0, CE score and dead latents on clean text."""

from masksae.metrics.reconstruction import ce_score, kl_score, reconstruction
from masksae.study.inputs import Scored
from masksae.study.scores.matched import score_saes
from masksae.tracing import spliced_losses


def reconstruction_scores(run: Scored) -> list[dict]:
    """One row per SAE and mode: explained variance in three definitions, L0, CE score, dead latents, ..."""
    return run.rows("reconstruction", run.profile.evaluation, lambda: _reconstruction_scores(run))


def _reconstruction_scores(run: Scored) -> list[dict]:
    saes = run.load_saes()
    rows = score_saes(run, "reconstruction", lambda sae, t: reconstruction(sae, run.held_out, threshold=t).to_dict())
    spliced = {(row["sae"], row["mode"]): _splice(saes[row["sae"]], row["threshold"]) for row in rows}
    ids = run.ids("held_out")[: -(-run.profile.evaluation.ce_tokens // run.profile.text.block_length)]
    options = dict(block=run.profile.model.block, keep_first=run.bos_id is not None, label="CE and KL with all SAEs")
    losses = spliced_losses(run.language_model.model, ids, spliced, **options)
    original, zero = losses["original"], losses["zero"]
    for row in rows:
        sae = losses[row["sae"], row["mode"]]
        row |= {"ce_original": original.ce, "ce_zero": zero.ce, "ce_sae": sae.ce, "kl_zero": zero.kl, "kl_sae": sae.kl}
        row |= {"ce_score": ce_score(original.ce, zero.ce, sae.ce), "kl_score": kl_score(zero.kl, sae.kl)}
    return rows


def _splice(sae, threshold):
    """What stands in an activation's place."""
    return lambda x: sae.decode(sae.encode(x, threshold))
