"""Penalties on similar latents, one weight per prefix, the frozen decoder: each against what its formula says."""

import json
import math
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from naive_penalties import naive
from random_saes import ALL_RULES, random_batch, random_sae
from small_training import EVERY, D, F, run, same, stream, train_config

from masksae import C2R, MATRYOSHKA, SAE, BatchTopK, OrtSAE, ReLU, SAEConfig, TopK, TrainConfig, load_snapshots
from masksae.errors import ConfigError
from masksae.saes.loss import dense_loss, dense_step
from masksae.saes.penalties import BLOCK, PENALTIES, Penalty, nearest_rows, penalty_loss
from masksae.saes.sparse import sparse_step
from masksae.training.group import Group
from masksae.training.step import Trainer

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products on the CPU need MKL")
every_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
BOTH = (OrtSAE(0.25, every=3), C2R(5.0, every=2))
"""Both are due on steps 0, 6, 12, ..."""


def gradients(take, sae, *args, **options):
    outcome = take(sae, *args, **options)
    return outcome.loss, {name: p.grad.clone() for name, p in sae.named_parameters()}


def agreement(rule, prefixes, penalties) -> dict:
    """Of each step: difference of loss and gradients from the loss without penalties plus the naive ones, as a share of
    what the penalties add (where they add nothing, of all)."""
    sae, x, weight = random_sae(rule, prefixes), random_batch(), 0.7
    sae.config = replace(sae.config, penalties=penalties)
    xc = sae.encoder_input(x)
    pre = xc @ sae.W_enc + sae.b_enc
    f = rule.dense(sae, pre, weight)[0]
    written = f if rule.unit_rows else f * sae.W_dec.norm(dim=1)
    added = sum(p.weight * p.every * naive(type(p).__name__, sae.W_dec, written) for p in penalties)
    wanted, parameters = dense_loss(sae, x, pre, weight)[0] + added, list(sae.parameters())
    own = torch.autograd.grad(added, parameters, retain_graph=True, materialize_grads=True)
    whole = torch.autograd.grad(wanted, parameters)
    size = [(a if a.any() else b).norm() for a, b in zip(own, whole)]
    given, found = (sae, x, xc.detach(), pre.detach()), {}
    found["dense"] = gradients(dense_step, *given, weight, None, False, step=6)
    if torch.backends.mkl.is_available():
        index = rule.support(sae, pre.detach(), math.inf)
        found["sparse"] = gradients(sparse_step, *given, index, weight, False, step=6)
    return {
        name: max(
            abs(loss - wanted).item() / added.item(),
            *(((g - w).norm() / s).item() for g, w, s in zip(grad.values(), whole, size, strict=True)),
        )
        for name, (loss, grad) in found.items()
    }


@every_rule
@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("penalties", [BOTH[:1], BOTH[1:], BOTH], ids=["OrtSAE", "C2R", "both"])
def test_both_steps_follow_the_definition(rule, prefixes, penalties):
    assert max(agreement(rule, prefixes, penalties).values()) < 1e-10


def test_the_table_of_agreement():
    """Largest difference of loss and gradients from an independent implementation; `pytest -s` shows it."""
    print("\n| penalty | rule | dense | sparse |\n| --- | --- | --- | --- |")
    for penalty in BOTH:
        for rule in ALL_RULES:
            differences = agreement(rule, (), (penalty,)).values()
            cells = " | ".join(f"{d:.0e}" for d in differences)
            print(f"| {type(penalty).__name__} | {type(rule).__name__} | {cells} |")
            assert max(differences) < 1e-10


def two_rows(cosine: float, penalty: Penalty):
    """Two latents, the second row at some angle to the first, and neither of norm 1."""
    sae = SAE(SAEConfig(3, 2, ReLU(0.1), penalties=(penalty,))).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[2.0, 0, 0], [3 * cosine, 3 * math.sqrt(1 - cosine**2), 0]]))
    return sae


