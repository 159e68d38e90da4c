"""Losses and gradients of every architecture: against loops, against autograd on the definition, sparse against
dense."""

import math

import pytest
import torch
from random_saes import ALL_RULES, random_batch, random_sae

from masksae import MATRYOSHKA, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK, TrainConfig
from masksae.saes.loss import aux_loss, dense_loss, dense_step
from masksae.saes.rules import largest, top_k
from masksae.saes.sparse import _stable_order, sparse_step
from masksae.training.step import Trainer

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products on the CPU need MKL")
every_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("quantised", [False, True])
def test_batch_selection_equals_a_full_sort(k, quantised):
    h = torch.relu(torch.randn(50, 200, generator=torch.Generator().manual_seed(k)))
    if quantised:  # many ties
        h = (h * 4).round() / 4
    flat = h.flatten()
    count = min(50 * k, int((h > 0).sum()))
    order = sorted(range(len(flat)), key=lambda i: (-flat[i].item(), i))[:count]
    assert largest(h, 50 * k).tolist() == sorted(order)


@pytest.mark.parametrize("k", [1, 3, 4, 12, 16, 17, 256])
@pytest.mark.parametrize("width", [256, 257])
@pytest.mark.parametrize("quantised", [False, True])
def test_selection_in_two_stages_equals_a_full_sort(k, width, quantised):
    h = torch.randn(30, width, generator=torch.Generator().manual_seed(k))
    if quantised:  # many ties
        h = (h * 4).round() / 4
    value, column = top_k(h, k)
    assert torch.equal(value.sort(1, descending=True).values, h.sort(1, descending=True).values[:, :k])
    assert torch.equal(h.gather(1, column), value) and all(len(row.unique()) == k for row in column)


