"""Scores of notebook 04: absorption of first letters, and of parents that another token sets; the noise study."""

from collections.abc import Callable

import torch
from torch import Tensor

from masksae.activations import is_sink
from masksae.data.tokens import token_texts, tokenise
from masksae.errors import DataError
from masksae.metrics import contexts
from masksae.metrics.absorption import PROBE_GATE, AbsorptionResult, first_letter, icl_prefixes, single_token_words
from masksae.metrics.probes import LetterProbe, letter_probe
from masksae.parallel import in_threads
from masksae.saes.sae import SAE
from masksae.study.inputs import Inputs
from masksae.study.scores.matched import score_saes, thresholds
from masksae.study.store import Subject
from masksae.tracing import activations_after


def context_sample(run: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Words of the context text, sinks left out: activations [m, d], labels bool [m, parents], block and position int64
    [m, 2]."""
    ids, first = run.ids("contexts"), len(run.start)
    where, labels = contexts.occurrences(ids, token_texts(run.language_model.tokenizer))
    if len(where) == 0:
        raise DataError(
            "The held-out text holds no word that a parent could be told of: parents are read off English words."
        )
    rows = where[:, 0] * (ids.shape[1] - first) + where[:, 1] - first

    def make() -> dict[str, Tensor]:
        return {"x": run.activations(ids, label="activations of the context text")[rows]}

    x = run.scratch("contexts", [run.identity(run.profile.text), run.profile.contexts.tokens], make)["x"]
    kept = ~is_sink(x, contexts.SINK)
    return x[kept], labels[kept], where[kept]


def often_seen(run: Subject, ids: Tensor, times: int) -> Tensor:
    """bool, as ids: which of these tokens the training text holds so many times at least."""
    seen = torch.bincount(run.ids("train").flatten(), minlength=int(ids.max()) + 1)
    return seen[ids] >= times


def context_probes(run: Subject) -> tuple[Tensor, list, Tensor]:
    """Activations [m, d] at the words of the context text, a probe for each parent, and which words count bool [m]
    (`contexts.min_count`); shared by all SAEs."""
    x, labels, where = context_sample(run)
    task = run.profile.contexts
    probes = contexts.context_probes(x, labels, where[:, 0], positives=task.positives, seed=task.seed)
    return x, probes, often_seen(run, run.ids("contexts")[where[:, 0], where[:, 1]], task.min_count)


def context_score(run: Subject) -> Callable[..., AbsorptionResult]:
    """`contexts.context_absorption` of an SAE at a threshold, with all else that it takes; keywords may be changed."""
    x, probes, counted = run.shared("contexts", lambda: context_probes(run))
    task = run.profile.contexts

    def score(sae: SAE, threshold: float | None, **changes) -> AbsorptionResult:
        options = dict(min_parents=task.min_parents) | changes
        return contexts.context_absorption(sae, x, probes, threshold=threshold, counted=counted, **options)

    return score


def context_scores(run: Subject) -> list[dict]:
    """As `absorption_scores`, for parents that another token sets. Keys that begin with "exploratory" are those of the
    exploratory parents, None and [] where none of them has a probe."""

    def make(run: Subject) -> list[dict]:
        measure = context_score(run)
        x, probes, _ = run.shared("contexts", lambda: context_probes(run))
        passed = [probe for probe in probes if probe.f1 > PROBE_GATE]
        explored = any(probe.name in contexts.EXPLORATORY for probe in passed)

        def score(sae, threshold) -> dict:
            latents = contexts.probe_latents(sae, x, passed, threshold)
            row = _context_row(measure(sae, threshold, latents=latents))
            if not explored:
                return row | {"exploratory_full": None, "exploratory_parents": []}
            shown = measure(sae, threshold, latents=latents, among=contexts.EXPLORATORY, min_parents=1).to_dict()
            return row | {"exploratory_full": shown["mean_full"], "exploratory_parents": shown["letters"]}

        return score_saes(run, "absorption by context", score)

    return run.rows("contexts", run.profile.contexts, make)


def _context_row(result: AbsorptionResult) -> dict:
    """A result under names that can stand beside those of first letters in a row."""
    renamed = {f"mean_{key}": f"context_{key}" for key in ("full", "specific", "middle", "dense", "fraction")}
    renamed |= {key: f"context_{key}" for key in ("main_recall", "main_f1", "dense_absorbers", "words_left_out")}
    renamed |= {"letters": "parents", "excluded": "excluded"}
    return {renamed[key]: value for key, value in result.to_dict().items() if key in renamed}


def chosen_words(run: Subject) -> tuple[list[str], Tensor]:
    """Single-token words of the first-letter task, and their token ids int64 [n]."""
    task, tokenizer = run.profile.absorption, run.language_model.tokenizer
    texts = token_texts(tokenizer)
    for added in tokenizer.added_tokens_decoder:
        texts[added] = ""  # no text gives it, and the model may have no embedding for it
    words, ids = single_token_words(texts, task.min_word_letters)
    chosen = torch.randperm(len(words), generator=torch.Generator().manual_seed(task.seed))[: task.words].sort().values
    return [words[i] for i in chosen], torch.as_tensor(ids)[chosen]


def counted_words(run: Subject) -> Tensor:
    """bool [n]: which of the words the training text holds often enough to count (`absorption.min_count`)."""
    return often_seen(run, chosen_words(run)[1], run.profile.absorption.min_count)


def word_activations(run: Subject, draw: int = 0) -> tuple[list[str], Tensor]:
    """Single-token words and the residual stream [n, d] at each, after an in-context prefix of the first-letter task.

    The model is causal, so only the word's own token runs, on top of the cached keys and values of one of a few
    prefixes. Another `draw` has other prefixes for the same words.
    """
    task = run.profile.absorption
    words, ids = chosen_words(run)
    key = task.model_dump(include={"words", "min_word_letters", "prefixes", "seed"}) | {"draw": draw}
    return words, run.scratch("words", key, lambda: {"x": _word_activations(run, words, ids, draw)})["x"]


def _word_activations(run: Subject, words: list[str], ids: Tensor, draw: int) -> Tensor:
    task, model, block = run.profile.absorption, run.language_model.model, run.profile.model.block
    prefixes = icl_prefixes(words, n_prefixes=task.prefixes, seed=task.seed + draw)
    x = torch.empty(len(words), run.width)
    for i, tokens in enumerate(tokenise(run.language_model.tokenizer, prefixes)):
        mine = slice(i, None, len(prefixes))
        label = f"words after prefix {i + 1} of {len(prefixes)}"
        after = activations_after(
            model, torch.tensor([run.start + tokens]), ids[mine, None], block=block, batch=128, label=label
        )
        x[mine] = after[:, 0]
    return x


def letter_task(run: Inputs, draw: int = 0, split: int = 0) -> tuple[list[str], Tensor, LetterProbe]:
    """Words, activations at them, and the probe of one of their splits: made once for all SAEs on these inputs."""

    def make() -> tuple:
        words, x = word_activations(run, draw)
        return words, x, letter_probe(x, words, seed=run.profile.absorption.seed + split)

    return run.shared(f"letters {draw} {split}", make)


def letter_score(run: Subject) -> Callable[..., AbsorptionResult]:
    """`first_letter` of an SAE at a threshold, with all else that it takes."""
    task, (words, x, probe) = run.profile.absorption, letter_task(run)
    counted = run.shared("counted words", lambda: counted_words(run))

    def score(sae: SAE, threshold: float | None) -> AbsorptionResult:
        options = dict(probe=probe, counted=counted, min_letters=task.min_letters)
        return first_letter(sae, x, words, threshold=threshold, **options)

    return score


def absorption_scores(run: Subject) -> list[dict]:
    """One row per SAE and mode: mean full absorption, absorption fraction, and the table of letters."""

    def make(run: Subject) -> list[dict]:
        measure = letter_score(run)
        return score_saes(run, "absorption", lambda sae, threshold: measure(sae, threshold).to_dict())

    return run.rows("absorption", run.profile.absorption, make)


def absorption_noise(run: Subject) -> list[dict]:
    """The noise study: absorption at matched clean L0 of the SAEs of the first block for each draw of in-context
    examples and each split of the words, [] where the profile asks for one of each."""
    task, first, grid = run.profile.absorption, run.profile.blocks[0], run.profile.main_grid.name
    members = {member.name for part in run.profile.parts if part.block is first for member in part.members}
    main = run.of([entry for entry in run.entries if entry.name in members and entry.row["grid"] == grid])
    if task.draws * task.splits == 1 or not main.entries:
        return []
    return main.rows("noise", task, _absorption_noise)


def _absorption_noise(run: Subject) -> list[dict]:
    task, saes, at, rows = run.profile.absorption, run.load_saes(), thresholds(run), []
    counted = run.shared("counted words", lambda: counted_words(run))
    for draw in range(task.draws):
        for split in range(task.splits):
            words, x, probe = letter_task(run, draw, split)
            options = dict(probe=probe, min_letters=1, counted=counted)

            def score(row, draw=draw, split=split, x=x, words=words, options=options) -> dict:
                result = first_letter(saes[row["sae"]], x, words, threshold=at[row["sae"]]["matched"], **options)
                cell = row | {"mode": "matched", "draw": draw, "split": split} | result.to_dict()
                return cell | {"letters": {r.letter: r.full for r in result.letters}}

            label = f"noise study, draw {draw + 1} of {task.draws}, split {split + 1} of {task.splits}"
            rows += in_threads(score, run.table, label=label, unit="SAE")
    return rows
