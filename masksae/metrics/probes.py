"""Linear probes for the first-letter task, with the constants of SAEBench 0.6.0's absorption evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.errors import DataError

LETTERS = 26
TEST_SHARE = 0.2


@dataclass(frozen=True)
class LetterProbe:
    """26 one-against-rest linear probes and the split of the words they were trained on."""

    weight: Tensor
    """[26, d]: directions of the letters."""
    bias: Tensor
    """[26]"""
    is_test: Tensor
    """bool [n]: words that were not trained on."""
    f1: tuple[float, ...]
    """Per letter, on the test words; 0 where there are none."""

    def logits(self, x: Tensor) -> Tensor:
        """[n, 26] for activations x [n, d]; positive: the word starts with this letter."""
        return x.float() @ self.weight.t() + self.bias


def first_letters(words: list[str]) -> Tensor:
    """0 (a) to 25 (z) for each word. Raises DataError for a word that starts with anything else.

    >>> first_letters(["Zebra", "apple"])
    tensor([25,  0])
    """
    numbers = [ord(word[:1].lower() or " ") - ord("a") for word in words]
    for word, number in zip(words, numbers):
        if not 0 <= number < LETTERS:
            raise DataError(f"The word {word!r} does not start with a letter from a to z. Leave it out.")
    return torch.tensor(numbers)


def split_words(words: list[str], seed: int) -> Tensor:
    """bool [n]: which words are for testing. Spellings that differ in case only stay on one side.

    >>> is_test = split_words(["Sun", "sun", "moon"], seed=0)
    >>> is_test.dtype, bool(is_test[0] == is_test[1])
    (torch.bool, True)
    """
    distinct = sorted({word.lower() for word in words})
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {distinct[i] for i in order[: round(TEST_SHARE * len(distinct))]}
    return torch.tensor([word.lower() in chosen for word in words])


def letter_probe(x: Tensor, words: list[str], *, seed: int = 0) -> LetterProbe:
    """Train the probes on activations x [n, d] at `words`. Raises DataError for unequal lengths."""
    if len(x) != len(words):
        raise DataError(f"There are {len(x)} activations for {len(words)} words; one per word is needed.")
    x, is_test = x.float(), split_words(words, seed)
    y = torch.nn.functional.one_hot(first_letters(words), LETTERS).float()
    weight, bias = fit_linear(x[~is_test], y[~is_test], batch=64, weight_decay=1e-4, seed=seed)
    scores = f1(x[is_test] @ weight.t() + bias > 0, y[is_test] > 0)
    return LetterProbe(weight, bias, is_test, tuple(scores.tolist()))


def f1(predicted: Tensor, true: Tensor) -> Tensor:
    """F1 of each column of two bool tensors [n, c]; 0 where it is not defined.

    >>> f1(torch.tensor([[True], [True], [False]]), torch.tensor([[True], [False], [False]])).tolist()
    [0.6666666666666666]
    """
    hits = (predicted & true).sum(0).double()
    return 2 * hits / (predicted.sum(0) + true.sum(0)).clamp(min=1)


@torch.enable_grad()
def fit_linear(
    x: Tensor, y: Tensor, *, batch: int, weight_decay: float, seed: int, l1: float = 0.0, epochs: int = 50,
    lr: tuple[float, float] = (1e-2, 1e-5),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logistic regressions for all columns of y [n, c] at once: weight [c, d] and bias [c], starting from zero.

    Binary cross-entropy in which a positive weighs (negatives / positives), Adam with a learning rate that falls
    exponentially from lr[0] to lr[1], and `l1` times the mean over columns of sum |w|.
    """
    x, y = x.detach().float(), y.float()
    positives = y.sum(0).clamp(min=1)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(len(y) - positives) / positives)
    weight, bias = torch.zeros(y.shape[1], x.shape[1], requires_grad=True), torch.zeros(y.shape[1], requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=lr[0], weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for group in adam.param_groups:
            group["lr"] = lr[0] * (lr[1] / lr[0]) ** (epoch / epochs)
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            adam.zero_grad(set_to_none=True)
            total = loss(torch.addmm(bias, x[rows], weight.t()), y[rows])
            if l1:
                total = total + l1 * weight.abs().sum(1).mean()
            total.backward()
            adam.step()
    return weight.detach(), bias.detach()


def fit_each(xs: list[Tensor], ys: list[Tensor], *, batch: int, l1: float, seed: int, epochs: int = 50) -> Tensor:
    """As `fit_linear`, one regression per sample x [n_i, d] and y bool [n_i], all in step: weight [samples, d].

    Every sample takes as many steps as the largest, going round its rows again. The gradient of the logistic loss is
    written out: with so small steps most of the time would be autograd's.
    """
    generator, steps = torch.Generator().manual_seed(seed), epochs * -(-max(map(len, xs)) // batch)
    order = torch.stack([_rounds(len(x), steps * batch, generator) for x in xs])
    x, y = (torch.nn.utils.rnn.pad_sequence([t.float() for t in each], batch_first=True) for each in (xs, ys))
    positive = torch.stack([(len(t) - t.sum()) / t.sum().clamp(min=1) for t in ys])[:, None]
    weight, bias = torch.zeros(len(xs), x.shape[2]), torch.zeros(len(xs), 1)
    adam, which = torch.optim.Adam([weight, bias], fused=True), torch.arange(len(xs))[:, None]
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = 1e-2 * 1e-3 ** (step * epochs // steps / epochs)
        rows = order[:, step * batch : (step + 1) * batch]
        part, true = x[which, rows], y[which, rows]
        error = torch.sigmoid(torch.bmm(part, weight[:, :, None])[:, :, 0] + bias) - true
        error *= torch.where(true > 0, positive, 1.0) / batch
        weight.grad = torch.bmm(error[:, None], part)[:, 0] + l1 * weight.sign()
        bias.grad = error.sum(1, keepdim=True)
        adam.step()
    return weight


def _rounds(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Numbers below n in random order, round after round, `length` of them."""
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-length // n))])[:length]
