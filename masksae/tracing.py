"""The language model, driven by nnsight: read the residual stream after a block, or put something else in its place.

`activations` stops the forward right after the hook point, so the later blocks and the unembedding cost nothing. The hook
point is a block number; the list of blocks is found by its length, so Llama, GPT-NeoX and Gemma-2 need no special case.
Only this module imports nnsight. Its overhead over a bare forward hook is measured by `benchmarks/tracing.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from masksae.errors import ConfigError, DataError


def hook_point(model: nn.Module, block: int) -> str:
    """Module path of a decoder block, such as "model.layers.4". Raises ConfigError if the model has no such block."""
    n_blocks = model.config.num_hidden_layers
    paths = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_blocks
    ]
    if not paths:
        raise ConfigError(
            f"{type(model).__name__} has no list of {n_blocks} blocks, so block {block} cannot be found. Use a decoder-only model."
        )
    if not 0 <= block < n_blocks:
        raise ConfigError(
            f"block {block} is outside {type(model).__name__}, whose blocks are numbered 0 to {n_blocks - 1}."
        )
    return f"{paths[0]}.{block}"


@torch.no_grad()
def activations(
    model: nn.Module, ids: Tensor, *, block: int, batch: int = 16, label: str | None = None, cache=None
) -> Tensor:
    """Residual stream after `block`: float [n, s, d] for ids int64 [n, s], on the CPU.

    batch   sequences per forward
    label   if given, a progress bar with this text
    cache   a transformers cache that holds a prefix shared by all sequences; it is copied, never changed
    """
    from tqdm import tqdm

    _check_ids(model, ids)
    traced, path = _traced(model), hook_point(model, block)
    parts = []
    for part in tqdm(ids.split(batch), desc=label, disable=label is None, mininterval=1, unit="batch"):
        inputs = {"input_ids": part.to(model.device), "use_cache": False}
        if cache is not None:
            inputs |= {"past_key_values": _repeat(cache, len(part)), "use_cache": True}
        parts.append(_run_to(traced, path, inputs).cpu())
    return torch.cat(parts)


@torch.no_grad()
def prefix_cache(model: nn.Module, prefix: Tensor, *, block: int):
    """Keys and values of a prefix int64 [1, s] up to `block`, for `activations(cache=...)`."""
    from transformers import DynamicCache

    _check_ids(model, prefix)
    cache = DynamicCache(config=model.config)
    _run_to(
        _traced(model),
        hook_point(model, block),
        {"input_ids": prefix.to(model.device), "past_key_values": cache, "use_cache": True},
    )
    return cache


@torch.no_grad()
def cross_entropy(
    model: nn.Module, ids: Tensor, *, block: int | None = None, replace: Callable[[Tensor], Tensor] | None = None,
    keep_first: bool = False, batch: int = 4, label: str | None = None,
) -> float:  # fmt: skip
    """Mean next-token cross-entropy in nats; with `replace`, after `replace(x [b, s, d])` took the place of the residual stream.

    keep_first  position 0 (BOS) keeps its own activation and its prediction does not count, in every kind of run alike
    """
    from tqdm import tqdm

    _check_ids(model, ids)
    traced, path = _traced(model), None if replace is None else hook_point(model, block)
    first, total, count = int(keep_first), 0.0, 0
    for part in tqdm(ids.split(batch), desc=label, disable=label is None, mininterval=1, unit="batch"):
        part = part.to(model.device)
        logits = _logits(traced, path, part, replace, first)[:, first:-1].float()
        targets = part[:, first + 1 :]
        total += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double().item()
        count += targets.numel()
    return total / count


def _run_to(traced, path: str, inputs: dict) -> Tensor:
    """One forward that stops after the module at `path`; its output."""
    envoy = traced.get(path)
    with traced.trace(**inputs) as tracer:
        output = envoy.output
        output = (output[0] if isinstance(output, tuple) else output).save()
        tracer.stop()
    return output


def _logits(traced, path: str | None, ids: Tensor, replace, first: int) -> Tensor:
    """Logits of a whole forward, with the output of the module at `path` replaced if a path is given."""
    if path is None:
        with traced.trace(input_ids=ids, use_cache=False):
            logits = traced.output.logits.save()
        return logits
    envoy = traced.get(path)
    with traced.trace(input_ids=ids, use_cache=False):
        output = envoy.output
        x = output[0] if isinstance(output, tuple) else output
        new = torch.cat([x[:, :first], replace(x[:, first:]).to(x.dtype)], dim=1)
        envoy.output = (new, *output[1:]) if isinstance(output, tuple) else new
        logits = traced.output.logits.save()
    return logits


def _traced(model: nn.Module):
    from nnsight import NNsight

    return NNsight(model)


def _repeat(cache, n: int):
    """A copy of a one-sequence cache, n times along the batch."""
    import copy

    repeated = copy.deepcopy(cache)
    for layer in repeated.layers:
        if layer.is_initialized:
            layer.batch_repeat_interleave(n)
    return repeated


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise DataError(f"ids must be int64 [sequences, tokens], found {ids.dtype} {tuple(ids.shape)}.")
    vocabulary = model.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise DataError(
            f"Token ids run from {int(ids.min())} to {int(ids.max())}, the model's vocabulary from 0 to {vocabulary - 1}. Tokenise with its own tokenizer."
        )
