"""The scores of a run, one table per notebook: thin drivers that feed the pure functions of `metrics/`.

Every SAE of every arm is scored on the same clean held-out text, with the same prompts and probes, twice: as trained (its own
inference threshold) and at matched sparsity (the threshold recalibrated so that clean L0 is exactly k). Only the second compares
arms fairly, since masking moves the threshold.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.metrics.absorption import first_letter, icl_prefixes, single_token_words
from masksae.metrics.contexts import context_absorption
from masksae.metrics.probes import letter_probe
from masksae.metrics.reconstruction import calibrated_threshold, ce_score, kl_score, reconstruction
from masksae.parallel import in_threads
from masksae.saes.config import TopK
from masksae.saes.sae import SAE
from masksae.study.run import Run
from masksae.tracing import activations_after, spliced_losses


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


def thresholds(run: Run) -> dict[str, dict[str, float | None]]:
    """Inference thresholds of every SAE in each mode; TopK needs none, it keeps k latents of every token anyway."""

    def make() -> dict:
        saes, ks = run.load_saes(), {row["sae"]: row["k"] for row in run.table}
        matched = in_threads(lambda name: matched_threshold(run, saes[name], ks[name]), ks, label="thresholds")
        return {
            name: {"as_trained": None if t is None else saes[name].threshold.item(), "matched": t}
            for name, t in zip(ks, matched)
        }

    return run.rows("thresholds", run.profile.text, make)


def matched_threshold(run: Run, sae: SAE, k: float) -> float | None:
    """The threshold at which clean L0 is k; None for TopK, which keeps k latents of every token anyway."""
    return None if type(sae.config.selection) is TopK else calibrated_threshold(sae, run.held_out, k)


def vocabulary(tokenizer) -> list[str]:
    """Text of every token id, with its leading space."""
    return [tokenizer.decode([token]) for token in range(len(tokenizer))]


def context_sample(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Words of the context text, sinks left out: activations [m, d], labels bool [m, parents], block and position int64 [m, 2]."""
    from masksae.metrics import contexts

    ids, first = run.ids("contexts"), 0 if run.bos_id is None else 1
    where, labels = contexts.occurrences(ids, vocabulary(run.language_model.tokenizer))
    if len(where) == 0:
        raise DataError(
            "The held-out text holds no word that a parent could be told of: parents are read off English words."
        )
    rows = where[:, 0] * (ids.shape[1] - first) + where[:, 1] - first
    key = [run.identity(run.profile.text), run.profile.contexts.tokens]
    make = lambda: {"x": run.activations(ids, label="activations of the context text")[rows]}
    x = run.scratch("contexts", key, make)["x"]
    kept = ~contexts.sinks(x)
    return x[kept], labels[kept], where[kept]


def context_probes(run: Run) -> tuple[Tensor, list]:
    """Activations [m, d] at the words of the context text, and a probe for each parent; shared by all SAEs."""
    from masksae.metrics import contexts

    x, labels, where = context_sample(run)
    task = run.profile.contexts
    return x, contexts.context_probes(x, labels, where[:, 0], positives=task.positives, seed=task.seed)


def context_scores(run: Run) -> list[dict]:
    """As `absorption_scores`, for parents that another token sets."""

    def make() -> list[dict]:
        x, probes = context_probes(run)
        options = dict(min_parents=run.profile.contexts.min_parents, seed=run.profile.contexts.seed)
        return score_saes(
            run,
            "absorption by context",
            lambda sae, t: _context_row(context_absorption(sae, x, probes, threshold=t, **options)),
        )

    return run.rows("contexts", run.profile.contexts, make)


def _context_row(found) -> dict:
    """A result under names that can stand beside those of first letters in a row."""
    renamed = {"mean_full": "context_full", "mean_fraction": "context_fraction", "letters": "parents"}
    renamed |= {"dense_absorbers": "context_dense_absorbers", "excluded": "excluded"}
    return {new: value for old, value in found.to_dict().items() if (new := renamed.get(old))}


def score_saes(run: Run, label: str, score: Callable[[SAE, float | None], dict]) -> list[dict]:
    """One row per SAE and mode with what `score(sae, threshold)` finds."""
    saes, at = run.load_saes(), thresholds(run)
    cells = [(row, mode, at[row["sae"]][mode]) for row in run.table for mode in ("as_trained", "matched")]

    def one(cell) -> dict:
        row, mode, threshold = cell
        return row | {"mode": mode, "threshold": threshold} | score(saes[row["sae"]], threshold)

    return in_threads(one, cells, label=label, unit="score")


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