@pytest.mark.parametrize("cosine", [1.0, 0.6, 0.0, -0.6])
def test_two_rows_by_hand(cosine):
    sae, norms = two_rows(cosine, OrtSAE()), torch.tensor([0.5, 2.0]).double()
    value = OrtSAE().value(sae, norms, 0, 64)
    assert value.item() == pytest.approx(max(0, cosine) ** 2)
    value.backward()
    if cosine > 0:  # each row sees its own term and the other's: 2 c (u_2 - c u_1) / |d_1|
        u = sae.W_dec.detach() / torch.tensor([[2.0], [3.0]])
        torch.testing.assert_close(sae.W_dec.grad[0], 2 * cosine * (u[1] - cosine * u[0]) / 2)
        torch.testing.assert_close(sae.W_dec.grad[1], 2 * cosine * (u[0] - cosine * u[1]) / 3)
    else:
        assert not sae.W_dec.grad.any()
    for batch in (64, 2048):  # ReLU's rows are free: they write |f| |d|
        size = (0.5 * 2 + 2.0 * 3) * math.sqrt(2048 / batch)
        assert C2R().value(sae, norms, 0, batch).item() == pytest.approx(max(0, cosine) ** 2 * size)


def test_free_rows_gain_nothing_by_growing():
    """A ReLU SAE with rows twice as long and latents half as large is the same function and pays the same."""
    sae, x = random_sae(ReLU(0.02)), random_batch()
    values = []
    for _ in range(2):
        values.append(C2R().value(sae, sae.encode(x).norm(dim=0), 0, len(x)).item())
        with torch.no_grad():
            sae.W_dec *= 2
            sae.W_enc /= 2
            sae.b_enc /= 2
    assert values[0] == pytest.approx(values[1]) and values[0] > 0


def test_c2r_does_not_depend_on_the_batch_size():
    sae, x = random_sae(TopK(4)), random_batch()
    once, twice = (C2R().value(sae, sae.encode(b).norm(dim=0), 0, len(b)).item() for b in (x, torch.cat([x, x])))
    assert once == pytest.approx(twice)


@every_rule
def test_silent_latents_have_no_gradient(rule):
    sae, x = random_sae(rule), random_batch()
    sae.config = replace(sae.config, penalties=(C2R(),))
    with torch.no_grad():
        sae.b_enc[:48] = -100
    xc = sae.encoder_input(x).detach()
    pre = (xc @ sae.W_enc + sae.b_enc).detach()
    for step, given in (
        (dense_step, (0.7, None, False)),
        (sparse_step, (rule.support(sae, pre, math.inf), 0.7, False)),
    ):
        if step is sparse_step and not torch.backends.mkl.is_available():
            continue
        step(sae, x, xc, pre, *given, step=0)
        assert all(p.grad.isfinite().all() for p in sae.parameters())
        assert not sae.W_enc.grad[:, :48].any() and sae.W_dec.grad[:48].any()


@pytest.mark.parametrize("n", [2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_nearest_rows_in_blocks(n):
    unit = torch.nn.functional.normalize(torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).double(), dim=1)
    cosines = (unit @ unit.t()).fill_diagonal_(-2)
    assert torch.equal(nearest_rows(unit, 8192, 0, 0), cosines.argmax(1))


def test_chunks_are_shuffled_by_seed_and_step():
    unit = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    draws = {key: nearest_rows(unit, 7, *key) for key in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 5)]}
    for key, nearest in draws.items():
        assert torch.equal(nearest, nearest_rows(unit, 7, *key))
        groups = torch.arange(40)
        for _ in range(40):  # rows that are linked, one way or the other, are of one chunk
            groups = torch.minimum(groups, groups[nearest]).scatter_reduce(0, nearest, groups, "amin")
        assert groups.bincount().max() <= 7 and (nearest != torch.arange(40)).all()
    assert len({tuple(nearest.tolist()) for nearest in draws.values()}) == len(draws)
    assert torch.equal(nearest_rows(unit, 40, 0, 0), nearest_rows(unit, 8192, 3, 9))  # one chunk: nothing is shuffled