@pytest.mark.parametrize("below", [3, 2**16, 2**16 + 1])
def test_entries_of_one_latent_stay_in_the_order_of_their_tokens(below):
    key = torch.randint(0, below, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    key[::7] = below - 1
    expected = sorted(range(len(key)), key=lambda i: key[i].item())
    assert _stable_order(key, below).tolist() == expected


@pytest.mark.parametrize("length", [0.5, 1.0, 3.0, math.nan])
def test_gradients_are_clipped_as_by_pytorch(length):
    trainer = Trainer(random_sae(TopK(3)), TrainConfig(steps=10, warmup=1, threshold_start=5, clip=1.0))
    parameters = list(trainer.sae.parameters())
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for p in parameters:
        p.grad *= length / norm
    before = [p.grad.clone() for p in parameters]
    trainer._clip_()
    found = [p.grad.clone() for p in parameters]
    for p, grad in zip(parameters, before):
        p.grad = grad
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert all(torch.equal(a.nan_to_num(7.0), p.grad.nan_to_num(7.0)) for a, p in zip(found, parameters))


def test_batch_selection_with_a_misleading_sample():
    """The strided sample sees only the large entries, so its bound is too high and must be dropped."""
    h = torch.full((61, 61), 0.5)
    h.view(-1)[::61] = 9.0
    assert len(largest(h, 61 * 30)) == 61 * 30


def test_selection_with_too_few_positive():
    h = torch.zeros(10, 20)
    h[3, 4] = 2.0
    assert largest(h, 20).tolist() == [64] and largest(torch.zeros(10, 20), 20).tolist() == []
    for rule in (TopK(2), BatchTopK(2)):
        assert rule.support(None, h - 0.5, math.inf).tolist() == [64]


def brute_force_loss(sae, x, weight):
    """The definitions, with loops over tokens and prefixes."""
    rule, sizes = sae.config.selection, sae.config.group_sizes
    seen = x if isinstance(rule, JumpReLU) else x - sae.b_dec
    pre = seen @ sae.W_enc + sae.b_enc
    h, gate, penalty = torch.relu(pre), None, 0.0
    if isinstance(rule, BatchTopK):
        f = torch.where(h >= h.flatten().sort(descending=True).values[rule.k * len(x) - 1], h, 0)
    elif isinstance(rule, TopK):
        f = torch.stack([torch.where(row >= row.sort(descending=True).values[rule.k - 1], row, 0) for row in h])
    elif isinstance(rule, JumpReLU):
        f = torch.where(pre > sae.thresholds, pre, 0)
        penalty = weight * ((f > 0).double().sum(1).mean() / rule.target_l0 - 1) ** 2
    elif isinstance(rule, Gated):
        gate = h
        f = torch.where(pre > 0, torch.relu(sae.r_mag.exp() * (seen @ sae.W_enc) + sae.b_mag), 0)
        penalty = weight * gate.sum() / len(x)
    elif isinstance(rule, ReLU):
        f = h
        penalty = weight * sum((f[:, j] * sae.W_dec[j].norm()).sum() for j in range(f.shape[1])) / len(x)
    total = 0.0
    for latents, w_dec, b_dec in [(f, sae.W_dec, sae.b_dec), (gate, sae.W_dec.detach(), sae.b_dec.detach())]:
        low = 0
        for size in sizes if latents is not None else ():
            low += size
            total = total + ((b_dec + latents[:, :low] @ w_dec[:low] - x) ** 2).sum() / len(x)
    weighting = {"1/G^2": 1 / len(sizes) ** 2, "mean": 1 / len(sizes), "sum": 1}[sae.config.prefix_weighting]
    return total * weighting + penalty


@every_rule
@pytest.mark.parametrize(
    "prefixes, weighting", [((), "1/G^2"), (MATRYOSHKA, "1/G^2"), ((0.25, 0.75), "mean"), ((0.25, 0.75), "sum")]
)
def test_both_steps_equal_the_definition(rule, prefixes, weighting):
    sae, x, weight = random_sae(rule, prefixes, weighting), random_batch(), 0.7
    expected = brute_force_loss(sae, x, weight)
    names = [name for name, _ in sae.named_parameters() if name != "thresholds"]
    wanted = dict(zip(names, torch.autograd.grad(expected, [sae.get_parameter(n) for n in names])))
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    outcomes = [dense_step(sae, x, xc, pre, weight, None, rule.estimates_threshold)]
    gradients = [{name: p.grad.clone() for name, p in sae.named_parameters()}]
    if torch.backends.mkl.is_available():
        index = sae.config.selection.support(sae, pre, math.inf)
        outcomes.append(sparse_step(sae, x, xc, pre, index, weight, rule.estimates_threshold))
        gradients.append({name: p.grad.clone() for name, p in sae.named_parameters()})
    for outcome, found in zip(outcomes, gradients):
        torch.testing.assert_close(outcome.loss, expected.detach(), rtol=1e-12, atol=0)
        for name in names:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    for name, value in vars(
        outcomes[0]
    ).items():  # the two agree in everything else as well, thresholds' gradients included
        assert value is None or torch.allclose(value.double(), getattr(outcomes[-1], name).double(), rtol=1e-10)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[-1][name], gradients[0][name], rtol=1e-9, atol=1e-12)


def test_gradient_of_jump_thresholds_by_hand():
    """One latent, three tokens: inside the window above, inside it below, far above."""
    from masksae import SAE

    sae = SAE(SAEConfig(1, 1, JumpReLU(0.5, bandwidth=0.2, initial_threshold=1.0))).double()
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.W_dec.fill_(1)
    x = torch.tensor([[1.05], [0.95], [3.0]]).double()
    xc = sae.encoder_input(x)
    dense_step(sae, x, xc, (xc @ sae.W_enc).detach(), 1.0, None, False)
    # df_b = 2/3 (f - x): 0 for the active ones, -2/3 * 0.95 for the silent one; thresholds get -(1 / 0.2) of it inside
    # the window
    value = -(1 / 0.2) * (-2 / 3 * 0.95)
    # penalty (2/3 / 0.5 - 1)^2: its derivative for each step is 2 (1/3) / 0.5 / 3; only f = 1.05 is in the window
    step = 2 * (1 / 3) / 0.5 / 3
    assert sae.thresholds.grad.item() == pytest.approx(value - step / 0.2)


