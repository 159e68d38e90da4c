"""Masked regularisation for people who stay with their own trainer: corrupt the tokens, and let everything else be.

Three places where tokens can be corrupted, from the tidiest to the most general:

    mask_dataset        token blocks in a data set          SAELens' pre-tokenised data sets
    activation_batches  batches of activations              trainSAE of dictionary_learning, SAETrainer of SAELens
    mask_inputs         the ids that reach a model          any trainer that runs a model, ActivationBuffer of
                        dictionary_learning too

Neither library is imported here. `tests/peers/test_peers_plugins.py` trains both on a small model and compares the
activations.
"""

import functools
import hashlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from masksae.activations import ActivationStream
from masksae.errors import ConfigError, DataError, OutputError, nearest
from masksae.files import run_id
from masksae.masking import mask_tokens
from masksae.provenance import code_id


def mask_dataset(dataset, *, p: float, token_id: int, seed: int, spare=(), column: str = "input_ids"):
    """A data set of token blocks with p of the tokens replaced, and a new column `is_masked` beside them.

    dataset   `datasets.Dataset` or `IterableDataset`, one block of token ids a row, of any length
    p, token_id, seed, spare
              as in `mask_tokens`; give BOS and padding as spare
    column    of the ids; it keeps its name

    Row i of a `Dataset` gets mask number i, as in `mask_tokens`: mask the whole, then split or shuffle. It is written
    to its cache once, since trainers that set a format of their own (SAELens does) would silently take a transform off
    again.

    A stream (`IterableDataset`) stays lazy. Its rows have no numbers that hold for every node and worker, so a row's
    mask depends on the seed and on its own tokens, as in `mask_inputs`: the same masks however it is sharded, split by
    node, shuffled or loaded, in every epoch. Two equal rows get equal masks. For fresh masks in another epoch, mask the
    clean stream again with another seed.

    SAELens takes the result as it is (`override_dataset=`), and leaves masked positions out of training with
    `exclude_special_tokens=[token_id]`. Raises ConfigError, DataError, OutputError.

    >>> import datasets
    >>> blocks = datasets.Dataset.from_dict({"input_ids": [[1, 5, 6, 7, 8, 9]]})
    >>> mask_dataset(blocks, p=0.5, token_id=0, seed=4, spare=(1,))[0]
    {'input_ids': [1, 0, 6, 0, 0, 9], 'is_masked': [False, True, False, True, True, False]}
    """
    import datasets

    keys = _checked(p, token_id, seed, spare)
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ConfigError(
            f"mask_dataset takes a datasets.Dataset or IterableDataset, found {type(dataset).__name__}. "
            f"Choose a split of a DatasetDict; make one of lists with datasets.Dataset.from_dict({{{column!r}: rows}})."
        )
    lazy = isinstance(dataset, datasets.IterableDataset)
    if not lazy and dataset.format["type"] == "custom":
        raise ConfigError("The data set has a transform, which would run over the masked rows. Use map in its place.")
    _check_column(dataset, column, keys["token_id"])
    rows = functools.partial(_mask_rows, column=column, keys=keys)
    if lazy:
        return dataset.map(rows, batched=True)
    key = [dataset._fingerprint, column, keys, code_id("plugins")]
    features = datasets.Features(dataset.features | {"is_masked": datasets.Sequence(datasets.Value("bool"))})
    try:
        return dataset.map(rows, with_indices=True, batched=True, features=features, new_fingerprint=run_id(key))
    except OSError as error:
        raise OutputError(
            f"The masked rows cannot be written beside the data set ({error}). Free space there, or keep them in a "
            "temporary folder with datasets.disable_caching()."
        ) from error


def _checked(p, token_id, seed, spare, vocab_size: int | None = None) -> dict:
    """The arguments of `mask_tokens` as numbers of Python, whoever's they were, refused now and not in the middle.
    Raises ConfigError."""
    spare = spare.tolist() if isinstance(spare, (np.ndarray, Tensor)) else spare
    spare = [_plain(kept) for kept in spare] if isinstance(spare, Iterable) else spare
    if not isinstance(spare, list) or not all(type(kept) is int for kept in spare):
        raise ConfigError(
            f"spare must be a list of token ids, found {spare!r}. A tokenizer without a BOS token gives None: leave it "
            "out."
        )
    keys = {"p": _plain(p), "token_id": _plain(token_id), "seed": _plain(seed)}
    mask_tokens(torch.zeros(1, 1, dtype=torch.int64), **keys, vocab_size=vocab_size)
    return keys | {"spare": spare}


