"""Tracing agrees with plain hooks on Llama, GPT-NeoX and Gemma-2 blocks."""

import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_project import tiny_model
from torch import nn

from masksae.activations import from_model
from masksae.errors import ConfigError, DataError
from masksae.tracing import (
    activations,
    activations_after,
    hook_point,
    hook_width,
    replacement_effects,
    spliced_losses,
)


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


def test_activations_after_a_prefix_equal_the_whole_prompts(model, ids):
    """Over several batches, so that a cache that grows would be seen; the prefix itself runs once."""
    prefix, words = ids[:1, :6], ids[:, 6:8]
    lengths, block = [], model.get_submodule(hook_point(model, 0))
    handle = block.register_forward_pre_hook(lambda m, inputs: lengths.append(inputs[0].shape[1]))
    after = activations_after(model, prefix, words, block=1, batch=5)
    handle.remove()
    assert lengths == [8, 6, 2, 2, 2, 2]  # the comparison, the prefix, the comparison, three batches
    whole = hooked(model, torch.cat([prefix.expand(len(ids), -1), words], 1), 1)
    assert torch.allclose(after, whole[:, 6:], atol=1e-5)


def with_hook(model, ids, block, change):
    """Logits with the output of a block changed by a bare forward hook, all blocks run."""
    module = model.get_submodule(hook_point(model, block))
    hook = lambda m, i, o: (change(o[0]), *o[1:]) if isinstance(o, tuple) else change(o)
    handle = module.register_forward_hook(hook)
    logits = model(input_ids=ids).logits
    handle.remove()
    return logits


def cross_entropy(logits, ids, first=0):
    return nn.functional.cross_entropy(logits[:, first:-1].flatten(0, 1), ids[:, first + 1 :].flatten()).item()


def test_spliced_losses_equal_the_models_own_and_those_of_a_hook(model, ids):
    noise = torch.randn(12, 9, 16, generator=torch.Generator().manual_seed(0))
    losses = spliced_losses(model, ids, {"same": lambda x: x, "noise": lambda x: x + noise}, block=1, batch=12)
    plain = model(input_ids=ids, labels=ids)
    assert losses["original"].ce == pytest.approx(plain.loss.item(), rel=1e-5) and losses["original"].kl == 0
    assert losses["same"].ce == pytest.approx(losses["original"].ce, rel=1e-6)
    assert losses["same"].kl == pytest.approx(0, abs=1e-6)
    expected = with_hook(model, ids, 1, lambda x: x * 0)
    assert losses["zero"].ce == pytest.approx(cross_entropy(expected, ids), rel=1e-5)
    assert losses["zero"].ce != pytest.approx(losses["original"].ce, rel=1e-3)
    changed = with_hook(model, ids, 1, lambda x: x + noise)
    kl = nn.functional.kl_div(
        changed.log_softmax(-1)[:, :-1].flatten(0, 1), plain.logits.log_softmax(-1)[:, :-1].flatten(0, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    assert losses["noise"].ce == pytest.approx(cross_entropy(changed, ids), rel=1e-5)
    assert losses["noise"].kl == pytest.approx(kl.item(), rel=1e-4) and kl > 0.001


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_spliced_run_starts_after_the_hook_point(model, ids, block):
    """Every block up to the hook point runs once, for the original; the later ones run once more for each
    replacement, and once to see whether that may be."""
    ran = [0] * 3
    for i in range(3):
        count = lambda *_, i=i: ran.__setitem__(i, ran[i] + 1)
        model.get_submodule(hook_point(model, i)).mlp.register_forward_pre_hook(count)
    spliced_losses(model, ids, {"same": lambda x: x}, block=block, batch=12)
    assert ran == [1 if i <= block else 4 for i in range(3)]


def test_splicing_does_not_depend_on_the_batch(model, ids):
    once, often = (spliced_losses(model, ids, {"half": lambda x: x / 2}, block=1, batch=b) for b in (12, 5))
    assert once["half"].ce == pytest.approx(often["half"].ce, rel=1e-6)
    assert once["half"].kl == pytest.approx(often["half"].kl, rel=1e-4)


def test_keep_first_spares_the_first_position_and_its_prediction(model, ids):
    seen = []
    replace = {"same": lambda x: seen.append(x.shape) or x}
    losses = spliced_losses(model, ids, replace, block=1, keep_first=True, batch=12)
    assert seen == [(12, 8, 16)]
    assert losses["same"].ce == pytest.approx(cross_entropy(model(input_ids=ids).logits, ids, first=1), rel=1e-5)


@pytest.mark.parametrize("block", [-1, 3, 99])
def test_hook_point_outside_the_model(model, ids, block):
    with pytest.raises(ConfigError, match="numbered 0 to 2"):
        activations(model, ids, block=block)


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.tensor([[500]]), "500"),
        (torch.tensor([[1.0]]), "float32"),
        (torch.tensor([1]), "sequences, tokens"),
        (torch.zeros(0, 9, dtype=torch.int64), r"not empty, found torch.int64 \(0, 9\)"),
    ],
)
def test_bad_ids(model, bad, words):
    with pytest.raises(DataError, match=words):
        activations(model, bad, block=0)