def test_only_every_nth_step_and_then_n_times_as_strong():
    sae, x = random_sae(TopK(4), MATRYOSHKA), random_batch()
    sae.config = replace(sae.config, penalties=(C2R(5.0, every=4),))
    trainer = Trainer(sae, TrainConfig(steps=100, warmup=5, threshold_start=5))
    losses = [trainer.gradients(x, step).loss.item() for step in range(9)]
    sae.config = replace(sae.config, penalties=())
    plain = trainer.gradients(x, 0).loss.item()
    value = C2R().value(sae, TopK(4).dense(sae, sae.pre_activations(x), 0)[0].norm(dim=0), 0, len(x)).item()
    assert losses == pytest.approx([plain + (20 * value if step % 4 == 0 else 0) for step in range(9)])
    assert [loss == plain for loss in losses] == [step % 4 != 0 for step in range(9)]


@pytest.mark.parametrize("penalty, apart", [(OrtSAE(), 1e-6), (C2R(), 0.02)], ids=["OrtSAE", "C2R"])
def test_in_half_precision_only_the_activations_are(penalty, apart):
    """Under autocast neighbours and cosines stay in single precision; f has the 8 bits of bfloat16."""
    sae, x = random_sae(TopK(4), d=64, n=256, dtype=torch.float32), random_batch(256, 64, torch.float32)
    sae.config, grads = replace(sae.config, penalties=(penalty,)), []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            f = TopK(4).dense(sae, sae.encoder_input(x) @ sae.W_enc, 0)[0]
            assert f.dtype == (torch.bfloat16 if half else torch.float32)
            loss = penalty_loss(sae, f.norm(dim=0, dtype=sae.dtype), 0, len(x))
        grads.append(torch.autograd.grad(loss, sae.W_dec)[0])
    assert (grads[1] - grads[0]).norm() < apart * grads[0].norm() and grads[1].any()


def closeness(sae: SAE) -> float:
    """Mean over latents of the largest cosine to another row."""
    return (sae.W_dec @ sae.W_dec.t()).fill_diagonal_(-1).amax(1).mean().item()


def test_rows_keep_apart_and_a_rarer_penalty_is_as_strong():
    """Either penalty lowers the mean largest cosine. Every eighth step at eight times the weight comes nearer to every
    step than every eighth step at the weight itself, the other reading of `every`, does."""
    kinds = [(), (OrtSAE(0.25, every=1),), (OrtSAE(0.25, every=8),), (OrtSAE(0.25 / 8, every=8),), (C2R(0.5),)]
    configs = [SAEConfig(D, F, BatchTopK(3), penalties=kind) for kind in kinds]
    plain, often, rare, thin, c2r = map(closeness, run(train_config(steps=300), configs, stream(batch_size=100)))
    assert often < plain / 2 and c2r < 0.75 * plain
    assert abs(rare - often) < abs(thin - often) / 2


PENALISED = [replace(c, penalties=(OrtSAE(every=4, chunk=9), C2R(every=3))) for c in EVERY[:3]]
PENALISED += [replace(EVERY[3], prefix_weighting=(0.5, 1.0)), replace(EVERY[4], frozen_decoder=True)]


def test_resumes_to_the_same_bytes(tmp_path):
    recipe = train_config(steps=30, snapshots=(20,))

    def stopping(step, record, stop_at=21):
        if record["step"] >= stop_at:
            raise KeyboardInterrupt

    whole = run(recipe, PENALISED, checkpoint_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, PENALISED, checkpoint_dir=tmp_path / "stopped", log=stopping)
    assert json.loads((tmp_path / "stopped/checkpoint/state.json").read_text())["step"] == 20
    assert same(run(recipe, PENALISED, checkpoint_dir=tmp_path / "stopped"), whole)
    a, b = (load_snapshots(tmp_path / name) for name in ("whole", "stopped"))
    assert list(a) == list(b) == [20] and same(a[20], b[20])
    assert [sae.config for sae in a[20]] == PENALISED


