"""Linear probes for the first-letter task, with the constants of SAEBench 0.6.0's absorption evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse, special
from torch import Tensor

from masksae.errors import DataError
from masksae.parallel import in_threads

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


@torch.inference_mode(False)  # with gradients, whatever the caller's mode is
def fit_linear(
    x: Tensor, y: Tensor, *, batch: int, weight_decay: float, seed: int, epochs: int = 50,
    lr: tuple[float, float] = (1e-2, 1e-5),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logistic regressions for all columns of y [n, c] at once: weight [c, d] and bias [c], starting from zero.

    Binary cross-entropy in which a positive weighs (negatives / positives), Adam with a learning rate that falls
    exponentially from lr[0] to lr[1].
    """
    x, y = x.detach().float(), y.float()
    positives = y.sum(0).clamp(min=1)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(len(y) - positives) / positives)
    shapes = (y.shape[1], x.shape[1]), (y.shape[1],)
    weight, bias = (torch.zeros(shape, dtype=torch.float32, requires_grad=True) for shape in shapes)
    adam = torch.optim.Adam([weight, bias], lr=lr[0], weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for group in adam.param_groups:
            group["lr"] = lr[0] * (lr[1] / lr[0]) ** (epoch / epochs)
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            adam.zero_grad(set_to_none=True)
            loss(torch.addmm(bias, x[rows], weight.t()), y[rows]).backward()
            adam.step()
    return weight.detach(), bias.detach()


MAX_STEPS = 2000


def l1_logistic(f: sparse.sparray, y: Tensor, *, l1: float, tolerance: float = 1e-3) -> tuple[Tensor, Tensor]:
    """L1-regularised logistic regressions on sparse rows, one for each column of y bool [n, c], at their optimum.

    f  scipy.sparse [n, F]

    Each minimises  mean_i s_i log(1 + exp(-t_i (f_i w + b))) + l1 |w|_1  over w [F] and b, where t is 1 for a positive
    and -1 otherwise, and a positive weighs s = negatives / positives, any other row 1. At what is returned no component
    of the objective's smallest subgradient exceeds `tolerance` x l1. Weights that are zero are exactly 0.

    Returns (weight float64 [c, F], bias float64 [c]). Raises DataError for a column of one class, and if the optimum is
    not reached.

    A Newton step inside the orthant of the signs, on the latents that are not zero or ought not to be (after Andrew &
    Gao 2007, OWL-QN, with the true Hessian); its system is solved by conjugate gradients, so no matrix of latents x
    latents is made. A latent that would change its sign stops at zero. Where that doesn't descend, coordinate descent
    on the model of second order takes its place. At 12,800 words x 2,048 latents, 20 active on a word, 5 to 8 steps and
    30 ms a letter; dense latents need more, since they resemble each other.
    """
    if not (y.bool().any(0) & ~y.bool().all(0)).all():
        raise DataError("A ranking probe needs rows with and without its parent. Give more words or text.")
    f = sparse.hstack([f, np.ones((f.shape[0], 1))], format="csc", dtype=np.float64)
    if not np.isfinite(f.data).all():
        raise DataError("Some latents are not finite. Was the SAE trained to its end, and are its inputs finite?")
    fits = in_threads(lambda column: _l1_logistic(f, column, l1, tolerance), y.bool().numpy().T)
    weight = torch.from_numpy(np.stack(fits))
    return weight[:, :-1], weight[:, -1]


def _l1_logistic(f: sparse.csc_array, y: np.ndarray, l1: float, tolerance: float) -> np.ndarray:
    """One regression; the last column of f is the bias's."""
    penalty = np.full(f.shape[1], l1)
    penalty[-1] = 0
    share = np.where(y, (~y).sum() / y.sum(), 1.0) / len(y)
    against = np.where(y, -1.0, 1.0)

    def objective(w, z) -> float:
        return (share * np.logaddexp(0, against * z)).sum() + penalty @ np.abs(w)

    w, z = np.zeros(f.shape[1]), np.zeros(len(y))
    value = objective(w, z)
    for _ in range(MAX_STEPS):
        p = special.expit(z)
        gradient = f.T @ (share * (p - y))
        sign = np.where(w != 0, np.sign(w), -np.sign(gradient))
        violation = _violation(w, gradient, penalty)
        worst = violation.max()
        if worst <= tolerance * l1:
            return w
        moving = np.flatnonzero((w != 0) | (violation > 0))
        part, at, force, curvature = f[:, moving], w[moving], penalty[moving], share * p * (1 - p)
        for step in _steps(part, curvature, at, gradient[moving], sign[moving], force, worst / l1):
            new = at + step
            trial, moved = w.copy(), part @ new
            trial[moving] = new
            reached = objective(trial, moved)
            promised = gradient[moving] @ step + force @ (np.abs(new) - np.abs(at))
            if reached <= value + 1e-4 * promised + 1e-14:  # what rounding leaves of a decrease
                break
        else:
            raise DataError("No step lowers the loss of a ranking probe. Are its latents of a usual size?")
        w, z, value = trial, moved, reached
    raise DataError(
        f"The ranking probe of {f.shape[0]} words is not at its optimum after {MAX_STEPS} steps. Give more words."
    )


def _violation(w, gradient, penalty) -> np.ndarray:
    """Size of each component of the smallest subgradient at `w`, `gradient` being that of the part without penalty."""
    return np.where(w != 0, np.abs(gradient + penalty * np.sign(w)), np.maximum(np.abs(gradient) - penalty, 0))


def _steps(part, curvature, at, gradient, sign, force, off: float) -> Iterator[np.ndarray]:
    """Steps from `at`, to be tried in turn: Newton's, which is quick, and where latents that fire on the same few words
    lead it astray, one that descends if it is short enough. `off` is the worst violation in units of the penalty."""
    step = _newton_step(part, curvature, at, sign * (force > 0), gradient + force * sign, min(0.1, 0.1 * off**0.5))
    yield from (t * step for t in 0.5 ** np.arange(4))
    step = _descent(part, curvature, at, gradient, force, 0.1 * min(off, 1))
    yield from (t * step for t in 0.5 ** np.arange(30))


def _descent(part, curvature, at, gradient, force, tolerance: float) -> np.ndarray:
    """The step from `at` to the minimum of the penalised quadratic model, by one coordinate after the other: each
    lowers the model, whatever its Hessian's rank (Yuan, Ho & Lin 2012, newGLMNET). Slow; the Hessian is made."""
    hessian = (part.T @ (part * curvature[:, None])).toarray()
    diagonal = hessian.diagonal() + 1e-12
    new, slope = at.copy(), gradient.copy()
    for _ in range(100):
        for i, size in enumerate(diagonal):
            best = new[i] - slope[i] / size
            best = np.sign(best) * max(abs(best) - force[i] / size, 0)
            slope += (best - new[i]) * hessian[i]
            new[i] = best
        if _violation(new, slope, force).max() <= tolerance * force.max():
            break
    return new - at


def _newton_step(part, curvature, at, sign, slope, tolerance) -> np.ndarray:
    """Newton's step from `at` with those coordinates that it would carry across zero stopped there."""
    diagonal = np.maximum(part.multiply(part).T @ curvature, 1e-12)
    free, step = np.ones(len(at), bool), np.zeros(len(at))
    enough = tolerance**2 * (slope @ (slope / diagonal))
    while True:
        stop = np.where(free, 0.0, -at)
        known = slope + part.T @ (curvature * (part @ stop)) if stop.any() else slope
        step = _conjugate_gradients(part, curvature, free, diagonal, -known * free, step * free, enough) + stop
        crossed = free & (sign * (at + step) < 0)
        if not crossed.any():
            return step
        free &= ~crossed


def _conjugate_gradients(part, curvature, free, diagonal, b, x, enough) -> np.ndarray:
    """x with H x = b for the Hessian H of the free coordinates, from a first guess, until r D^-1 r of the residual r is
    at most `enough`; D is H's diagonal, of which 1e-10 is added: a latent that never changes equals the bias."""
    back = part.T

    def product(v):
        return free * (back @ (curvature * (part @ v)) + 1e-10 * diagonal * v)

    residual = b - product(x)
    direction = scaled = residual / diagonal
    size = residual @ scaled
    for _ in range(10 * len(b)):
        if size <= enough:
            break
        image = product(direction)
        length = size / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        scaled = residual / diagonal
        last, size = size, residual @ scaled
        direction = scaled + size / last * direction
    return x


def balanced_logistic(f: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression on a few latents f [n, k] with y bool [n], both classes of equal weight: (weight [k], bias).

    Minimises  |w|^2 / 2 + sum_i s_i log(1 + exp(-t_i (f_i w + b))),  s = n / (2 x rows of its class): scikit-learn's
    `LogisticRegression(class_weight="balanced")`. Newton's method, to a gradient of 1e-6; rows without any of the
    latents are alike and counted once. Raises DataError for a single class.
    """
    if not 0 < y.sum() < len(y):
        raise DataError("A logistic regression needs rows of both classes. Give more words or text.")
    fires = f.any(1)
    weigh = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    rows = np.concatenate([f[fires], np.zeros((2, f.shape[1]))]).astype(np.float64)
    x = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    true = np.append(y[fires], [True, False])
    weigh = np.append(weigh[fires], [weigh[~fires & y].sum(), weigh[~fires & ~y].sum()])
    against, ridge = np.where(true, -1.0, 1.0), np.append(np.ones(f.shape[1]), 1e-12)

    def objective(w) -> float:
        return (weigh * np.logaddexp(0, against * (x @ w))).sum() + (ridge * w * w).sum() / 2

    w = np.zeros(x.shape[1])
    for _ in range(MAX_STEPS):
        p = special.expit(x @ w)
        gradient = x.T @ (weigh * (p - true)) + ridge * w
        if np.abs(gradient).max() <= 1e-6:
            break
        step = np.linalg.solve(x.T @ ((weigh * p * (1 - p))[:, None] * x) + np.diag(ridge), gradient)
        bound, t = objective(w) * (1 + 1e-12), 1.0  # near the optimum rounding hides the decrease
        while objective(w - t * step) > bound - 1e-4 * t * (gradient @ step):
            t /= 2
        w = w - t * step
    else:
        raise DataError(f"A logistic regression of {len(y)} rows is not at its optimum after {MAX_STEPS} steps.")
    return w[:-1], float(w[-1])
