"""Scores of notebook 06, of labelled texts averaged over their tokens: SAEBench's k-sparse probing, and what ablating a
concept's latents does (TPP, SCR).

A text is its first tokens, BOS left out; activations and latents are averaged over exactly these, so there is no
padding that could leak into a mean. The averages are all that is kept of a text, and everything follows from them:
decoding is linear, so ablating latents moves an averaged activation by their averages times their decoder rows. The
texts come batch by batch, each for a few SAEs: out of scratch where all tokens of a group fit into KEPT bytes, else out
of the model again. At the scale of SAEBench (25,000 texts of 128 tokens) the tokens of a group would be 10 GB for a
width of 768, and one more pass of the model over them is cheap beside the training text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from masksae import progress
from masksae.data.tasks import probe_table
from masksae.errors import DataError
from masksae.metrics.perturbation import Probe, Texts, fit_probe, scr, tpp
from masksae.metrics.sparse_probing import probe, sparse_probing
from masksae.parallel import in_threads
from masksae.saes.sae import SAE, at_least_single
from masksae.study.scores.matched import by_mode, cells
from masksae.study.scores.probing import BATCH, labels, text_batches
from masksae.study.store import Subject

ROOM = 0.1
"""SCR of a pair counts if the oracle probe is better than the spurious one by this much: about two standard errors for
100 test texts."""
KEPT = 2**30
"""Bytes of a group's tokens that are kept in scratch, at most."""
POOLED = 8
"""SAEs whose averaged latents of a group are in memory at a time: the model reads texts that are not kept again for as
many."""
SAEBENCH = dict(normalised=False, penalty="l2", strengths=(1.0,), scaled=False)
"""SAEBench's rule of k-sparse probing: ranked by difference of means, C = 1."""
BASELINE_KS = (1, 2, 5)
"""Numbers of coordinates of raw activations that are probed beside the latents."""


def kept_bytes(texts: int, max_tokens: int, width: int) -> int:
    """What the tokens of so many texts take in scratch, at most; 0 where they are not kept."""
    size = 4 * texts * max_tokens * width
    return size if size <= KEPT else 0


@dataclass(frozen=True)
class TextPool:
    """Texts of a group or a pair."""

    run: Subject
    texts: list[str]
    label: str

    def tokens(self) -> Iterator[tuple[int, Tensor]]:
        """(row, x [tokens, d]) of each text, short ones first."""
        limit = self.run.profile.perturbation.max_tokens
        made = (
            (row, text[:length])
            for rows, x, lengths in text_batches(self.run, self.texts, limit, from_end=False, label=self.label)
            for row, text, length in zip(rows, x, lengths.tolist())
        )
        if not kept_bytes(len(self.texts), limit, self.run.width):
            return made

        def make() -> dict[str, Tensor]:
            rows, x = zip(*made)
            return {"rows": torch.tensor(rows), "x": torch.cat(x), "lengths": torch.tensor([*map(len, x)])}

        kept = self.run.scratch("pools", [self.texts, limit], make)
        return zip(kept["rows"].tolist(), kept["x"].split(kept["lengths"].tolist()))

    def means(self, encoders: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """What each encoder makes of the tokens, averaged over those of a text: [n, m] for each."""
        found: dict[int, Tensor] = {}

        def add(some: list[tuple[int, Tensor]], number: int) -> None:
            values = torch.stack([encoders[number](x).mean(0) for _, x in some]).cpu()
            if number not in found:
                found[number] = values.new_empty(len(self.texts), values.shape[1])
            found[number][[row for row, _ in some]] = values

        tokens = self.tokens()
        while some := [*islice(tokens, BATCH)]:
            in_threads(partial(add, some), range(len(encoders)))
        return [found[number] for number in range(len(encoders))]


def encoder(sae: SAE, threshold: float | None) -> Callable[[Tensor], Tensor]:
    """Of an SAE at a threshold: activations [n, d] -> latents [n, F], in single precision at least."""
    return lambda x: at_least_single(sae.encode(x.to(sae.device), threshold))


def distinct_texts(task: str) -> dict[str, bool]:
    """Prompt -> label of a binary task; prompts that carry both labels are left out."""
    table = probe_table(task)
    label_of: dict[str, bool] = {}
    contradictory = set()
    for prompt, label in zip(table["prompt"].astype(str), labels(table["target"].tolist()).tolist()):
        if label_of.setdefault(prompt, label) != label:
            contradictory.add(prompt)
    return {prompt: label for prompt, label in label_of.items() if prompt not in contradictory}


def shuffled(items: list[str], seed: int) -> list[str]:
    """Items in a seeded order."""
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()]