REMARKS = {
    "reconstruct no better than the mean activation (explained variance 0 or less); other scores say little of such an "
    "SAE: train on more tokens (text.train_tokens, training.epochs) or with another training.lr": (
        lambda row: row["ev_centred"] <= 0
    ),
    "serve the language model no better than zeros in the activation's place": (
        lambda row: row["ce_sae"] >= row["ce_zero"] or row["kl_sae"] >= row["kl_zero"]
    ),
    "do not reach L0 = k at any threshold, so they are not compared at equal L0: train longer": (
        lambda row: row["mode"] == "matched" and row["l0"] < 0.99 * row["k"]
    ),
}
"""What can be wrong with an SAE's row of reconstruction scores."""


def remarks(rows: list[dict]) -> list[str]:
    """What must be known of some SAEs before their scores are compared, a sentence each; [] if all is well.

    rows  of `reconstruction_scores`
    """
    found = []
    for what, holds in REMARKS.items():
        names = [f"{row['sae']} ({row['mode'].replace('_', ' ')})" for row in rows if holds(row)]
        if names:
            shown = ", ".join([*names[:6], *(["..."] if len(names) > 6 else [])])
            found.append(f"{len(names)} of {len(rows)} rows {what}: {shown}.")
    return found


def word_activations(run: Run, draw: int = 0) -> tuple[list[str], Tensor]:
    """Single-token words and the residual stream [n, d] at each, after an in-context prefix of the first-letter task.

    The model is causal, so only the word's own token runs, on top of the cached keys and values of one of a few prefixes. Another `draw`
    has other prefixes for the same words.
    """
    task, tokenizer = run.profile.absorption, run.language_model.tokenizer
    words, ids = single_token_words(tokenizer, task.min_word_letters)
    chosen = torch.randperm(len(words), generator=torch.Generator().manual_seed(task.seed))[: task.words].sort().values
    words, ids = [words[i] for i in chosen], torch.as_tensor(ids)[chosen]
    key = task.model_dump(include={"words", "min_word_letters", "prefixes", "seed"}) | {"draw": draw}
    return words, run.scratch("words", key, lambda: {"x": _word_activations(run, words, ids, draw)})["x"]


def _word_activations(run: Run, words: list[str], ids: Tensor, draw: int) -> Tensor:
    task, model, block = run.profile.absorption, run.language_model.model, run.profile.model.block
    start = [] if run.bos_id is None else [run.bos_id]
    prefixes = icl_prefixes(words, n_prefixes=task.prefixes, seed=task.seed + draw)
    x = torch.empty(len(words), run.width)
    for i, prefix in enumerate(prefixes):
        tokens = start + run.language_model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        mine = slice(i, None, len(prefixes))
        label = f"words after prefix {i + 1} of {len(prefixes)}"
        after = activations_after(model, torch.tensor([tokens]), ids[mine, None], block=block, batch=128, label=label)
        x[mine] = after[:, 0]
    return x


def absorption_scores(run: Run) -> list[dict]:
    """One row per SAE and mode: mean full absorption, absorption fraction, and the table of letters."""

    def make() -> list[dict]:
        task = run.profile.absorption
        words, x = word_activations(run)
        options = dict(probe=letter_probe(x, words, seed=task.seed), seed=task.seed, min_letters=task.min_letters)
        return score_saes(
            run, "absorption", lambda sae, t: first_letter(sae, x, words, threshold=t, **options).to_dict()
        )

    return run.rows("absorption", run.profile.absorption, make)


def absorption_noise(run: Run) -> list[dict]:
    """The noise study: absorption at matched clean L0 of the SAEs of the first grid for each draw of in-context examples and each split of
    the words, [] where the profile asks for one of each."""
    task = run.profile.absorption
    if task.draws * task.splits == 1:
        return []
    return run.rows("noise", task, lambda: _absorption_noise(run))


def _absorption_noise(run: Run) -> list[dict]:
    task, saes, at, rows = run.profile.absorption, run.load_saes(), thresholds(run), []
    table = [row for row in run.table if row["grid"] == run.profile.grids[0].name]
    for draw in range(task.draws):
        words, x = word_activations(run, draw)
        for split in range(task.splits):
            options = dict(probe=letter_probe(x, words, seed=task.seed + split), seed=task.seed + split, min_letters=1)

            def one(row, x=x, words=words, options=options) -> dict:
                found = first_letter(saes[row["sae"]], x, words, threshold=at[row["sae"]]["matched"], **options)
                return found.to_dict() | {"letters": {r.letter: r.full for r in found.letters}}

            label = f"noise study, draw {draw + 1} of {task.draws}, split {split + 1} of {task.splits}"
            found = in_threads(one, table, label=label, unit="SAE")
            rows += [
                row | {"mode": "matched", "draw": draw, "split": split} | scores for row, scores in zip(table, found)
            ]
    return rows