def _plain(number):
    """A number of NumPy or PyTorch as one of Python: it becomes part of the name of a cache."""
    return number.item() if isinstance(number, (np.generic, Tensor)) and number.ndim == 0 else number


def _check_column(dataset, column: str, token_id: int) -> None:
    """Raise ConfigError or DataError for a data set that cannot be masked."""
    import datasets

    features, first = dataset.features, None
    if not (features and isinstance(dataset, datasets.IterableDataset)):  # a stream that knows its columns is not begun
        first = next(iter(dataset), None)
        if first is None:
            raise DataError("The data set has no rows, so there is nothing to mask. Look at the filters before.")
    names = list(features or first)
    if column not in names:
        raise ConfigError(
            f"The data set has no column {column!r}.{nearest(column, names)} Text must be cut into token blocks first."
        )
    if "is_masked" in names:
        raise ConfigError("The data set has a column 'is_masked': it is masked already. Give the clean one.")
    if not features:
        _row(first[column], column)
        return
    kind = str(getattr(getattr(features[column], "feature", None), "dtype", None))
    if not kind.startswith(("int", "uint")):
        raise DataError(f"Column {column!r} must hold lists of token ids (integers), found {features[column]}.")
    if token_id > np.iinfo(kind).max:
        raise ConfigError(
            f"token_id {token_id} does not fit into column {column!r} of {kind}. Cast it to int64 before."
        )


def _mask_rows(batch: Mapping, numbers: list[int] | None = None, *, column: str, keys: dict) -> dict:
    """Masked rows of a batch, each by its number, or by its content."""
    if numbers is None and not isinstance(batch, Mapping):
        raise ConfigError(f"The stream gives {type(batch).__name__}, not rows. Mask it first, and then set its format.")
    rows = [_row(ids, column) for ids in batch[column]]
    if numbers is None:
        masked = [_mask_by_content(ids, keys) for ids in rows]
    else:
        masked = [
            tuple(part[0] for part in mask_tokens(ids[None], first_sequence=number, **keys))
            for ids, number in zip(rows, numbers, strict=True)
        ]
    return {column: [ids.tolist() for ids, _ in masked], "is_masked": [where.tolist() for _, where in masked]}


def _row(ids, column: str) -> Tensor:
    """Token ids int64 [s] of a row. Raises DataError."""
    try:
        found = torch.as_tensor(ids.as_py() if hasattr(ids, "as_py") else ids)  # as_py: of a data set in Arrow's format
        good = found.ndim == 1 and (_is_integer(found) or len(found) == 0)
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise DataError(f"Column {column!r} must hold lists of token ids (integers), found {str(ids)[:40]!r}.")
    return found.long()


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _mask_by_content(ids: Tensor, keys: dict, vocab_size: int | None = None) -> tuple[Tensor, Tensor]:
    """(corrupted ids, is_masked) of one sequence int64 [s]; the number of its mask is a hash of the tokens that are not
    spare."""
    free = ~torch.isin(ids, torch.tensor(keys["spare"], dtype=torch.int64))
    body = ids[free][None]
    number = int.from_bytes(hashlib.sha256(body.numpy().tobytes()).digest()[:7])
    corrupted, is_masked = ids.clone(), torch.zeros_like(free)
    corrupted[free], is_masked[free] = mask_tokens(body, first_sequence=number, vocab_size=vocab_size, **keys)
    return corrupted, is_masked


def activation_batches(stream: ActivationStream, *, drop_masked: bool = False) -> Iterator[Tensor]:
    """Batches of activations float32 [batch_size, d] without end: what `trainSAE(data=...)` of dictionary_learning and
    `SAETrainer(data_provider=...)` of SAELens ask for. Make the stream with `masksae.activations.from_model`.

    drop_masked  leave masked positions out; batches stay full

    Raises ConfigError now, and what the stream raises later.

    >>> x = torch.arange(8.0)[:, None]
    >>> stream = ActivationStream.from_array(x, batch_size=4, seed=0, is_masked=x[:, 0] > 3)
    >>> sorted(next(activation_batches(stream, drop_masked=True))[:, 0].tolist())
    [0.0, 1.0, 2.0, 3.0]
    """
    if not isinstance(stream, ActivationStream):
        raise ConfigError(
            f"activation_batches takes an ActivationStream, found {type(stream).__name__}. Make one with "
            "masksae.activations.from_model, or of an array with ActivationStream.from_array."
        )
    return (views[0][0] for views in stream.batches([(stream.seed, drop_masked)]))


