"""k-sparse probing: how well a concept is told from the k latents that differ most between its classes.

The protocol is that of sae-probes 0.4.2 (Kantamneni et al. 2025, arXiv 2502.16681): latents of the last token, ranked
by the difference of class means, a logistic regression on the first k whose strength C is chosen by AUC on a held-out
part of the training rows, scored on the test rows. Other rules for the same arrays: SAEBench ranks without normalising
and takes C = 1 on latents averaged over tokens (`normalised=False`, `strengths=(1.0,)`).

Ours differs in one thing: features are divided by their mean non-zero value before the fit as they are before the
ranking, so that the solver converges; `scaled=False` is the original, which often stops at its 1,000 iterations (a
warning of scikit-learn says so).
"""

from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.saes.sae import at_least_single

KS = (1, 2, 5, 16, 128)
STRENGTHS = tuple(np.logspace(5, -5, 10).tolist())
"""Values of C that are tried, the weakest regularisation first."""
VALIDATION_SHARE, VALIDATION_ROWS = 0.2, 100
MAX_ITERATIONS, WIDEST = 1000, 1024
NEWTON = Lock()


@dataclass(frozen=True)
class ProbeScore:
    """One probe on test rows."""

    auc: float
    """Area under the ROC curve; .5 is chance."""
    accuracy: float
    f1: float
    """Weighted by class."""
    strength: float
    """The C that was chosen."""
    converged: bool

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class SparseProbing:
    """Scores by k."""

    scores: dict[int, ProbeScore]

    def to_dict(self) -> dict:
        return {str(k): score.to_dict() for k, score in self.scores.items()}


def mean_active(f: Tensor) -> Tensor:
    """Mean over the rows in which a latent is not 0 of its size [F]; 0 for a latent that never is.

    >>> mean_active(torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 0.0]]))
    tensor([3., 0.])
    """
    return f.abs().sum(0) / (f != 0).sum(0).clamp(min=1)


def rank_latents(f: Tensor, y: Tensor, *, normalised: bool = True) -> Tensor:
    """Latents of f [n, F] by |mean over positives - mean over negatives|, largest first; of equal ones, the first.

    normalised  divide each latent by its mean non-zero value before (sae-probes); without, SAEBench and the figures of
                the paper

    >>> f = torch.tensor([[1.0, 9.0], [1.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    >>> rank_latents(f, torch.tensor([True, True, False, False]))
    tensor([0, 1])
    """
    f, y = at_least_single(f), _labels(y, len(f))
    difference = f[y].mean(0) - f[~y].mean(0)
    if normalised:
        difference = difference / mean_active(f).clamp(min=1e-6)
    return difference.abs().argsort(descending=True, stable=True)


def probe(
    x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, *, penalty: str = "l2", strengths=STRENGTHS,
    scaled: bool = False, seed: int = 42,
) -> ProbeScore:  # fmt: skip
    """A logistic regression on x [n, d] with C chosen on the last rows of the training set; scored on the test rows.

    The training rows must be in random order. Raises DataError for one class only, rows that do not match, or NaN.
    """
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    (x_train, y_train), (x_test, y_test) = _arrays(x_train, y_train, "train"), _arrays(x_test, y_test, "test")
    if scaled:
        size = mean_active(torch.from_numpy(x_train)).clamp(min=1e-12).numpy()
        x_train, x_test = x_train / size, x_test / size
    held = min(int(VALIDATION_SHARE * len(x_train)), VALIDATION_ROWS)
    strength = strengths[0]
    if len(strengths) > 1:
        fit, check = slice(0, len(x_train) - held), slice(len(x_train) - held, None)
        if len({*y_train[fit]}) < 2 or len({*y_train[check]}) < 2:
            raise DataError(
                f"{len(x_train)} training rows leave one class only in a part of them. Use more rows, in random order."
            )
        found = []
        for c in strengths:
            model, _ = _fit(x_train[fit], y_train[fit], penalty, c, seed)
            found.append(roc_auc_score(y_train[check], model.predict_proba(x_train[check])[:, 1]))
        strength = strengths[int(np.argmax(found))]
    order = np.random.RandomState(seed).permutation(len(x_train))
    model, converged = _fit(x_train[order], y_train[order], penalty, strength, seed)
    predicted = model.predict(x_test)
    return ProbeScore(
        auc=float(roc_auc_score(y_test, model.predict_proba(x_test)[:, 1])),
        accuracy=float(accuracy_score(y_test, predicted)),
        f1=float(f1_score(y_test, predicted, average="weighted")),
        strength=float(strength),
        converged=converged,
    )


