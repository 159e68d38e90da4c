"""Masked regularisation for people who stay with their own trainer: corrupt the tokens, and let everything else be.

Three places where tokens can be corrupted, from the tidiest to the most general:

    mask_dataset        token blocks in a data set          SAELens' pre-tokenised data sets
    activation_batches  batches of activations              trainSAE of dictionary_learning, SAETrainer of SAELens
    mask_inputs         the ids that reach a model          any trainer that runs a model, ActivationBuffer of dictionary_learning too

Neither library is imported here. `tests/test_peers_plugins.py` trains both on a small model and compares the activations.
"""

import functools
import hashlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from masksae.activations import ActivationStream
from masksae.cache import code_id
from masksae.errors import ConfigError, DataError, nearest
from masksae.files import run_id
from masksae.masking import mask_tokens


def mask_dataset(dataset, *, p: float, token_id: int, seed: int, spare=(), column: str = "input_ids"):
    """A data set of token blocks with p of the tokens replaced, and a new column `is_masked` beside them.

    dataset   `datasets.Dataset` or `IterableDataset`, one block of token ids a row, of any length. Row i gets mask number i, as in
              `mask_tokens`, so shuffle before. Streams stay lazy; a `Dataset` is written to its cache once, since trainers that set a format
              of their own (SAELens does) would silently take a transform off again
    p, token_id, seed, spare
              as in `mask_tokens`; give BOS and padding as spare
    column    of the ids; it keeps its name

    SAELens takes the result as it is (`override_dataset=`), and leaves masked positions out of training with
    `exclude_special_tokens=[token_id]`. Raises ConfigError, DataError.

    >>> import datasets
    >>> blocks = datasets.Dataset.from_dict({"input_ids": [[1, 5, 6, 7, 8, 9]]})
    >>> mask_dataset(blocks, p=0.5, token_id=0, seed=4, spare=(1,))[0]
    {'input_ids': [1, 0, 6, 0, 0, 9], 'is_masked': [False, True, False, True, True, False]}
    """
    import datasets

    keys = {"p": p, "token_id": token_id, "seed": seed, "spare": tuple(spare)}
    mask_tokens(torch.zeros(1, 1, dtype=torch.int64), **keys)  # refuses bad values now, not in the middle
    names = dataset.column_names or list(next(iter(dataset)))
    if column not in names:
        raise ConfigError(
            f"The data set has no column {column!r}.{nearest(column, names)} Text must be cut into token blocks first."
        )
    if "is_masked" in names:
        raise ConfigError("The data set has a column 'is_masked': it is masked already. Give the clean one.")
    rows = functools.partial(_mask_rows, column=column, **keys)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(rows, with_indices=True, batched=True)
    key = [dataset._fingerprint, column, keys, code_id("plugins")]
    features = datasets.Features(dataset.features | {"is_masked": datasets.Sequence(datasets.Value("bool"))})
    return dataset.map(rows, with_indices=True, batched=True, features=features, new_fingerprint=run_id(key))


def _mask_rows(batch: dict, numbers: list[int], column: str, **keys) -> dict:
    """Masked rows of a batch, each by its number."""
    masked = [
        mask_tokens(_row(ids, column)[None], first_sequence=number, **keys)
        for ids, number in zip(batch[column], numbers)
    ]
    return {column: [ids[0].tolist() for ids, _ in masked], "is_masked": [where[0].tolist() for _, where in masked]}


def _row(ids, column: str) -> Tensor:
    try:
        return torch.as_tensor(ids, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"Column {column!r} must hold lists of token ids, found {str(ids)[:40]!r}.") from error


def activation_batches(stream: ActivationStream, *, drop_masked: bool = False) -> Iterator[Tensor]:
    """Batches of activations float32 [batch_size, d] without end: what `trainSAE(data=...)` of dictionary_learning and
    `SAETrainer(data_provider=...)` of SAELens ask for. Make the stream with `masksae.activations.from_model`.

    drop_masked  leave masked positions out; batches stay full

    >>> x = torch.arange(8.0)[:, None]
    >>> stream = ActivationStream.from_array(x, batch_size=4, seed=0, is_masked=x[:, 0] > 3)
    >>> sorted(next(activation_batches(stream, drop_masked=True))[:, 0].tolist())
    [0.0, 1.0, 2.0, 3.0]
    """
    return (views[0][0] for views in stream.batches([(stream.seed, drop_masked)]))


class mask_inputs:
    """Replace p of the tokens that reach a model, until `remove()` or the end of a `with` block; evaluate outside of it.

    model     a transformers model (also inside nnsight's or SAELens' wrappers), or a HookedTransformer: a module whose forward takes ids
              int [n, s] first
    p, token_id, seed, spare
              as in `mask_tokens`; give BOS and padding as spare

    A sequence's mask depends on the seed and on its own tokens (those that are not spare), not on when it comes, on the batch, or on
    padding: every epoch sees the same masks, and a run that goes on needs no state. `is_masked` bool [n, s] is that of the last forward.
    Raises ConfigError now, and DataError from a forward without ids.

        with masksae.mask_inputs(model, p=0.3, token_id=0, seed=0, spare=(1,)):
            trainSAE(...)

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    >>> with mask_inputs(model, p=0.5, token_id=0, seed=0, spare=(1,)) as masks:
    ...     _ = model(torch.tensor([[1, 5, 6, 7, 8, 9]]))
    >>> masks.is_masked.shape, masks.is_masked[0, 0].item()
    (torch.Size([1, 6]), False)
    """

    def __init__(self, model: nn.Module, *, p: float, token_id: int, seed: int, spare=()):
        mask_tokens(torch.zeros(1, 1, dtype=torch.int64), p=p, token_id=token_id, seed=seed)
        self._name = next(iter(inspect.signature(model.forward).parameters), None)
        if self._name not in ("input_ids", "input", "tokens"):
            raise ConfigError(
                f"The first argument of {type(model).__name__}.forward is {self._name}, expected input_ids. Give the language model itself."
            )
        self._keys = {"p": p, "token_id": token_id, "seed": seed}
        self._spare = torch.tensor([*spare], dtype=torch.int64)
        self.is_masked: Tensor | None = None
        self._hook = model.register_forward_pre_hook(self._corrupt, with_kwargs=True)

    def __enter__(self) -> "mask_inputs":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def remove(self) -> None:
        """The model sees its inputs again as they are."""
        self._hook.remove()

    def _corrupt(self, _, args: tuple, kwargs: dict):
        if self._name in kwargs:
            return args, kwargs | {self._name: self.corrupt(kwargs[self._name])}
        if not args:
            raise DataError("The model was called without input ids, so nothing could be masked. Call it with ids.")
        return (self.corrupt(args[0]), *args[1:]), kwargs

    def corrupt(self, ids: Tensor) -> Tensor:
        """The ids [n, s] as the model sees them. Raises DataError."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise DataError(
                f"The model was called with {found}, expected token ids [sequences, tokens]. Tokenise before."
            )
        clean = ids.detach().cpu().long()
        free = ~torch.isin(clean, self._spare)
        corrupted, self.is_masked = clean.clone(), torch.zeros_like(free)
        for row, where in enumerate(free):
            body = clean[row, where][None]
            number = int.from_bytes(hashlib.sha256(body.numpy().tobytes()).digest()[:7])
            corrupted[row, where], self.is_masked[row, where] = mask_tokens(body, first_sequence=number, **self._keys)
        return corrupted.to(ids)