def test_tiny_thresholds_see_every_silent_entry():
    """With a threshold below half the bandwidth f = 0 lies in the window of the L0 step, as in dictionary_learning."""
    rule = JumpReLU(6.0, bandwidth=0.2, initial_threshold=0.05)
    sae, x = random_sae(rule), random_batch()
    with torch.no_grad():
        sae.thresholds.fill_(0.05)
    xc = sae.encoder_input(x)
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    dense_step(sae, x, xc, pre, 1.0, None, False)
    wanted = sae.thresholds.grad.clone()
    sparse_step(sae, x, xc, pre, sae.config.selection.support(sae, pre, math.inf), 1.0, False)
    torch.testing.assert_close(sae.thresholds.grad, wanted, rtol=1e-9, atol=1e-12)


@needs_mkl
@every_rule
def test_sparse_equals_dense_in_single_precision(rule):
    sae, x = random_sae(rule, MATRYOSHKA, d=64, n=512, dtype=torch.float32), random_batch(256, 64, torch.float32)
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    dense_step(sae, x, xc, pre, 0.1, None, False)
    wanted = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sparse_step(sae, x, xc, pre, sae.config.selection.support(sae, pre, math.inf), 0.1, False)
    for name, parameter in sae.named_parameters():
        assert (parameter.grad - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


@needs_mkl
@every_rule
def test_a_group_without_any_active_latent(rule):
    sae, x = random_sae(rule, (0.5, 0.5)), random_batch()
    with torch.no_grad():
        sae.b_enc[:48] = -100
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    dense_step(sae, x, xc, pre, 0.1, None, False)
    wanted = {name: p.grad.clone() for name, p in sae.named_parameters()}
    index = sae.config.selection.support(sae, pre, math.inf)
    assert (index % 96 >= 48).all()
    sparse_step(sae, x, xc, pre, index, 0.1, False)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12)


@needs_mkl
@pytest.mark.parametrize("rule, bias", [(BatchTopK(4), -100), (TopK(4), -100), (BatchTopK(0.005), 0)], ids=str)
def test_a_batch_in_which_nothing_is_kept(rule, bias):
    """No pre-activation is positive, or k x batch rounds to none: x_hat = b_dec, for either step."""
    sae, x = random_sae(rule, (0.25, 0.75)), random_batch()
    with torch.no_grad():
        sae.b_enc += bias
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    index = sae.config.selection.support(sae, pre, math.inf)
    for step, given in ((dense_step, (0.0, None, True)), (sparse_step, (index, 0.0, True))):
        outcome = step(sae, x, xc, pre, *given)
        torch.testing.assert_close(outcome.residual, (x - sae.b_dec).detach())
        torch.testing.assert_close(outcome.loss, (x - sae.b_dec).detach().square().sum(1).mean() / 2)
        torch.testing.assert_close(sae.b_dec.grad, -(x - sae.b_dec).detach().mean(0))
        assert outcome.l0 == 0 == outcome.smallest and not outcome.fired.any()
        assert all(not p.grad.any() for name, p in sae.named_parameters() if name != "b_dec")


