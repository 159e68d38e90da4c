"""The language model, driven by nnsight: read the residual stream after a block, or put something else in its place.

`activations` stops the forward right after the hook point, so the later blocks and the unembedding cost nothing. The
hook point is a block number, or the path of any module that gives [batch, tokens, width]; the list of blocks is found
by its length, so no architecture is a special case. Two short cuts, a cached prefix and a forward that starts after
the hook point, do not hold for every architecture: each is tried on the first sequences, compared with the whole
forward, and left out where the two differ or it fails.

Everything here runs in eval mode: a model in the middle of its own training is put back into its mode afterwards.
Only this module imports nnsight. Its overhead over a bare forward hook is measured by `benchmarks/tracing.py`.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masksae import progress
from masksae.errors import ConfigError, DataError


def hook_point(model: nn.Module, block: int | str) -> str:
    """Module path of a decoder block, such as "model.layers.4", or a path as it is. Raises ConfigError if the model has
    no such module."""
    if isinstance(block, str):
        paths = [
            name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList | nn.ModuleDict)
        ]
        if not block or block not in paths:
            raise ConfigError(f"{type(model).__name__} has no module {block!r} that runs.{_similar(block, paths)}")
        return block
    n_blocks = model.config.get_text_config().num_hidden_layers
    paths = _lists(model, n_blocks)
    if not paths:
        raise ConfigError(
            f"{type(model).__name__} has no list of {n_blocks} blocks, so block {block} cannot be found. Use a "
            "decoder-only model."
        )
    if not 0 <= block < n_blocks:
        raise ConfigError(
            f"block {block} is outside {type(model).__name__}, whose blocks are numbered 0 to {n_blocks - 1}."
        )
    return f"{paths[0]}.{block}"


def _lists(model, length: int) -> list[str]:
    """Paths of lists of as many modules; of several, those of the text model: a vision tower may have as many
    blocks."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == length
    }
    for of_text in (_in_decoder, _ran):  # the second asks for a forward, and hardly ever gets its turn
        if len(lists) > 1:
            lists = of_text(model, lists) or lists
    return [*lists]


