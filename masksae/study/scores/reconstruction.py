"""Scores of notebook 03: explained variance, L0, CE score on clean text; latents that died in training, those that are
silent on clean text, and what the silent ones fire on.

A latent that died in training is a fault of the run. One that is silent on clean text need not be: masking may teach an
SAE latents for corrupted text. So the two are counted apart, and the same text is shown to all SAEs of a pair once more
with tokens replaced, by the masks of the profile's first masked arm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from masksae.metrics.reconstruction import active_counts, ce_score, kl_score, reconstruction, silent_latents
from masksae.parallel import in_threads
from masksae.saes.sae import SAE
from masksae.study.scores.matched import score_saes
from masksae.study.sections import Arm
from masksae.study.store import Subject
from masksae.tracing import spliced_losses


def reconstruction_scores(run: Subject) -> list[dict]:
    """One row per SAE and mode: explained variance in three definitions, L0, CE score, dead latents, ..., and where
    the profile has a masked arm, what the silent latents fire on."""
    rows = run.rows("reconstruction", run.profile.evaluation, _reconstruction_scores)
    arm = next((arm for arm in run.profile.arms if arm.p > 0), None)
    if arm is None:
        return rows
    silent = run.rows("silent", arm, lambda some: _silent_scores(some, arm, rows))
    return [row | found for row, found in zip(rows, silent, strict=True)]


def clean_scores(run: Subject) -> list[dict]:
    """As `reconstruction_scores`, without what takes the language model."""

    def score(sae: SAE, threshold: float | None) -> dict:
        dead = {"dead_in_training": sae.history[-1].get("dead") if sae.history else None}
        return reconstruction(sae, run.held_out, threshold=threshold).to_dict() | dead

    return run.rows("clean", run.profile.evaluation, lambda some: score_saes(some, "reconstruction", score))


def _reconstruction_scores(run: Subject) -> list[dict]:
    saes, rows = run.load_saes(), clean_scores(run)
    spliced = {(row["sae"], row["threshold"]): _splice(saes[row["sae"]], row["threshold"], run.is_sink) for row in rows}
    ids = run.ids("held_out")[: -(-run.profile.evaluation.ce_tokens // run.profile.text.block_length)]
    options = dict(block=run.profile.model.block, keep_first=run.bos_id is not None, label="CE and KL with all SAEs")
    losses = spliced_losses(run.language_model.model, ids, spliced, **options)
    original, zero = losses["original"], losses["zero"]
    for row in rows:
        sae = losses[row["sae"], row["threshold"]]
        row |= {"ce_original": original.ce, "ce_zero": zero.ce, "ce_sae": sae.ce, "kl_zero": zero.kl, "kl_sae": sae.kl}
        row |= {"ce_score": ce_score(original.ce, zero.ce, sae.ce), "kl_score": kl_score(zero.kl, sae.kl)}
    return rows


def _splice(sae: SAE, threshold: float | None, is_sink: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What stands in activations' places: sinks keep their own."""

    def replace(x: Tensor) -> Tensor:
        return torch.where(is_sink(x)[..., None], x, sae.decode(sae.encode(x, threshold)))

    return replace


def corrupted_text(run: Subject, arm: Arm, pair: int) -> dict[str, Tensor]:
    """The held-out text with the masks of an arm's pair: x [tokens, d] without sinks, as `run.held_out`, and is_masked
    bool [tokens]."""

    def make() -> dict[str, Tensor]:
        ids, is_masked = run.corrupt(arm, run.ids("held_out"), pair)
        x = run.activations(ids, label="corrupted held-out activations")
        return {"x": x, "is_masked": is_masked[:, len(run.start) :].flatten()}

    key = [run.identity(run.profile.text), run.profile.contexts.tokens, arm.p, arm.mask_seed(pair), arm.token]
    text = run.scratch("corrupted", key, make)
    kept = ~run.is_sink(text["x"])
    return {name: values[kept] for name, values in text.items()}


def _silent_scores(run: Subject, arm: Arm, rows: list[dict]) -> list[dict]:
    """What the silent latents of each SAE fire on, at the threshold of each of its rows."""
    saes, found = run.load_saes(), dict[int, dict]()
    rows = [row for row in rows if row["sae"] in saes]
    for pair in dict.fromkeys(row["seed"] for row in rows):
        text = corrupted_text(run, arm, pair)
        sets = run.held_out, text["x"][text["is_masked"]], text["x"][~text["is_masked"]]
        mine = [i for i, row in enumerate(rows) if row["seed"] == pair]

        def score(i: int, sets=sets) -> dict:
            sae, threshold = saes[rows[i]["sae"]], rows[i]["threshold"]
            counts = (active_counts(sae, x, threshold=threshold) > 0 for x in sets)
            return {"sae": rows[i]["sae"]} | silent_latents(*counts).to_dict()

        found |= zip(mine, in_threads(score, mine, label=f"silent latents, pair {pair}", unit="score"))
    return [found[i] for i in range(len(rows))]