@every_rule
@pytest.mark.parametrize("sparse", [True, False])
def test_a_frozen_decoder_keeps_its_bits_and_the_rest_trains(rule, sparse):
    if sparse and not torch.backends.mkl.is_available():
        pytest.skip("sparse products on the CPU need MKL")
    free = SAEConfig(D, F, rule, (0.5, 0.5), seed=3)
    group = Group([replace(free, frozen_decoder=True), free], stream(), train_config(), "cpu")
    before = [{name: p.detach().clone() for name, p in t.sae.named_parameters()} for t in group.trainers]
    for trainer in group.trainers:
        trainer.sparse = sparse
    group.start()
    group.run(train_config(steps=25))
    frozen, trained = (t.sae for t in group.trainers)
    assert torch.equal(frozen.W_dec, before[0]["W_dec"]) and not torch.equal(trained.W_dec, before[1]["W_dec"])
    assert all(not torch.equal(p, before[0][name]) for name, p in frozen.named_parameters() if name != "W_dec")
    assert not any(name.startswith("adam.W_dec") for name in group.trainers[0].tensors())


def test_a_frozen_decoder_has_no_part_in_the_clipped_norm():
    """Adam's first moment is a tenth of the clipped gradient: its norm is a tenth of the limit without W_dec."""
    sae, x = random_sae(TopK(4)), 100 * random_batch()
    sae.config = replace(sae.config, frozen_decoder=True)
    trainer = Trainer(sae, TrainConfig(steps=100, warmup=5, threshold_start=5, clip=1.0))
    trainer.step(x, 0)
    moments = [value for name, value in trainer.tensors().items() if name.endswith("exp_avg")]
    assert torch.stack([m.norm() for m in moments]).norm().item() == pytest.approx(0.1, rel=1e-5)


@every_rule
def test_one_weight_per_prefix(rule):
    weights, prefixes = (0.2, 0.0, 3.0), (0.25, 0.25, 0.5)
    sae, x = random_sae(rule, prefixes, weights), random_batch()
    xc = sae.encoder_input(x)
    pre = xc @ sae.W_enc + sae.b_enc
    f, gate, penalty = rule.dense(sae, pre, 0.7)
    wanted = penalty
    for g, w_dec, b_dec in ((f, sae.W_dec, sae.b_dec), (gate, sae.W_dec.detach(), sae.b_dec.detach())):
        for end, weight in zip((24, 48, 96), weights) if g is not None else ():
            wanted = wanted + weight * (x - b_dec - g[:, :end] @ w_dec[:end]).square().sum(1).mean()
    grads = torch.autograd.grad(wanted, list(sae.parameters()))
    given = (sae, x, xc.detach(), pre.detach())
    found = [gradients(dense_step, *given, 0.7, None, False)]
    if torch.backends.mkl.is_available():
        index = rule.support(sae, pre.detach(), math.inf)
        found.append(gradients(sparse_step, *given, index, 0.7, False))
    for loss, grad in found:
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        for (name, value), want in zip(grad.items(), grads):
            torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12, msg=name)


def test_equal_weights_are_the_bytes_of_their_name():
    kinds = [SAEConfig(D, F, BatchTopK(3), (0.25, 0.75), w) for w in ("1/G^2", (0.25, 0.25), "mean", (0.5, 0.5))]
    saes = run(sae_configs=kinds)
    assert same(saes[:1], saes[1:2]) and same(saes[2:3], saes[3:]) and not same(saes[1:2], saes[2:3])