@pytest.fixture
def mlp(model):
    return f"{hook_point(model, 1)}.mlp"


def test_a_module_path_is_a_hook_point_too(model, ids, mlp):
    assert torch.equal(activations(model, ids, block=mlp, batch=12), hooked(model, ids, mlp))
    assert torch.equal(activations(model, ids, block=hook_point(model, 1)), activations(model, ids, block=1))
    whole = hooked(model, torch.cat([ids[:1, :7].expand(12, -1), ids[:, 7:8]], 1), mlp)[:, -1]
    assert torch.allclose(activations_after(model, ids[:1, :7], ids[:, 7:8], block=mlp)[:, 0], whole, atol=1e-5)
    wide = next(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.out_features == 32
    )
    assert hook_width(model, wide) == 32 and hook_width(model, mlp) == hook_width(model, 2) == 16


def test_splicing_at_a_module_path_equals_a_hook(model, ids, mlp):
    losses = spliced_losses(model, ids, {"half": lambda x: x / 2}, block=mlp, batch=12)
    assert losses["half"].ce == pytest.approx(cross_entropy(with_hook(model, ids, mlp, lambda x: x / 2), ids), rel=1e-5)
    assert losses["half"].kl > 0
    assert losses["zero"].ce == pytest.approx(cross_entropy(with_hook(model, ids, mlp, lambda x: x * 0), ids), rel=1e-5)


class Flat(nn.Module):
    def forward(self, x):
        return x[0]


def test_a_path_that_is_no_module_or_gives_no_tokens(model, mlp):
    with pytest.raises(ConfigError, match="has no module .*Near it: .*mlp"):
        hook_point(model, mlp.replace("mlp", "mpl"))
    with pytest.raises(ConfigError, match="has no module .* that runs"):
        hook_width(model, hook_point(model, 0).removesuffix(".0"))  # the list of blocks
    model.get_submodule(hook_point(model, 1)).mlp = Flat()
    with pytest.raises(ConfigError, match=r"gives \(2, 16\) for ids \(1, 2\), expected \(1, 2, width\)"):
        hook_width(model, mlp)