@pytest.mark.parametrize("rule", ALL_RULES[:2], ids=lambda r: type(r).__name__)
def test_the_dense_step_numbers_no_entries(rule):
    """Nothing of the size of the pre-activations is int64: 8 bytes an entry beside the 4 of f."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            found.extend(t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    sae, x, found = random_sae(rule), random_batch(), []
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    with Watch():
        dense_step(sae, x, xc, pre, 0.0, None, True)
    assert max(t.numel() for t in found) == pre.numel()
    assert max(t.numel() for t in found if t.dtype == torch.int64) <= 4 * len(x)


@every_rule
def test_gradients_twice_change_nothing(rule):
    sae, x = random_sae(rule, MATRYOSHKA, dtype=torch.float32), random_batch(dtype=torch.float32)
    trainer = Trainer(sae, TrainConfig(steps=100, warmup=5, threshold_start=5))
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    first = trainer.gradients(x, 50)
    gradients = [p.grad.clone() for p in sae.parameters()]
    second = trainer.gradients(x, 50)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, sae.parameters()))
    assert before.keys() == trainer.tensors().keys()
    assert all(torch.equal(value, trainer.tensors()[name]) for name, value in before.items())


def test_aux_loss_without_dead_with_a_perfect_and_with_a_silent_dead_latent():
    sae = random_sae(aux=AuxK(k=1, coefficient=1.0))
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc[:, 0] = sae.W_dec[0]
        sae.b_enc[0] = 0
    amounts = torch.rand(64, generator=torch.Generator().manual_seed(3)).double()[:, None] + 0.5
    x = amounts * sae.W_dec[0]  # the residual of a zero reconstruction is what latent 0 writes
    none, dead = torch.zeros(96, dtype=torch.bool), torch.arange(96) == 0
    pre = sae.pre_activations(x)
    assert aux_loss(sae, x, x, none, pre) == 0
    for given in (None, pre):
        assert aux_loss(sae, x, x, dead, given).item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        sae.b_enc[0] = -100
    variance = (x - x.mean(0)).square().sum(1).mean()
    for given in (None, sae.pre_activations(x)):
        assert aux_loss(sae, x, x, dead, given).item() == pytest.approx((x.square().sum(1).mean() / variance).item())


@pytest.mark.parametrize("n_dead", [2, 10])
def test_aux_loss_of_the_dead_alone_equals_that_from_all_latents(n_dead):
    """k_aux is 5: fewer and more dead latents than that."""
    sae, x = random_sae(aux=AuxK(k=5)), random_batch()
    dead = torch.zeros(96, dtype=torch.bool)
    dead[10 : 10 + n_dead] = True
    few = torch.autograd.grad(aux_loss(sae, x, x, dead), [sae.W_enc, sae.W_dec, sae.b_enc])
    everything = torch.autograd.grad(
        aux_loss(sae, x, x, dead, sae.pre_activations(x)), [sae.W_enc, sae.W_dec, sae.b_enc]
    )
    for a, b in zip(few, everything):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert few[0][:, dead].abs().max() > 0 and few[1][dead].abs().max() > 0
    assert few[0][:, ~dead].abs().max() == 0 and few[1][~dead].abs().max() == 0


def test_a_step_with_dead_latents_follows_the_whole_loss():
    """Latents that fire in this batch are not dead, whatever the counter says; the others get the gradient of AuxK."""
    sae, x = random_sae(BatchTopK(2), (0.25, 0.75), aux=AuxK(k=3, dead_after_tokens=1000)), random_batch()
    sae.tokens_since_fired[10:20] = 5000
    with torch.no_grad():
        sae.b_enc[10:19] -= 2  # 19 fires
    pre = sae.pre_activations(x)
    loss, _, f = dense_loss(sae, x, pre, 0.0, dead_after=1000)
    assert (f[:, 19] > 0).any() and not (f[:, 10:15] > 0).any()
    wanted = torch.autograd.grad(loss, list(sae.parameters()))
    without = torch.autograd.grad(dense_loss(sae, x, sae.pre_activations(x))[0], list(sae.parameters()))
    assert not torch.allclose(wanted[0], without[0])
    trainer = Trainer(sae, TrainConfig(steps=100, warmup=5, threshold_start=5))
    outcome = trainer.gradients(x, 0)
    torch.testing.assert_close(outcome.loss, loss.detach())
    for parameter, want in zip(sae.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12)


@needs_mkl
@every_rule
def test_no_array_holds_the_model_width_for_every_kept_latent(rule):
    """The sparse step's largest array is that of the pre-activations, far from k x d per token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in torch.utils._pytree.tree_leaves(result)
                if isinstance(t, torch.Tensor) and t.layout is torch.strided
            )
            return result

    n, d, batch = 128, 64, 256
    sae, x = random_sae(rule, MATRYOSHKA, d=d, n=n, dtype=torch.float32), random_batch(batch, d, torch.float32)
    with torch.no_grad():
        sae.b_enc -= 1.0
    trainer = Trainer(sae, TrainConfig(steps=100, warmup=5, threshold_start=5))
    with Watch():
        outcome = trainer.gradients(x, 50)
    active = outcome.l0.item() * batch
    assert max(sizes) == batch * n and active * d > 1.5 * batch * n


@needs_mkl
def test_more_groups_than_a_byte_counts():
    sae, x = random_sae(BatchTopK(4), (1 / 320,) * 320, n=320), random_batch()
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    dense_step(sae, x, xc, pre, 0.1, None, False)
    wanted = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sparse_step(sae, x, xc, pre, sae.config.selection.support(sae, pre, math.inf), 0.1, False)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
