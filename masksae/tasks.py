"""Labelled texts as activations, and what probes on an SAE's latents make of them: in distribution (C2) and under a shift (C3).

A text is seen as sae-probes sees it: the residual stream at its last token, texts cut on the left. Probes and splits are the same for
every SAE of both arms; the probe on raw activations is the reference that an SAE could at best reach with all its latents.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.metrics.sparse_probing import probe, sparse_probing, split
from masksae.parallel import in_threads
from masksae.scores import score_saes
from masksae.sources import probe_table
from masksae.stages import SOURCE_CODE, Run
from masksae.tracing import activations

BATCH = 64
USABLE = 0.55
"""A shifted set counts if the probe on raw activations reaches this AUC there: 300 rows have a standard error of about .03."""


def text_batches(run: Run, texts: list[str], limit: int, *, from_end: bool, label: str | None = None) -> Iterator:
    """Texts as activations, short ones first: (rows, x [b, s, d], lengths int64 [b]) with x padded on the right and BOS left out.

    limit     tokens of a text at most
    from_end  keep the last tokens of a longer text instead of the first

    Raises DataError for a text without tokens.
    """
    from tqdm import tqdm

    tokenizer, model = run.language_model.tokenizer, run.language_model.model
    start = [] if run.bos_id is None else [run.bos_id]
    cut = slice(-limit, None) if from_end else slice(limit)
    tokens = [ids[cut] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    if not all(tokens):
        raise DataError("A labelled text has no token. Leave empty texts out of the table.")
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for low in tqdm(range(0, len(order), BATCH), desc=label, disable=label is None, mininterval=1, unit="batch"):
        rows = order[low : low + BATCH]
        lengths = torch.tensor([len(tokens[i]) for i in rows])
        ids = torch.zeros(len(rows), len(start) + int(lengths.max()), dtype=torch.int64)
        for place, i in enumerate(rows):  # padding on the right: nothing before it sees it
            ids[place, : len(start) + len(tokens[i])] = torch.tensor(start + tokens[i])
        x = activations(model, ids, block=run.profile.model.block, batch=BATCH)
        yield rows, x[:, len(start) :], lengths


def last_token_activations(run: Run, texts: list[str], label: str | None = None) -> Tensor:
    """Residual stream [n, d] at the last token of each text, after BOS and at most `probing.max_tokens` tokens of its end."""
    found = torch.empty(len(texts), run.language_model.model.config.hidden_size)
    for rows, x, lengths in text_batches(run, texts, run.profile.probing.max_tokens, from_end=True, label=label):
        found[rows] = x[torch.arange(len(rows)), lengths - 1]
    return found


def labels(targets) -> Tensor:
    """bool [n] from a table's target column; the larger of the two values is positive. Raises DataError for another number of values.

    >>> labels(["no", "yes", "no"])
    tensor([False,  True, False])
    """
    values = sorted(set(targets))
    if len(values) != 2:
        raise DataError(f"A probing task has two classes, found {len(values)}: {values[:4]}. Choose a binary one.")
    return torch.tensor([value == values[1] for value in targets])


def task_activations(run: Run, task: str, shifted: str | None = None) -> dict[str, Tensor]:
    """x_train, y_train, x_test, y_test of a task; with `shifted`, tested on all rows of that table instead."""
    options, code = run.profile.probing, (*SOURCE_CODE, "tracing", "tasks", "metrics.sparse_probing")

    def make() -> dict[str, Tensor]:
        table = probe_table(task)
        prompts, y = table["prompt"].astype(str).tolist(), labels(table["target"].tolist())
        train, test = split(prompts, y, train=options.train, test=options.test, seed=options.seed)
        texts, y_test = [prompts[i] for i in test], y[test]
        if shifted is not None:
            other = probe_table(shifted)
            texts, y_test = other["prompt"].astype(str).tolist(), labels(other["target"].tolist())
        x = last_token_activations(run, [prompts[i] for i in train] + texts, label=shifted or task)
        return {"x_train": x[: len(train)], "y_train": y[train], "x_test": x[len(train) :], "y_test": y_test}

    return run.scratch("tasks", [task, shifted, options.model_dump(exclude={"tasks", "shifted", "ks"})], code, make)


def probing_scores(run: Run) -> list[dict]:
    """One row per SAE and mode: mean AUC over tasks for each k, and the table of tasks with the raw probe beside them."""
    return _scores(run, "probing", {task: (task, None) for task in run.profile.probing.tasks})


def ood_scores(run: Run) -> list[dict]:
    """One row per SAE and mode: mean AUC on the shifted sets for each k, and its gap to the probe on raw activations."""
    return _scores(run, "ood", {name: (name.replace("_OOD", ""), name) for name in run.profile.probing.shifted})


def _scores(run: Run, kind: str, tasks: dict[str, tuple[str, str | None]]) -> list[dict]:
    code = (*SOURCE_CODE, "tracing", "tasks", "metrics.sparse_probing", "metrics.reconstruction")
    return run.rows(kind, run.profile.probing, code, lambda: _score_all(run, kind, tasks))


def _score_all(run: Run, kind: str, tasks: dict[str, tuple[str, str | None]]) -> list[dict]:
    seed, data = run.profile.probing.seed, {name: task_activations(run, *where) for name, where in tasks.items()}
    raw_auc = lambda d: probe(*_sides(d, d["x_train"], d["x_test"]), seed=seed).auc
    raw = dict(zip(data, in_threads(raw_auc, data.values(), label=f"{kind}, raw activations", unit="task")))
    used = [name for name in data if kind != "ood" or raw[name] >= USABLE]
    if not used:
        raise DataError(f"No task of {kind} is told from raw activations (AUC {raw}). Take others, or a larger model.")
    excluded = {name: raw[name] for name in data if name not in used}

    def score(sae, threshold) -> dict:
        table = [_score_one(run, sae, threshold, name, data[name], raw[name]) for name in used]
        return _means(kind, table, run.profile.probing.ks) | {"tasks": table, "excluded": excluded}

    return score_saes(run, kind, score)


def _means(kind: str, table: list[dict], ks: list[int]) -> dict[str, float]:
    """Means over tasks: the raw probe's AUC, the SAE's for each k, and what is missing to the raw probe."""
    raw = sum(t["raw_auc"] for t in table) / len(table)
    auc = {k: sum(t["auc"][str(k)] for t in table) / len(table) for k in ks}
    means = {f"{kind}_raw_auc": raw} | {f"{kind}_auc_{k}": auc[k] for k in ks}
    return means | {f"{kind}_gap_{k}": raw - auc[k] for k in ks}


def _score_one(run: Run, sae, threshold, name: str, data: dict[str, Tensor], raw: float) -> dict:
    f_train, f_test = (sae.encode(data[key].to(sae.device), threshold).cpu() for key in ("x_train", "x_test"))
    options = run.profile.probing
    result = sparse_probing(*_sides(data, f_train, f_test), ks=tuple(options.ks), penalty="l2", seed=options.seed)
    return {"task": name, "raw_auc": raw, "auc": {str(k): score.auc for k, score in result.scores.items()}}


def _sides(data: dict[str, Tensor], train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return train, data["y_train"], test, data["y_test"]