def test_a_model_in_training_mode_gives_what_it_gives_in_eval_mode(ids):
    """Dropout would be noise in the activations; every module gets its own mode back, also after an error."""
    import transformers as tr

    torch.manual_seed(0)
    config = tr.GPT2Config(
        vocab_size=128, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = tr.AutoModelForCausalLM.from_config(config).eval()
    x, after = activations(model, ids, block=1), activations_after(model, ids[:1], ids, block=1)
    losses = spliced_losses(model, ids, {"half": lambda x: x / 2}, block=1)
    model.train()
    model.transformer.h[0].eval()  # frozen by its trainer
    state = torch.get_rng_state()
    assert torch.equal(activations(model, ids, block=1), x)
    assert torch.equal(activations_after(model, ids[:1], ids, block=1), after)
    assert spliced_losses(model, ids, {"half": lambda x: x / 2}, block=1) == losses and hook_width(model, 1) == 16
    with pytest.raises(ZeroDivisionError):
        spliced_losses(model, ids, {"broken": lambda x: x / (1 // 0)}, block=1)
    assert torch.equal(torch.get_rng_state(), state)
    frozen = set(model.transformer.h[0].modules())
    assert all(module.training == (module not in frozen) for module in model.modules())


@pytest.mark.parametrize("shape, keep_first, words", [((3, 1), False, "of 2 tokens"), ((3, 2), True, "of 3 tokens")])
def test_ids_without_a_token_to_predict(model, shape, keep_first, words):
    with pytest.raises(DataError, match=f"no token to predict.*{words}"):
        spliced_losses(model, torch.full(shape, 5), {}, block=1, keep_first=keep_first)


def test_effects_of_replacements_are_the_slope_of_finite_differences(model, ids):
    """A hundredth of the way from one embedding to the other changes the sums by a hundredth of the effect."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 12, 9, 16, generator=generator)
    positions, candidates = torch.randint(0, 8, (12,), generator=generator), torch.tensor([3, 70, 127])
    effects = replacement_effects(model, ids, positions, candidates, weights, block=1)
    model.double()  # differences of float32 would be noise
    embedding = model.get_input_embeddings()
    for v, token in enumerate(candidates):
        sums = []
        for way in (0.01, -0.01):
            here, there = (embedding.weight.detach()[each] for each in (ids[torch.arange(12), positions], token))
            scale = embedding(token).norm() / embedding.weight[token].norm()  # Gemma's grow on the way
            embedded = embedding(ids).detach()
            embedded[torch.arange(12), positions] += way * (there - here) * scale
            handle = embedding.register_forward_hook(lambda m, i, o, embedded=embedded: embedded)
            sums.append((hooked(model, ids, 1) * weights).sum((2, 3)))
            handle.remove()
        slope = (sums[0] - sums[1]) / 0.02
        torch.testing.assert_close(effects[:, :, v].double(), slope, rtol=1e-3, atol=1e-3)


def test_only_the_replaced_position_has_an_effect(model, ids):
    """Weights before a position see nothing of it in a causal model; a token in its own place changes nothing."""
    weights = torch.zeros(1, 12, 9, 16)
    weights[:, :, :4] = 1
    at = torch.full((12,), 4)
    assert not replacement_effects(model, ids, at, torch.tensor([5, 6]), weights, block=2).any()
    own = replacement_effects(model, ids[:1], at[:1] - 2, ids[0, 2:4], weights[:, :1], block=2)
    assert own[0, 0, 0].abs() < 1e-5 < own[0, 0, 1].abs()


def live_tensors():
    """Of this process; what the collector has not seen yet counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked what they are
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def test_stopped_traces_leave_nothing_alive(ids):
    """Without the collector, which may come by late: nnsight's circles of references would keep 8 tensors a trace."""
    model = tiny_model("llama")
    options = dict(positions=torch.zeros(12).long(), candidates=ids[0, :3], weights=torch.ones(1, 12, 9, 16), block=1)
    for trace in (lambda: activations(model, ids, block=1), lambda: replacement_effects(model, ids, **options)):
        trace()
        gc.collect()
        gc.disable()
        try:
            before = live_tensors()
            for _ in range(20):
                trace()
            assert live_tensors() <= before + 2
        finally:
            gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_effects_of_replacements_in_any_mode(model, mode):
    def effects():
        ids = torch.randint(2, 128, (4, 9), generator=torch.Generator().manual_seed(0))
        weights = torch.randn(2, 4, 9, 16, generator=torch.Generator().manual_seed(1))
        return replacement_effects(model, ids, ids[:, 0] % 9, ids[0, :3], weights, block=1)

    expected = effects()
    model.requires_grad_(True)
    with mode():
        assert torch.equal(effects(), expected)


def test_sequences_longer_than_the_table_of_positions_are_refused():
    """Some tables are longer than the model says, and models that compute positions have none."""
    import transformers as tr

    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=128, max_position_embeddings=24)
    small = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=128, n_positions=24, bos_token_id=0, eos_token_id=0)
    configs = [
        (tr.GPT2Config(**small), True),
        (tr.GPTJConfig(**small, rotary_dim=4), True),
        (tr.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16), True),
        (tr.LlamaConfig(**shape, intermediate_size=24), False),
    ]
    for config, refused in configs:
        model = tr.AutoModelForCausalLM.from_config(config).eval()
        assert activations(model, torch.zeros(2, 24).long(), block=0).shape == (2, 24, 16)
        if not refused:
            assert activations(model, torch.zeros(2, 25).long(), block=0).shape == (2, 25, 16)
            continue
        options = dict(block=0, p=0.3, token_id=1, mask_seed=0, bos_id=None, batch_size=4, seed=0)
        for act in (
            lambda: activations(model, torch.zeros(2, 25).long(), block=0),
            lambda: from_model(SimpleNamespace(model=model), torch.zeros(2, 32).long(), **options),
        ):
            with pytest.raises(DataError, match="longer than the 24 positions of .*text.block_length: 24 at most"):
                act()
