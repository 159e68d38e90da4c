"""Tracing agrees with plain hooks on Llama, GPT-NeoX and Gemma-2 blocks."""

import pytest
import torch
from torch import nn

from masksae.errors import ConfigError, DataError
from masksae.tracing import activations, cross_entropy, hook_point, prefix_cache


def hooked(model, ids, block):
    """The residual stream after a block, by a bare forward hook."""
    got = []
    module = model.get_submodule(hook_point(model, block))
    handle = module.register_forward_hook(lambda m, i, o: got.append(o[0] if isinstance(o, tuple) else o))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return got[0]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_activations_equal_a_forward_hook(model, ids, block):
    assert torch.equal(activations(model, ids, block=block, batch=12), hooked(model, ids, block))
    assert torch.allclose(activations(model, ids, block=block, batch=5), hooked(model, ids, block), atol=1e-6)


def test_later_blocks_do_not_run(model, ids):
    ran = []
    last = model.get_submodule(hook_point(model, 2))
    handle = last.register_forward_pre_hook(lambda *_: ran.append(1))
    activations(model, ids, block=1)
    assert not ran
    activations(model, ids, block=2)
    handle.remove()
    assert ran


def test_prefix_cache_equals_the_whole_prompt(model, ids):
    prefix, words = ids[:1, :7], ids[:, 7:8]
    cache = prefix_cache(model, prefix, block=1)
    for _ in range(2):  # the cache must not grow
        fast = activations(model, words, block=1, batch=5, cache=cache)[:, 0]
        assert torch.allclose(
            fast, hooked(model, torch.cat([prefix.expand(len(ids), -1), words], 1), 1)[:, -1], atol=1e-5
        )


def test_cross_entropy_equals_the_models_own_loss(model, ids):
    assert cross_entropy(model, ids, batch=5) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_splicing_the_identity_changes_nothing_and_zero_equals_a_zeroing_hook(model, ids):
    plain = cross_entropy(model, ids)
    assert cross_entropy(model, ids, block=1, replace=lambda x: x) == pytest.approx(plain, rel=1e-6)
    module = model.get_submodule(hook_point(model, 1))
    handle = module.register_forward_hook(lambda m, i, o: (o[0] * 0, *o[1:]) if isinstance(o, tuple) else o * 0)
    expected = model(input_ids=ids, labels=ids).loss.item()
    handle.remove()
    assert cross_entropy(model, ids, block=1, replace=torch.zeros_like) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(plain, rel=1e-3)


def test_keep_first_spares_the_first_position_and_its_prediction(model, ids):
    seen = []
    kept = cross_entropy(model, ids, block=1, replace=lambda x: seen.append(x.shape) or x, keep_first=True, batch=12)
    assert seen == [(12, 8, 16)]
    logits = model(input_ids=ids).logits[:, 1:-1]
    assert kept == pytest.approx(
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()).item(), rel=1e-5
    )


@pytest.mark.parametrize("block", [-1, 3, 99])
def test_hook_point_outside_the_model(model, ids, block):
    with pytest.raises(ConfigError, match="numbered 0 to 2"):
        activations(model, ids, block=block)


@pytest.mark.parametrize(
    "bad, words",
    [(torch.tensor([[500]]), "500"), (torch.tensor([[1.0]]), "float32"), (torch.tensor([1]), "sequences, tokens")],
)
def test_bad_ids(model, bad, words):
    with pytest.raises(DataError, match=words):
        activations(model, bad, block=0)