def _in_decoder(model, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """The outermost of some lists inside the decoder, as far as transformers knows where that is."""
    inside = set(model.get_decoder().modules())
    within = {part for module in lists.values() for child in module for part in child.modules()}
    return {name: module for name, module in lists.items() if module in inside and module not in within}


@torch.no_grad()
def _ran(model, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Those of some lists whose first module runs when the model reads a token."""
    ran = []
    hooks = [module[0].register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, module in lists.items()]
    try:
        with _eval_mode(model):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in lists.items() if name in ran}


def _similar(path: str, paths: list[str]) -> str:
    """The nearest paths, not all of hundreds."""
    import difflib

    near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
    return f" Near it: {', '.join(near)}." if near else " Give a block number, or a path out of print(model)."


def hook_width(model: nn.Module, block: int | str) -> int:
    """Last dimension of `activations`. Raises ConfigError if the module gives no [batch, tokens, width]."""
    if not isinstance(block, str) and model.device.type == "meta":  # a plan; not every block runs without values
        return model.config.get_text_config().hidden_size
    two = torch.zeros(1, 2, dtype=torch.int64)
    return _activations(model, two, block, 1, None, device=model.device).shape[-1]


def activations(
    model: nn.Module, ids: Tensor, *, block: int | str, batch: int = 16, label: str | None = None, device="cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Tensor:  # fmt: skip
    """Residual stream after `block`, or the output of the module at that path: [n, s, d] for ids int64 [n, s].

    batch   sequences per forward
    label   if given, a progress bar with this text
    device  where the result goes, piece by piece
    dtype   of the result; None: the model's own

    Raises DataError for ids that are none of the model's, ConfigError if the hook point gives no [batch, tokens,
    width].
    """
    return _activations(model, ids, block, batch, label, device=device, dtype=dtype)


def activations_after(
    model: nn.Module, prefix: Tensor, ids: Tensor, *, block: int | str, batch: int = 16, label: str | None = None,
) -> Tensor:  # fmt: skip
    """As `activations` of ids int64 [n, s], each after the same prefix int64 [1, p]: float32 [n, s, d].

    The prefix runs once and its keys and values serve all sequences, if the model gives the same that way. Some do
    not: RWKV takes no such cache, and most models with a recurrent state have one that cannot be repeated. They run
    the prefix before each sequence.
    """
    whole = torch.cat([prefix.expand(len(ids), -1), ids], dim=1)
    cache = _prefix_cache(model, prefix, block, ids[:2], whole[:2])
    if cache is not None:
        return _activations(model, ids, block, batch, label, cache=cache)
    return _activations(model, whole, block, batch, label)[:, prefix.shape[1] :]


@torch.no_grad()
def _activations(
    model, ids: Tensor, block: int | str, batch: int, label: str | None, cache=None, device="cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Tensor:  # fmt: skip
    """`activations`; with `cache`, a transformers cache of one sequence, after what it holds. It is copied, not
    changed."""
    check_ids(model, ids)
    traced, path = _traced(model), hook_point(model, block)
    parts = []
    with _eval_mode(model):
        for part in progress.bar(ids.split(batch), label=label, unit="batches"):
            inputs = {"input_ids": part.to(model.device), "use_cache": False}
            if cache is not None:
                inputs |= {"past_key_values": _repeat(cache, len(part)), "use_cache": True}
            parts.append(_run_to(traced, path, inputs).to(device, dtype))
    return torch.cat(parts)


@torch.inference_mode(False)  # with gradients, whatever the caller's mode is
def replacement_effects(
    model: nn.Module, ids: Tensor, positions: Tensor, candidates: Tensor, weights: Tensor, *, block: int | str
) -> Tensor:
    """What replacing a token changes of weighted sums of activations, to first order: float32 [k, n, c].

    The sums are those of `weights` float [k, n, s, d] times the residual stream after `block` for ids int64 [n, s].
    Entry (i, j, v) is the change of sum i of sequence j when its token at positions[j] becomes candidates[v]: the step
    from one embedding to the other times the gradient at the first (HotFlip, Ebrahimi et al., ACL 2018). One forward
    and k backward passes, to the hook point only.

    Raises DataError for ids that are none of the model's.
    """
    check_ids(model, ids)
    check_ids(model, candidates.view(-1, 1))
    embedding, rows = model.get_input_embeddings(), torch.arange(len(ids), device=model.device)
    positions = positions.to(model.device)
    ids = ids.to(model.device).clone()  # one of inference mode cannot be kept for the way back
    with _eval_mode(model):
        embedded, x = _from_embeddings(model, ids, block)
    with torch.no_grad():
        there, here = embedding(candidates.to(model.device)).float(), embedded[rows, positions].float()
    parts = []
    for each in weights:
        [gradient] = torch.autograd.grad(x, embedded, each.to(x.device, x.dtype), retain_graph=True)
        gradient = gradient[rows, positions].float()
        parts.append((gradient @ there.t() - (gradient * here).sum(1, keepdim=True)).cpu())
    return torch.stack(parts)


def _from_embeddings(model, ids: Tensor, block: int | str) -> tuple[Tensor, Tensor]:
    """Embeddings of tokens, and the residual stream after `block` as a function of them."""
    path, embedding = hook_point(model, block), model.get_input_embeddings()
    embeddings = next(name for name, module in model.named_modules() if module is embedding)
    traced = _traced(model)
    with torch.no_grad():
        embedded = embedding(ids)
    embedded.requires_grad_()
    with traced.trace(input_ids=ids, use_cache=False) as tracer:
        traced.get(embeddings).output = embedded
        output = traced.get(path).output.save()
        tracer.stop()
    _drop_stopped()
    return embedded, _check_shape(_first(output), ids, path)


@torch.no_grad()
def _prefix_cache(model, prefix: Tensor, block: int | str, ids: Tensor, whole: Tensor):
    """Keys and values of a prefix [1, p] up to `block`; None if `ids` after it and the `whole` sequences give different
    activations."""
    from transformers import DynamicCache

    expected = _activations(model, whole, block, len(whole), None)[:, prefix.shape[1] :]
    inputs = {"input_ids": prefix.to(model.device), "use_cache": True}
    with contextlib.suppress(Exception):  # every architecture without such a cache fails in a way of its own
        with _eval_mode(model):
            inputs["past_key_values"] = cache = DynamicCache(config=model.config)
            _run_to(_traced(model), hook_point(model, block), inputs)
        if _agree(_activations(model, ids, block, len(ids), None, cache=cache), expected, model.dtype):
            return cache
    return None


def _agree(x: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether all rows [..., d] are the same up to rounding in `dtype`: half of its digits."""
    distance = (x.double() - expected.double()).norm(dim=-1)
    return bool((distance <= torch.finfo(dtype).eps ** 0.5 * expected.double().norm(dim=-1)).all())


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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

    What no replacement changes runs once per batch for all of them: the original forward, the zeros, and the blocks
    up to the hook point, from which every other run starts. Where later blocks want more of the earlier ones than the
    residual stream, all run.

    keep_first  position 0 (BOS) keeps its own activation and its prediction does not count, in every kind of run alike

    Raises DataError for ids that are none of the model's or hold no token to predict.
    """
    check_ids(model, ids)
    first = int(keep_first)
    count = len(ids) * (ids.shape[1] - first - 1)
    if count < 1:
        raise DataError(
            f"Token ids {tuple(ids.shape)} hold no token to predict{' after BOS' * first}. "
            f"Give sequences of {first + 2} tokens or more."
        )
    total = dict.fromkeys(("original", "zero", *replacements), torch.zeros(2, dtype=torch.float64, device=model.device))
    skipping = None
    with progress.bar(total=-(-len(ids) // batch), label=label, unit="batches") as bar, _eval_mode(model):
        for part in ids.to(model.device).split(batch):
            outputs, logits = _whole(model, part, block)
            x = _first(outputs[-1])
            if skipping is None:
                skipping = _can_skip(model, part, block, outputs, logits)
            original = _log_probabilities(logits, first)
            total["original"] = total["original"] + _sums(original, original, part[:, first + 1 :])
            for name, replace in {"zero": torch.zeros_like, **replacements}.items():
                new = torch.cat([x[:, :first], replace(x[:, first:].float()).to(x.dtype)], dim=1)
                resumed = _skipped(model, part, outputs, new, block) if skipping else _replaced(model, part, block, new)
                changed = _log_probabilities(resumed, first)
                total[name] = total[name] + _sums(changed, original, part[:, first + 1 :])
            bar.update()
    return {name: SplicedLoss(*(sums / count).tolist()) for name, sums in total.items()}


def _log_probabilities(logits: Tensor, first: int) -> Tensor:
    return logits[:, first:-1].float().log_softmax(-1)


def _sums(log_p: Tensor, original: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy and KL divergence, summed over positions: float64 [2]."""
    ce = -log_p.gather(-1, targets[..., None]).double().sum()
    kl = (original.exp() * (original - log_p)).sum(-1).double().sum()
    return torch.stack([ce, kl])


def _whole(model, ids: Tensor, block: int | str) -> tuple[list, Tensor]:
    """What each block up to `block` gives, or the module at that path alone, and the logits of a whole forward."""
    traced = _traced(model)
    paths = [hook_point(model, i) for i in ([block] if isinstance(block, str) else range(block + 1))]
    envoys = [traced.get(path) for path in paths]
    with traced.trace(input_ids=ids, use_cache=False):
        outputs = [envoy.output for envoy in envoys].save()  # type: ignore[attr-defined]  # nnsight gives it to lists
        logits = traced.output.logits.save()
    _check_shape(_first(outputs[-1]), ids, paths[-1])
    return outputs, logits


def _can_skip(model, ids: Tensor, block: int | str, outputs: list, logits: Tensor) -> bool:
    """Whether a forward that starts after `block` with what the model has there gives the model's own logits. It does
    not where a later block reads keys of an earlier one."""
    if isinstance(block, str):
        return False
    with contextlib.suppress(Exception):  # what a block misses of a skipped one, it says in its own way
        return _agree(_skipped(model, ids, outputs, _first(outputs[-1]), block), logits, model.dtype)
    return False


def _skipped(model, ids: Tensor, outputs: list, x: Tensor, block) -> Tensor:
    """Logits of a forward that starts after `block` with the residual stream x [b, s, d]; earlier blocks do not run,
    and each stands for x in the form in which it gives its output."""
    traced = _traced(model)
    skipped = [traced.get(hook_point(model, i)) for i in range(block + 1)]
    with traced.trace(input_ids=ids, use_cache=False):
        for envoy, output in zip(skipped, outputs):
            envoy.skip(_with_first(output, x))
        logits = traced.output.logits.save()
    return logits


def _replaced(model, ids: Tensor, block: int | str, x: Tensor) -> Tensor:
    """Logits of a whole forward with x in place of the output at the hook point."""
    traced = _traced(model)
    envoy = traced.get(hook_point(model, block))
    with traced.trace(input_ids=ids, use_cache=False):
        envoy.output = _with_first(envoy.output, x)
        logits = traced.output.logits.save()
    return logits


def _run_to(traced, path: str, inputs: dict) -> Tensor:
    """One forward that stops after the module at `path`; its output [b, s, d]."""
    envoy = traced.get(path)
    with traced.trace(**inputs) as tracer:
        output = envoy.output.save()
        tracer.stop()
    _drop_stopped()
    return _check_shape(_first(output), inputs["input_ids"], path)


def _drop_stopped() -> None:
    """Free what a stopped trace leaves: in nnsight 0.8 a circle of references that holds its activations, and memory of
    a GPU would fill up before the collector, which counts objects, comes by. What was made last takes it .4 ms."""
    gc.collect(0)


def _check_shape(x, ids: Tensor, path: str) -> Tensor:
    """x itself. Raises ConfigError unless it is [batch, tokens, width]."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != ids.shape:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        expected = f"({ids.shape[0]}, {ids.shape[1]}, width)"
        raise ConfigError(
            f"{path} gives {shape} for ids {tuple(ids.shape)}, expected {expected}. Choose another module."
        )
    return x


def _first(output):
    """The residual stream in what a module gives: itself, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output, x: Tensor):
    """What a module gave, with x for the residual stream."""
    if isinstance(output, list):
        return [x, *output[1:]]
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _traced(model: nn.Module):
    from nnsight import NNsight

    return NNsight(model)