def test_configs_come_back_from_json_and_old_ones_are_the_same():
    full = SAEConfig(8, 32, TopK(2), (0.5, 0.5), (0.75, 1), penalties=[C2R(2, chunk=9), OrtSAE()], frozen_decoder=False)
    assert SAEConfig.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert full.to_dict()["penalties"][0] == {"penalty": "C2R", "weight": 2, "every": 5, "chunk": 9}
    frozen = SAEConfig(8, 32, TopK(2), frozen_decoder=True)
    assert SAEConfig.from_dict(frozen.to_dict()) == frozen and "penalties" not in frozen.to_dict()
    old = {
        "d_model": 8, "n_latents": 32, "selection": {"rule": "TopK", "k": 2}, "prefixes": [],
        "prefix_weighting": "1/G^2", "aux": None, "seed": 0, "drop_masked": False, "own_order": False,
    }  # fmt: skip
    assert SAEConfig(8, 32, TopK(2)).to_dict() == old and list(SAEConfig(8, 32, TopK(2)).to_dict()) == list(old)
    assert SAEConfig.from_dict(old) == SAEConfig(8, 32, TopK(2))
    assert (OrtSAE(), C2R()) == (OrtSAE(0.25, 5, 8192), C2R(5.0, 5, 8192))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda **k: OrtSAE(-1), "OrtSAE.weight must be a positive number, found -1"),
        (lambda **k: C2R(every=0), "C2R.every must be a positive integer, found 0"),
        (lambda **k: C2R(chunk=2), "C2R.chunk must be an integer of at least 3, found 2"),
        (
            lambda **k: SAEConfig(8, 32, TopK(2), penalties=("ortsae",)),
            "such as OrtSAE.*found 'ortsae'.*Known: OrtSAE, C2R",
        ),
        (lambda **k: SAEConfig(8, 32, TopK(2), penalties=OrtSAE()), "penalties must be a tuple.*found OrtSAE"),
        (lambda **k: SAEConfig(8, 1, TopK(1), penalties=(C2R(),)), "C2R compares latents, found n_latents = 1"),
        (
            lambda **k: SAEConfig(8, 32, TopK(2), penalties=(OrtSAE(),), frozen_decoder=True),
            "OrtSAE moves decoder rows only.*frozen_decoder.*Leave one",
        ),
        (lambda **k: SAEConfig(8, 32, TopK(2), (0.5, 0.5), (1.0,)), "1 weights for 2 prefixes"),
        (lambda **k: SAEConfig(8, 32, TopK(2), (), (1.0,)), "1 weights for 0 prefixes"),
        (lambda **k: SAEConfig(8, 32, TopK(2), (0.5, 0.5), (1.0, 0.0)), "the last above 0, found"),
        (lambda **k: SAEConfig(8, 32, TopK(2), (0.5, 0.5), (math.nan, 1.0)), "finite weights"),
        (lambda **k: SAEConfig(8, 32, TopK(2), (0.5, 0.5), ("a", 1.0)), "finite weights"),
        (
            lambda **k: SAEConfig(8, 32, TopK(2), (0.5, 0.5), 0.5),
            "prefix_weighting 0.5 is unknown.*one weight per prefix",
        ),
        (
            lambda **k: SAEConfig.from_dict(SAEConfig(8, 32, TopK(2)).to_dict() | {"penalties": [{"penalty": "Orto"}]}),
            "Unknown penalty 'Orto'.*Import the module",
        ),
    ],
)
def test_errors_name_the_penalty_and_the_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_penalty_of_ones_own_is_one_class(monkeypatch):
    monkeypatch.setattr("masksae.saes.penalties.PENALTIES", PENALTIES)

    @dataclass(frozen=True)
    class Quiet(Penalty):
        """Latents' norms are small."""

        every: int = 1

        def value(self, sae, norms, step, batch):
            return norms.mean()

    try:
        config = SAEConfig(D, F, TopK(2), penalties=(Quiet(3.0),))
        assert SAEConfig.from_dict(config.to_dict()) == config and asdict(Quiet(3.0)) == {"weight": 3.0, "every": 1}
        quiet, plain = run(sae_configs=[config, replace(config, penalties=())])
        x = next(iter(stream().batches([(0, False)])))[0][0]
        assert quiet.encode(x).norm() < 0.9 * plain.encode(x).norm()
    finally:
        del PENALTIES["Quiet"]
