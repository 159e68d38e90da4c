"""The language model, driven by nnsight: read the residual stream after a block, or put something else in its place.

`activations` stops the forward right after the hook point, so the later blocks and the unembedding cost nothing. The hook
point is a block number, or the path of any module that gives [batch, tokens, width]; the list of blocks is found by its length, so
Llama, GPT-NeoX and Gemma-2 need no special case.
Only this module imports nnsight. Its overhead over a bare forward hook is measured by `benchmarks/tracing.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masksae import progress
from masksae.errors import ConfigError, DataError


def hook_point(model: nn.Module, block: int | str) -> str:
    """Module path of a decoder block, such as "model.layers.4", or a path as it is. Raises ConfigError if the model has no such module."""
    if isinstance(block, str):
        paths = [
            name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList | nn.ModuleDict)
        ]
        if not block or block not in paths:
            raise ConfigError(f"{type(model).__name__} has no module {block!r} that runs.{_similar(block, paths)}")
        return block
    n_blocks = model.config.get_text_config().num_hidden_layers
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


def _similar(path: str, paths: list[str]) -> str:
    """The nearest paths, not all of hundreds."""
    import difflib

    near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
    return f" Near it: {', '.join(near)}." if near else " Give a block number, or a path out of print(model)."


def hook_width(model: nn.Module, block: int | str) -> int:
    """Last dimension of `activations`. Raises ConfigError if the module gives no [batch, tokens, width]."""
    if not isinstance(block, str):
        return model.config.get_text_config().hidden_size
    ids = torch.zeros(1, 2, dtype=torch.int64)
    found = _run_to(_traced(model), hook_point(model, block), {"input_ids": ids.to(model.device), "use_cache": False})
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != (1, 2):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"{block} gives {shape} for two tokens, expected (1, 2, width). Choose another module.")
    return found.shape[-1]


@torch.no_grad()
def activations(
    model: nn.Module, ids: Tensor, *, block: int | str, batch: int = 16, label: str | None = None, cache=None, device="cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Tensor:  # fmt: skip
    """Residual stream after `block`, or the output of the module at that path: [n, s, d] for ids int64 [n, s].

    batch   sequences per forward
    device  where the result goes, piece by piece
    dtype   of the result; None: the model's own
    label   if given, a progress bar with this text
    cache   a transformers cache that holds a prefix shared by all sequences; it is copied, never changed
    """
    _check_ids(model, ids)
    traced, path = _traced(model), hook_point(model, block)
    parts = []
    for part in progress.bar(ids.split(batch), label=label, unit="batches"):
        inputs = {"input_ids": part.to(model.device), "use_cache": False}
        if cache is not None:
            inputs |= {"past_key_values": _repeat(cache, len(part)), "use_cache": True}
        parts.append(_run_to(traced, path, inputs).to(device, dtype))
    return torch.cat(parts)


@torch.no_grad()
def prefix_cache(model: nn.Module, prefix: Tensor, *, block: int | str):
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


@dataclass(frozen=True)
class SplicedLoss:
    """What the model makes of other activations at the hook point, in nats per token."""

    ce: float
    """Mean next-token cross-entropy."""
    kl: float
    """Mean KL divergence of the next token's distribution from that of the model as it is."""


@torch.no_grad()
def spliced_losses(
    model: nn.Module, ids: Tensor, replacements: Mapping[str, Callable[[Tensor], Tensor]], *, block: int | str,
    keep_first: bool = False, batch: int = 4, label: str | None = None,
) -> dict[str, SplicedLoss]:  # fmt: skip
    """Losses of the model as it is ("original"), with zeros for the residual stream after `block` ("zero"), and with
    `replace(x [b, s, d])` in its place for each of `replacements`.

    What no replacement changes runs once per batch for all of them: the original forward, the zeros, and the blocks up to the hook
    point, from which every other run starts.

    keep_first  position 0 (BOS) keeps its own activation and its prediction does not count, in every kind of run alike
    """
    _check_ids(model, ids)
    first = int(keep_first)
    total = dict.fromkeys(("original", "zero", *replacements), torch.zeros(2, dtype=torch.float64, device=model.device))
    with progress.bar(total=-(-len(ids) // batch), label=label, unit="batches") as bar:
        for part in ids.to(model.device).split(batch):
            x, logits = _whole(model, part, block)
            original = _log_probabilities(logits, first)
            total["original"] = total["original"] + _sums(original, original, part[:, first + 1 :])
            for name, replace in {"zero": torch.zeros_like, **replacements}.items():
                new = torch.cat([x[:, :first], replace(x[:, first:].float()).to(x.dtype)], dim=1)
                changed = _log_probabilities(_resumed(model, part, block, new), first)
                total[name] = total[name] + _sums(changed, original, part[:, first + 1 :])
            bar.update()
    count = len(ids) * (ids.shape[1] - first - 1)
    return {name: SplicedLoss(*(sums / count).tolist()) for name, sums in total.items()}


def _log_probabilities(logits: Tensor, first: int) -> Tensor:
    return logits[:, first:-1].float().log_softmax(-1)


def _sums(log_p: Tensor, original: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy and KL divergence, summed over positions: float64 [2]."""
    ce = -log_p.gather(-1, targets[..., None]).double().sum()
    kl = (original.exp() * (original - log_p)).sum(-1).double().sum()
    return torch.stack([ce, kl])


def _whole(model, ids: Tensor, block: int | str) -> tuple[Tensor, Tensor]:
    """The residual stream after `block` and the logits of a whole forward."""
    traced = _traced(model)
    envoy = traced.get(hook_point(model, block))
    with traced.trace(input_ids=ids, use_cache=False):
        output = envoy.output
        x = (output[0] if isinstance(output, tuple) else output).save()
        logits = traced.output.logits.save()
    return x, logits


def _resumed(model, ids: Tensor, block: int | str, x: Tensor) -> Tensor:
    """Logits of a forward that starts after `block` with the residual stream x [b, s, d]; earlier blocks do not run. Of a hook point
    by path: of a whole forward with x in place of the module's output."""
    traced = _traced(model)
    if isinstance(block, str):
        envoy = traced.get(hook_point(model, block))
        with traced.trace(input_ids=ids, use_cache=False):
            output = envoy.output
            envoy.output = (x, *output[1:]) if isinstance(output, tuple) else x
            logits = traced.output.logits.save()
        return logits
    skipped = [traced.get(hook_point(model, i)) for i in range(block + 1)]
    with traced.trace(input_ids=ids, use_cache=False):
        for envoy in skipped:
            envoy.skip(x)
        logits = traced.output.logits.save()
    return logits


def _run_to(traced, path: str, inputs: dict) -> Tensor:
    """One forward that stops after the module at `path`; its output."""
    envoy = traced.get(path)
    with traced.trace(**inputs) as tracer:
        output = envoy.output
        output = (output[0] if isinstance(output, tuple) else output).save()
        tracer.stop()
    return output


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