def _repeat(cache, n: int):
    """A copy of a one-sequence cache, n times along the batch."""
    repeated = copy.deepcopy(cache)
    for layer in repeated.layers:
        if layer.is_initialized:
            layer.batch_repeat_interleave(n)
    return repeated


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raise DataError for ids that the model cannot read."""
    if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise DataError(f"ids must be int64 [sequences, tokens] and not empty, found {ids.dtype} {tuple(ids.shape)}.")
    vocabulary = model.get_input_embeddings().num_embeddings
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise DataError(
            f"Token ids run from {int(ids.min())} to {int(ids.max())}, the model's vocabulary from 0 to "
            f"{vocabulary - 1}. Tokenise with its own tokenizer."
        )
    check_length(model, ids.shape[1])


def check_length(model: nn.Module, length: int) -> None:
    """Raise DataError for sequences that are longer than the model's table of positions. One that computes positions
    has none, and reads on beyond its `max_position_embeddings`."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or length <= most:
        return
    words = model.get_input_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    tables += [buffer for buffer in model.buffers() if buffer.ndim == 2]
    if any(len(table) - most in (0, 2) for table in tables):  # OPT's has two more
        raise DataError(
            f"Sequences of {length} tokens are longer than the {most} positions of {type(model).__name__}. Make "
            f"shorter ones (text.block_length: {most} at most)."
        )