class mask_inputs:
    """Replace p of the tokens that reach a model, until `remove()` or the end of a `with` block; evaluate outside of
    it.

    model     a transformers model (also inside nnsight's or SAELens' wrappers), or a HookedTransformer: a module whose
              forward takes ids int [n, s] first, and the one that is called: masks on `model` do not reach ids that go
              to `model.model`
    p, token_id, seed, spare
              as in `mask_tokens`; give BOS and padding as spare

    A sequence's mask depends on the seed and on its own tokens (those that are not spare), not on when it comes, on the
    batch, or on padding: every epoch sees the same masks (another seed gives others), and a run that goes on needs no
    state. `is_masked` bool [n, s] is that of the last forward, on the device of the ids.

    Raises ConfigError now, also for a model that is masked already. A forward without ids raises DataError, and so does
    one that goes past the masks, and a block that ends without a forward: what was trained in it saw clean text.

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
        self._model = type(model).__name__
        if not isinstance(model, nn.Module):
            raise ConfigError(f"mask_inputs takes the torch module that runs, found {self._model}. Give what it wraps.")
        # of the class, since nnsight and others put a function of their own in place of an instance's forward
        self._name = next(iter([*inspect.signature(type(model).forward).parameters][1:]), None)
        if self._name not in ("input_ids", "input", "tokens"):
            raise ConfigError(
                f"The first argument of {self._model}.forward is {self._name}, expected input_ids. Give the language "
                "model itself."
            )
        embedding, self._vocab_size = _embedding(model)
        self._keys = _checked(p, token_id, seed, spare, self._vocab_size)
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), mask_inputs) for hook in hooks):
            raise ConfigError(
                f"{self._model} is masked already, and would be twice. Call remove() of the masks before."
            )
        self.is_masked: Tensor | None = None
        self._inside: set[int] = set()  # threads that are in a forward of the model
        self._hooks = [
            model.register_forward_pre_hook(self._corrupt, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        if embedding is not None:
            self._hooks.append(embedding.register_forward_pre_hook(self._guard))

    def __enter__(self) -> "mask_inputs":
        if not self._hooks:
            raise ConfigError(f"These masks were removed from {self._model} already. Make new ones for another block.")
        return self

    def __exit__(self, error, *_) -> None:
        self.remove()
        if error is None and self.is_masked is None:
            raise DataError(
                f"No forward of {self._model} came while its inputs were to be masked: whatever was trained saw "
                "clean text. Run the model inside the block, and give mask_inputs the module that is called."
            )

    def remove(self) -> None:
        """The model sees its inputs again as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _corrupt(self, _, args: tuple, kwargs: dict):
        if self._name not in kwargs and not args:
            raise DataError("The model was called without input ids, so nothing could be masked. Call it with ids.")
        self._inside.add(threading.get_ident())
        if self._name in kwargs:
            return args, kwargs | {self._name: self.corrupt(kwargs[self._name])}
        return (self.corrupt(args[0]), *args[1:]), kwargs

    def _leave(self, *_) -> None:
        self._inside.discard(threading.get_ident())

    def _guard(self, *_) -> None:
        if threading.get_ident() not in self._inside:
            raise DataError(
                f"Ids reached the embedding of {self._model} past its own forward, and so unmasked. Call the model "
                "itself, or give mask_inputs the part of it that is called."
            )

    def corrupt(self, ids: Tensor) -> Tensor:
        """The ids [n, s] as the model sees them, on their device and of their type. Raises DataError."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not _is_integer(ids):
            found = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise DataError(
                f"The model was called with {found}, expected token ids [sequences, tokens]. Tokenise before."
            )
        if self._keys["token_id"] > torch.iinfo(ids.dtype).max:
            raise DataError(f"token_id {self._keys['token_id']} does not fit into ids of {ids.dtype}. Give int64.")
        if ids.is_meta or isinstance(ids, FakeTensor):  # shapes alone, as in nnsight's scan: no token to replace
            self.is_masked = torch.zeros_like(ids, dtype=torch.bool)
            return ids
        clean = ids.detach().cpu().long()
        corrupted, is_masked = clean.clone(), torch.zeros(clean.shape, dtype=torch.bool)
        for row, sequence in enumerate(clean):
            corrupted[row], is_masked[row] = _mask_by_content(sequence, self._keys, self._vocab_size)
        self.is_masked = is_masked.to(ids.device)
        return corrupted.to(ids)


def _embedding(model: nn.Module) -> tuple[nn.Module | None, int | None]:
    """Module that reads a model's ids, of transformers or TransformerLens, and the size of the vocabulary; None where a
    model does not say."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embed
    except (AttributeError, NotImplementedError):
        embedding = None
    embedding = embedding if isinstance(embedding, nn.Module) else None
    return embedding, getattr(embedding, "num_embeddings", getattr(getattr(model, "cfg", None), "d_vocab", None))
