"""Scores of notebook 03: explained variance, L0, CE score, dead latents on clean text; and the norms of notebook 01."""

from masksae.metrics.reconstruction import ce_score, kl_score, reconstruction
from masksae.study.run import Run
from masksae.study.scores.matched import score_saes
from masksae.tracing import spliced_losses


def norms(run: Run, sequences: int = 32) -> list[dict]:
    """Norm of the residual stream at every position of some training blocks, by arm and by whether the position is masked."""
    rows = []
    first = 0 if run.bos_id is None else 1
    for arm in run.profile.arms:
        ids, is_masked = run.corrupt(arm, run.ids("train", slice(sequences)))
        norm = run.activations(ids).norm(dim=1)
        rows += [
            {"arm": arm.name, "masked": m, "norm": round(v, 4)}
            for m, v in zip(is_masked[:, first:].flatten().tolist(), norm.tolist())
        ]
    return rows


def reconstruction_scores(run: Run) -> list[dict]:
    """One row per SAE and mode: explained variance in three definitions, L0, CE score, dead latents, ..."""
    return run.rows("reconstruction", run.profile.evaluation, lambda: _reconstruction_scores(run))


def _reconstruction_scores(run: Run) -> list[dict]:
    saes, spliced = run.load_saes(), {}
    rows = score_saes(run, "reconstruction", lambda sae, t: reconstruction(sae, run.held_out, threshold=t).to_dict())
    for row in rows:
        splice = lambda x, sae=saes[row["sae"]], threshold=row["threshold"]: sae.decode(sae.encode(x, threshold))
        spliced[row["sae"], row["mode"]] = splice
    ids = run.ids("held_out")[: -(-run.profile.evaluation.ce_tokens // run.profile.text.block_length)]
    options = dict(block=run.profile.model.block, keep_first=run.bos_id is not None, label="CE and KL with all SAEs")
    losses = spliced_losses(run.language_model.model, ids, spliced, **options)
    original, zero = losses["original"], losses["zero"]
    for row in rows:
        sae = losses[row["sae"], row["mode"]]
        row |= {"ce_original": original.ce, "ce_zero": zero.ce, "ce_sae": sae.ce, "kl_zero": zero.kl, "kl_sae": sae.kl}
        row |= {"ce_score": ce_score(original.ce, zero.ce, sae.ce), "kl_score": kl_score(zero.kl, sae.kl)}
    return rows