def sparse_probing(
    f_train: Tensor, y_train: Tensor, f_test: Tensor, y_test: Tensor, *, ks=KS, normalised: bool = True,
    penalty: str = "l1", strengths=STRENGTHS, scaled: bool = True, seed: int = 42,
) -> SparseProbing:  # fmt: skip
    """Scores of the k best latents for each k, on latents f [n, F] and labels y (bool or 0 and 1) [n].

    A k beyond the dictionary is an error. Raises DataError as `probe` does.

    >>> y = torch.arange(200) % 2 == 0
    >>> f = torch.stack([torch.rand(200, generator=torch.Generator().manual_seed(0)), y.float()], dim=1)
    >>> sparse_probing(f[:100], y[:100], f[100:], y[100:], ks=(1,)).scores[1].auc
    1.0
    """
    if max(ks) > f_train.shape[1]:
        raise DataError(f"k = {max(ks)} latents cannot be taken from a dictionary of {f_train.shape[1]}. Lower k.")
    order = rank_latents(f_train, y_train, normalised=normalised)[: max(ks)]
    scores = {
        k: probe(
            f_train[:, order[:k]], y_train, f_test[:, order[:k]], y_test,
            penalty=penalty, strengths=strengths, scaled=scaled, seed=seed,
        )
        for k in ks
    }  # fmt: skip
    return SparseProbing(scores)


def split(prompts: list[str], y: Tensor, *, train: int, test: int | None = None, seed: int = 42):
    """Row numbers (train, test) of a task: as many positives as negatives in both, in random order; each prompt once,
    where sae-probes may have the same text on both sides.

    test  at most so many rows; None: all that are left and balance

    Raises DataError if a class has too few rows.
    """
    y = _labels(y, len(prompts))
    rows = np.asarray(list(dict(zip(reversed(prompts), range(len(prompts) - 1, -1, -1))).values())[::-1])
    generator = np.random.RandomState(seed)
    shuffled = [generator.permutation(rows[(y[rows] == value).numpy()]) for value in (True, False)]
    fewest = min(map(len, shuffled))
    if fewest < train // 2 + 1:
        raise DataError(
            f"The rarer class has {fewest} distinct prompts, {train // 2} are wanted for training and some for the "
            "test. Lower train."
        )
    per_class = fewest - train // 2 if test is None else min(test // 2, fewest - train // 2)
    parts = [[s[: train // 2] for s in shuffled], [s[train // 2 : train // 2 + per_class] for s in shuffled]]
    return tuple(torch.from_numpy(generator.permutation(np.concatenate(part))) for part in parts)


def _fit(x, y, penalty: str, strength: float, seed: int):
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    ridge = "newton-cholesky" if x.shape[1] <= WIDEST else "lbfgs"  # converges in a few steps of cost features^3
    kind = {"l1": dict(l1_ratio=1.0, solver="saga"), "l2": dict(l1_ratio=0.0, solver=ridge)}[penalty]
    checked = config_context(
        assume_finite=True, skip_parameter_validation=True
    )  # before; it takes longer than a small fit
    with checked, _newton_alone() if kind["solver"] == "newton-cholesky" else nullcontext():
        model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, random_state=seed, **kind).fit(x, y)
    return model, bool(model.n_iter_[0] < MAX_ITERATIONS)


@contextmanager
def _newton_alone():
    """One Newton fit at a time: on singular data it turns a warning into an error for all threads for a moment, then
    goes on with L-BFGS."""
    import warnings

    from scipy.linalg import LinAlgWarning

    with NEWTON, warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)
        yield


def _labels(y, n: int) -> Tensor:
    """bool [n]; raises DataError unless both classes are there."""
    y = torch.as_tensor(y)
    if len(y) != n:
        raise DataError(f"There are {len(y)} labels for {n} rows; one per row is needed.")
    values = set(y.unique().tolist())
    if values != {0, 1}:
        raise DataError(f"Labels must be 0 and 1 with both present, found {sorted(values)[:5]}.")
    return y.bool()


def _arrays(x: Tensor, y, what: str) -> tuple[np.ndarray, np.ndarray]:
    y = _labels(y, len(x))
    x = torch.as_tensor(x).detach().cpu().double()
    if not torch.isfinite(x).all():
        raise DataError(f"The {what} rows hold NaN or infinity. Look at the stage that made them.")
    return x.numpy(), y.cpu().numpy()
