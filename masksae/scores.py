"""The scores of a run, one table per notebook: thin drivers that feed the pure functions of `metrics/`.

Every SAE of every arm is scored on the same clean held-out text, with the same prompts and probes, twice: as trained (its own
inference threshold) and at matched sparsity (the threshold recalibrated so that clean L0 is exactly k). Only the second compares
arms fairly, since masking moves the threshold.
"""

import torch
from torch import Tensor

from masksae.metrics.absorption import first_letter, icl_prefixes, single_token_words
from masksae.metrics.probes import letter_probe
from masksae.metrics.reconstruction import calibrated_threshold, ce_score, kl_score, reconstruction
from masksae.saes.config import TopK
from masksae.saes.sae import SAE
from masksae.stages import SOURCE_CODE, Run
from masksae.tracing import activations, prefix_cache, spliced_losses


def norms(run: Run, sequences: int = 32) -> list[dict]:
    """Norm of the residual stream at every position of some training blocks, by arm and by whether the position is masked."""
    rows = []
    first = 0 if run.bos_id is None else 1
    for arm in run.profile.arms:
        ids, is_masked = run.corrupt(arm, run.ids("train")[:sequences])
        norm = run.activations(ids).norm(dim=1)
        rows += [
            {"arm": arm.name, "masked": m, "norm": round(v, 4)}
            for m, v in zip(is_masked[:, first:].flatten().tolist(), norm.tolist())
        ]
    return rows


def thresholds(run: Run, sae: SAE, k: float) -> dict[str, float | None]:
    """Inference threshold in each mode; TopK needs none, it keeps k latents of every token anyway."""
    if type(sae.config.selection) is TopK:
        return {"as_trained": None, "matched": None}
    return {"as_trained": sae.threshold.item(), "matched": calibrated_threshold(sae, run.held_out, k)}


def reconstruction_scores(run: Run) -> list[dict]:
    """One row per SAE and mode: explained variance in three definitions, L0, CE score, dead latents, ..."""
    code = ("metrics.reconstruction", "scores")
    return run.rows("reconstruction", run.profile.evaluation, code, lambda: _reconstruction_scores(run))


def _reconstruction_scores(run: Run) -> list[dict]:
    from tqdm import tqdm

    saes, rows, spliced = run.load_saes(), [], {}
    for row in tqdm(run.table, desc="reconstruction", unit="SAE"):
        sae = saes[row["sae"]]
        for mode, threshold in thresholds(run, sae, row["k"]).items():
            scores = reconstruction(sae, run.held_out, threshold=threshold).to_dict()
            spliced[row["sae"], mode] = lambda x, sae=sae, threshold=threshold: sae.decode(sae.encode(x, threshold))
            rows.append(row | {"mode": mode, "threshold": threshold} | scores)
    ids = run.ids("held_out")[: -(-run.profile.evaluation.ce_tokens // run.profile.text.block_length)]
    options = dict(block=run.profile.model.block, keep_first=run.bos_id is not None, label="CE and KL with all SAEs")
    losses = spliced_losses(run.language_model.model, ids, spliced, **options)
    original, zero = losses["original"], losses["zero"]
    for row in rows:
        sae = losses[row["sae"], row["mode"]]
        row |= {"ce_original": original.ce, "ce_zero": zero.ce, "ce_sae": sae.ce, "kl_zero": zero.kl, "kl_sae": sae.kl}
        row |= {"ce_score": ce_score(original.ce, zero.ce, sae.ce), "kl_score": kl_score(zero.kl, sae.kl)}
    return rows


def word_activations(run: Run) -> tuple[list[str], Tensor]:
    """Single-token words and the residual stream [n, d] at each, after an in-context prefix of the first-letter task.

    The model is causal, so only the word's own token runs, on top of the cached keys and values of one of a few prefixes.
    """
    task, tokenizer = run.profile.absorption, run.language_model.tokenizer
    words, ids = single_token_words(tokenizer, task.min_word_letters)
    chosen = torch.randperm(len(words), generator=torch.Generator().manual_seed(task.seed))[: task.words].sort().values
    words, ids = [words[i] for i in chosen], torch.as_tensor(ids)[chosen]
    code = (*SOURCE_CODE, "tracing", "metrics.absorption")
    return words, run.scratch("words", task.model_dump(), code, lambda: {"x": _word_activations(run, words, ids)})["x"]


def _word_activations(run: Run, words: list[str], ids: Tensor) -> Tensor:
    task, model, block = run.profile.absorption, run.language_model.model, run.profile.model.block
    start = [] if run.bos_id is None else [run.bos_id]
    prefixes = icl_prefixes(words, n_prefixes=task.prefixes, seed=task.seed)
    x = torch.empty(len(words), model.config.hidden_size)
    for i, prefix in enumerate(prefixes):
        tokens = start + run.language_model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        cache = prefix_cache(model, torch.tensor([tokens]), block=block)
        mine = slice(i, None, len(prefixes))
        label = f"words after prefix {i + 1} of {len(prefixes)}"
        x[mine] = activations(model, ids[mine, None], block=block, batch=128, label=label, cache=cache)[:, 0]
    return x


def absorption_scores(run: Run) -> list[dict]:
    """One row per SAE and mode: mean full absorption, absorption fraction, and the table of letters."""
    code = ("metrics.reconstruction", "metrics.probes", "metrics.absorption", "scores")
    return run.rows("absorption", run.profile.absorption, code, lambda: _absorption_scores(run))


def _absorption_scores(run: Run) -> list[dict]:
    from tqdm import tqdm

    task = run.profile.absorption
    words, x = word_activations(run)
    probe = letter_probe(x, words, seed=task.seed)
    rows = []
    saes = run.load_saes()
    for row in tqdm(run.table, desc="absorption", unit="SAE"):
        sae = saes[row["sae"]]
        for mode, threshold in thresholds(run, sae, row["k"]).items():
            result = first_letter(
                sae, x, words, probe=probe, seed=task.seed, min_letters=task.min_letters, threshold=threshold
            )
            rows.append(row | {"mode": mode} | result.to_dict())
    return rows