@dataclass(frozen=True)
class ClassGroup:
    """Classes that exclude one another: train + test texts of each, in this order in the pool."""

    name: str
    classes: tuple[str, ...]
    pool: TextPool
    x: Tensor
    """[n, d]: activations averaged over each text."""
    probes: tuple[Probe, ...]
    """Of the activations, one for each class."""
    raw: dict[str, float]
    """Accuracy of probes on raw activations, averaged over classes: all of them, and the best k coordinates."""


def one_against_rest(values: Tensor, cls: int, classes: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of a class and as many of the others, with labels: values [classes * n, m] -> ([~2 r, m], bool [~2 r]).

    The negatives are equal parts of the other classes, first rows first.
    """
    by_class = values.view(classes, -1, values.shape[1])[:, rows]
    share = by_class.shape[1] // (classes - 1)
    negatives = [by_class[other, :share] for other in range(classes) if other != cls]
    x = torch.cat([by_class[cls], *negatives])
    return x, torch.arange(len(x)) < by_class.shape[1]


def class_group(run: Subject, name: str) -> ClassGroup:
    """Texts and probes of a group. Raises DataError if a class has too few texts of its own."""
    options = run.profile.perturbation
    tasks, size = options.groups[name], options.train + options.test
    positives = [[p for p, label in distinct_texts(task).items() if label] for task in tasks]
    texts = []
    for task, mine in zip(tasks, positives):
        shared = {p for other in positives if other is not mine for p in other}
        own = shuffled([p for p in mine if p not in shared], options.seed)
        if len(own) < size:
            raise DataError(
                f"{task} has {len(own)} texts of its own, {size} are wanted (perturbation.train + test). "
                f"Lower them or leave {name} out."
            )
        texts += own[:size]
    pool, classes = TextPool(run, texts, name), len(tasks)
    [x] = pool.means([lambda x: x])
    sides = [[one_against_rest(x, cls, classes, rows) for rows in halves(run)] for cls in range(classes)]
    probes = tuple(fit_probe(*train) for train, _ in sides)
    every = [probe(*train, *test, strengths=(1.0,), scaled=True).accuracy for train, test in sides]
    best = [sparse_probing(*train, *test, ks=BASELINE_KS, **SAEBENCH).scores for train, test in sides]
    raw = {"all": sum(every) / classes}
    raw |= {str(k): sum(scores[k].accuracy for scores in best) / classes for k in BASELINE_KS}
    return ClassGroup(name, tuple(tasks), pool, x, probes, raw)


def halves(run: Subject) -> tuple[slice, slice]:
    """Rows of a class for training and for testing."""
    train = run.profile.perturbation.train
    return slice(train), slice(train, None)


def group_scores(run: Subject, group: ClassGroup, sae: SAE, f: Tensor) -> dict:
    """TPP and SAEBench's k-sparse probing of one SAE on one group, whose averaged latents are f [n, F]."""
    options, classes, w_dec = run.profile.perturbation, len(group.classes), sae.W_dec.cpu()
    sides, accuracy = ([], []), {k: 0.0 for k in (*options.ks, "all")}
    for cls in range(classes):
        for rows, side in zip(halves(run), sides):
            x, y = one_against_rest(group.x, cls, classes, rows)
            side.append(Texts(x, one_against_rest(f, cls, classes, rows)[0], y))
        train, test = (side[-1] for side in sides)
        scores = sparse_probing(train.f, train.y, test.f, test.y, ks=tuple(options.ks), **SAEBENCH).scores
        scores["all"] = probe(train.f, train.y, test.f, test.y, strengths=(1.0,), scaled=True)
        for k, score in scores.items():
            accuracy[k] += score.accuracy / classes
    result = tpp(group.probes, *sides, w_dec, ns=tuple(options.ns))
    named = {"total": result.total, "intended": result.intended, "unintended": result.unintended}
    tables = {kind: {str(n): v for n, v in values.items()} for kind, values in named.items()}
    return {"group": group.name, **tables, "accuracy": {str(k): v for k, v in accuracy.items()}, "raw": group.raw}


@dataclass(frozen=True)
class Pair:
    """Two attributes of the same texts; quadrant (a, b) holds texts with attribute 1 = a and attribute 2 = b."""

    name: str
    pool: TextPool
    x: Tensor
    """[n, d]: activations averaged over each text."""
    y: Tensor
    """bool [n, 2]: the attributes."""
    is_test: Tensor
    """bool [n]; a third of each quadrant."""
    spurious: dict[bool, Probe]
    """Trained where the attributes agree (True) or disagree (False), for attribute 1."""
    oracles: tuple[Probe, Probe]
    """Of attribute 1 and of attribute 2, trained on all quadrants."""


def pair(run: Subject, wanted: str, other: str) -> Pair:
    """Texts and probes of two tasks that share prompts. Raises DataError if a quadrant has fewer than 30 texts."""
    options, first, second = run.profile.perturbation, distinct_texts(wanted), distinct_texts(other)
    quadrants = {
        (a, b): [p for p in first if p in second and (first[p], second[p]) == (a, b)] for a in (0, 1) for b in (0, 1)
    }
    size = min(map(len, quadrants.values()))
    if size < 30:
        counts = {f"{a}{b}": len(texts) for (a, b), texts in quadrants.items()}
        raise DataError(f"{wanted} and {other} share texts {counts}; 30 of each kind are needed. Take another pair.")
    size = min(size, options.train + options.test)
    texts = [p for quadrant in quadrants.values() for p in shuffled(quadrant, options.seed)[:size]]
    pool = TextPool(run, texts, wanted)
    [x] = pool.means([lambda x: x])
    y = torch.tensor(list(quadrants)).bool().repeat_interleave(size, 0)
    is_test = (torch.arange(size) >= size - size // 3).repeat(4)

    def fit(rows: Tensor, attribute: int) -> Probe:
        return fit_probe(x[rows & ~is_test], y[rows & ~is_test, attribute])

    agree, everything = y[:, 0] == y[:, 1], torch.ones(len(y), dtype=torch.bool)
    spurious = {True: fit(agree, 0), False: fit(~agree, 0)}
    return Pair(wanted, pool, x, y, is_test, spurious, oracles=(fit(everything, 0), fit(everything, 1)))


def pair_scores(run: Subject, pair: Pair, sae: SAE, f: Tensor) -> dict:
    """SCR of one SAE on one pair, whose averaged latents are f [n, F], averaged over those of the two ways in which the
    attributes can go together that leave room for it."""
    ns, w_dec = tuple(run.profile.perturbation.ns), sae.W_dec.cpu()
    first, second = pair.oracles
    results = {}
    for agree, spurious in pair.spurious.items():
        # where they disagree, attribute 2 is replaced by its opposite
        labelled = pair.y ^ torch.tensor([False, not agree])
        sides = [
            tuple(Texts(pair.x[rows], f[rows], labelled[rows, attribute]) for attribute in (0, 1))
            for rows in (~pair.is_test, pair.is_test)
        ]
        sign = 1 if agree else -1
        oracles = first, Probe(sign * second.weight, sign * second.bias)
        results["together" if agree else "apart"] = scr(spurious, oracles, *sides, w_dec, ns=ns)
    used = [result for result in results.values() if result.room >= ROOM]
    tables: dict[str, dict | None] = {"scr": None, "direction_1": None, "direction_2": None}
    if used:
        for table, kind in zip(tables, ("score", "direction_1", "direction_2")):
            tables[table] = {str(n): sum(getattr(r, kind)[n] for r in used) / len(used) for n in ns}
    return {"pair": pair.name, "room": {way: result.room for way, result in results.items()}, **tables}


def concept_scores(run: Subject) -> list[dict]:
    """One row per SAE and mode: TPP and SCR by number of ablated latents, accuracy of k-sparse probes, and the tables
    they are means of."""

    def make(run: Subject) -> list[dict]:
        options = run.profile.perturbation
        groups = run.shared("groups", lambda: [class_group(run, name) for name in options.groups])
        pairs = run.shared("pairs", lambda: [pair(run, *names) for names in options.pairs])
        saes, wanted = run.load_saes(), cells(run)
        tables: dict = {cell: {"groups": [], "pairs": []} for cell in wanted}
        todo = [("groups", group, group_scores) for group in groups] + [("pairs", each, pair_scores) for each in pairs]
        for kind, texts, score in progress.bar(todo, label="concepts", unit="group"):
            for low in range(0, len(wanted), POOLED):
                some = wanted[low : low + POOLED]
                f = texts.pool.means([encoder(saes[name], threshold) for name, threshold in some])
                rows = in_threads(lambda i: score(run, texts, saes[some[i][0]], f[i]), range(len(some)))
                for cell, row in zip(some, rows):
                    tables[cell][kind].append(row)
        return by_mode(run, {cell: _means(**found) | found for cell, found in tables.items()})

    return run.rows("concepts", run.profile.perturbation, make)


def _means(groups: list[dict], pairs: list[dict]) -> dict[str, float]:
    """Columns such as tpp_5, scr_5, pooled_accuracy_5: means over groups and over pairs with room."""
    pairs = [pair for pair in pairs if pair["scr"]]
    columns = {
        "tpp": ("total", groups), "tpp_intended": ("intended", groups), "tpp_unintended": ("unintended", groups),
        "scr": ("scr", pairs), "scr_direction_1": ("direction_1", pairs), "scr_direction_2": ("direction_2", pairs),
        "pooled_accuracy": ("accuracy", groups), "pooled_raw": ("raw", groups),
    }  # fmt: skip
    return {
        f"{column}_{n}": sum(t[key][n] for t in tables) / len(tables)
        for column, (key, tables) in columns.items()
        for n in (tables[0][key] if tables else ())
    }
