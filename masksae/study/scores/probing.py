"""Scores of notebooks 05 and 07: what probes on an SAE's latents make of labelled texts, in distribution (C2) and under
a shift (C3).

A text is seen as sae-probes sees it: the residual stream at its last token, texts cut on the left. Probes and splits
are the same for every SAE of both arms; the probe on raw activations is the reference that an SAE could at best reach
with all its latents.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from masksae import progress
from masksae.cache import contents
from masksae.data.tasks import Shift, binary_tasks, probe_table
from masksae.data.tokens import tokenise
from masksae.errors import DataError
from masksae.metrics.sparse_probing import probe, sparse_probing, split
from masksae.parallel import in_threads
from masksae.study.inputs import Inputs
from masksae.study.scores.matched import score_saes
from masksae.study.store import Subject
from masksae.tracing import activations

BATCH = 64
USABLE = 0.55
"""A shifted set counts if the probe on raw activations reaches this AUC there: 300 rows have a standard error of about
.03."""


def text_batches(run: Inputs, texts: list[str], limit: int, *, from_end: bool, label: str | None = None) -> Iterator:
    """Texts as activations, short ones first: (rows, x [b, s, d], lengths int64 [b]) with x padded on the right and BOS
    left out.

    limit     tokens of a text at most
    from_end  keep the last tokens of a longer text instead of the first

    Raises DataError for a text without tokens.
    """
    tokenizer, model = run.language_model.tokenizer, run.language_model.model
    start = run.start
    cut = slice(-limit, None) if from_end else slice(limit)
    tokens = [ids[cut] for ids in tokenise(tokenizer, texts)]
    if not all(tokens):
        raise DataError("A labelled text has no token. Leave empty texts out of the table.")
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for low in progress.bar(range(0, len(order), BATCH), label=label, unit="batches"):
        rows = order[low : low + BATCH]
        lengths = torch.tensor([len(tokens[i]) for i in rows])
        ids = torch.zeros(len(rows), len(start) + int(lengths.max()), dtype=torch.int64)
        for place, i in enumerate(rows):  # padding on the right: nothing before it sees it
            ids[place, : len(start) + len(tokens[i])] = torch.tensor(start + tokens[i])
        x = activations(model, ids, block=run.profile.model.block, batch=BATCH)
        yield rows, x[:, len(start) :], lengths


def last_token_activations(run: Inputs, texts: list[str], label: str | None = None) -> Tensor:
    """Residual stream [n, d] at the last token of each text, after BOS and at most `probing.max_tokens` tokens of its
    end."""
    last = torch.empty(len(texts), run.width)
    for rows, x, lengths in text_batches(run, texts, run.profile.probing.max_tokens, from_end=True, label=label):
        last[rows] = x[torch.arange(len(rows)), lengths - 1]
    return last


def labels(targets) -> Tensor:
    """bool [n] from a table's target column; the larger of the two values is positive. Raises DataError for another
    number of values.

    >>> labels(["no", "yes", "no"])
    tensor([False,  True, False])
    >>> labels([1, "one", 1])  # numbers before words
    tensor([False,  True, False])
    """
    values = sorted({*targets}, key=lambda value: (isinstance(value, str), value))
    if len(values) != 2:
        raise DataError(f"A probing task has two classes, found {len(values)}: {values[:4]}. Choose a binary one.")
    return torch.tensor([value == values[1] for value in targets])


def task_activations(run: Inputs, task: str, shift: Shift | None = None) -> dict[str, Tensor]:
    """x_train, y_train, x_test, y_test of a task; the test side is that of `shift` if one is given."""
    options = run.profile.probing

    def make() -> dict[str, Tensor]:
        prompts, y = _rows(task)
        train, test = split(prompts, y, train=options.train, test=options.test, seed=options.seed)
        texts, y_test = [prompts[i] for i in test], y[test]
        if shift is not None and shift.table is not None:
            texts, y_test = _rows(shift.table)
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options.seed))
            chosen = order if shift.family == "ood" else order[: options.test]
            texts, y_test = [texts[i] for i in chosen], y_test[chosen]
        if shift is not None and shift.change is not None:
            texts = [shift.change(text) for text in texts]
        x = last_token_activations(run, [prompts[i] for i in train] + texts, label=task)
        return {"x_train": x[: len(train)], "y_train": y[train], "x_test": x[len(train) :], "y_test": y_test}

    how = None if shift is None else [shift.family, shift.table, shift.change and shift.change.__name__]
    named = [task] if shift is None or shift.table is None else [task, shift.table]
    key = [task, how, contents(named), options.model_dump(exclude={"tasks", "shifted", "ks", "shifted_ks"})]
    return run.scratch("tasks", key, make)


def _rows(source: str) -> tuple[list[str], Tensor]:
    table = probe_table(source)
    return table["prompt"].astype(str).tolist(), labels(table["target"].tolist())


RANKINGS = {"": True, "_plain": False}
"""How latents are ranked: by the difference of class means divided by a latent's mean non-zero value (sae-probes), or
not divided (the published figure of the shifted sets)."""


Tasks = dict[str, tuple[str, Shift | None]]
"""Name in the table of results -> the task, and how its test texts are shifted."""


def probing_scores(run: Subject) -> list[dict]:
    """One row per SAE and mode: mean AUC over tasks for each k, and the table of tasks with the raw probe beside
    them."""
    tasks = run.profile.probing.tasks
    return _scores(run, "probing", {task: (task, None) for task in (binary_tasks() if tasks == ["all"] else tasks)})


def ood_scores(run: Subject) -> list[dict]:
    """One row per SAE and mode: mean AUC on the shifted sets of each family, for each k and ranking, and its gap to the
    probe on raw activations."""
    shifts = {text: Shift.parse(text) for text in run.profile.probing.shifted}
    return _scores(run, "ood", {text: (shift.task, shift) for text, shift in shifts.items()})


def _scores(run: Subject, kind: str, tasks: Tasks) -> list[dict]:
    return run.rows(kind, run.profile.probing, lambda some: _score_all(some, kind, tasks))


def _score_all(run: Subject, kind: str, tasks: Tasks) -> list[dict]:
    options = run.profile.probing
    ks, rankings = (options.shifted_ks, tuple(RANKINGS)) if kind == "ood" else (options.ks, ("",))
    data, excluded, raw = run.shared(kind, lambda: _load(run, kind, tasks, skip=options.tasks == ["all"]))
    used = [name for name in data if kind != "ood" or raw[name] >= USABLE]
    families = {name: shift.family if shift else kind for name, (_, shift) in tasks.items()}
    if kind not in {families[name] for name in used}:
        raise DataError(f"No task of {kind} is told from raw activations (AUC {raw}). Take others, or a larger model.")
    excluded = excluded | {
        name: f"raw probe's AUC {raw[name]:.3f}, below {USABLE}" for name in data if name not in used
    }

    def score(sae, threshold) -> dict:
        aucs = {name: _auc_by_k(sae, threshold, data[name], ks, rankings, options.seed) for name in used}
        table = [{"task": n, "family": families[n], "raw_auc": raw[n], "auc": auc} for n, auc in aucs.items()]
        row = {}
        for family in dict.fromkeys(families.values()):
            row |= _means(family, [t for t in table if t["family"] == family])
        return row | {"tasks": table, "excluded": excluded}

    return score_saes(run, kind, score)


def _load(
    run: Subject, kind: str, tasks: Tasks, skip: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], dict[str, float]]:
    """Activations of the tasks, why some are left out, and the AUC of probes on raw activations: with `skip`, a task
    that has too few rows does not end the run."""
    data, excluded = {}, {}
    for name, where in tasks.items():
        try:
            data[name] = task_activations(run, *where)
        except DataError as error:
            if not skip:
                raise DataError(f"{name}: {error}") from None
            excluded[name] = str(error)

    def raw_auc(task: dict[str, Tensor]) -> float:
        return probe(*_sides(task, task["x_train"], task["x_test"]), seed=run.profile.probing.seed).auc

    aucs = in_threads(raw_auc, data.values(), label=f"{kind}, raw activations", unit="task")
    return data, excluded, dict(zip(data, aucs))


def _means(family: str, table: list[dict]) -> dict[str, float]:
    """Means over tasks: the raw probe's AUC, the SAE's for each k and ranking, and what is missing to the raw probe."""
    if not table:
        return {}
    raw = sum(t["raw_auc"] for t in table) / len(table)
    auc = {k: sum(t["auc"][k] for t in table) / len(table) for k in table[0]["auc"]}
    means = {f"{family}_raw_auc": raw} | {f"{family}_auc_{k}": value for k, value in auc.items()}
    return means | {f"{family}_gap_{k}": raw - value for k, value in auc.items()}


def _auc_by_k(sae, threshold, data: dict[str, Tensor], ks: list[int], rankings: tuple[str, ...], seed: int) -> dict:
    """AUC by k and ranking, such as {"5": .8, "5_plain": .7}."""
    f_train, f_test = (sae.latents(data[key], threshold) for key in ("x_train", "x_test"))
    auc = {}
    for ranking in rankings:
        choice = dict(ks=tuple(ks), normalised=RANKINGS[ranking], penalty="l2", seed=seed)
        scores = sparse_probing(*_sides(data, f_train, f_test), **choice).scores
        auc |= {f"{k}{ranking}": score.auc for k, score in scores.items()}
    return auc


def _sides(data: dict[str, Tensor], train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return train, data["y_train"], test, data["y_test"]
