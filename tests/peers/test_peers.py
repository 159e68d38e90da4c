"""Forward, loss, gradients and the first 20 updates against dictionary_learning 0.1.0, forwards against SAELens 6.54;
double precision.

The peers live in an environment of their own: `make test-peers`. Elsewhere these tests are skipped.
"""

import pytest
import torch

pytest.importorskip("dictionary_learning")
pytest.importorskip("sae_lens")

from peers import dictionary_learning_names, dictionary_learning_trainer, named, saelens_sae
from random_saes import ALL_RULES, random_batch, random_sae

from masksae import MATRYOSHKA, AuxK, BatchTopK, Gated, JumpReLU, ReLU, TopK, TrainConfig
from masksae.saes.loss import dense_loss
from masksae.training.step import Trainer

RECIPE = TrainConfig(steps=1000, lr=1e-3, warmup=0, decay=0.0, threshold_start=8, threshold_ema=0.9, sparsity_warmup=10)
AUX = AuxK(dead_after_tokens=200)
CASES = [
    pytest.param(BatchTopK(4), MATRYOSHKA, AUX, id="Matryoshka"),
    pytest.param(BatchTopK(4), (), AUX, id="BatchTopK"),
    pytest.param(TopK(4), (), AUX, id="TopK"),
    pytest.param(JumpReLU(6.0, bandwidth=0.2, initial_threshold=0.3), (), None, id="JumpReLU"),
    pytest.param(Gated(0.03), (), None, id="Gated"),
    pytest.param(ReLU(0.02), (), None, id="ReLU"),
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches(n):
    return [random_batch(seed=i) for i in range(n)]


def start(rule, prefixes, aux):
    """An SAE some of whose latents count as dead, so that AuxK is at work from the first step."""
    sae = random_sae(rule, prefixes, aux=aux)
    if aux is not None:
        with torch.no_grad():
            sae.b_enc[60:70] -= 3
        sae.tokens_since_fired[60:80] = 1000
    return sae


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rule, prefixes, aux", CASES)
def test_loss_and_gradients_against_dictionary_learning(rule, prefixes, aux, sparse):
    """To 1e-7: their AuxK and the step of their JumpReLU are computed in single precision whatever the weights are."""
    sae, x, step = start(rule, prefixes, aux), random_batch(), 6
    trainer = dictionary_learning_trainer(sae, RECIPE)
    theirs = trainer.loss(x, step=step)
    theirs.backward()
    our_trainer = Trainer(sae, RECIPE)
    our_trainer.sparse = sparse
    import masksae.training.step as module

    module.DENSE_SHARE, kept = 1.0, module.DENSE_SHARE  # the sparse step however dense the case
    ours = our_trainer.gradients(x, step)
    module.DENSE_SHARE = kept
    torch.testing.assert_close(ours.loss, theirs.detach(), rtol=1e-7, atol=0)
    gradients = {name: p.grad for name, p in sae.named_parameters()}
    for their_name, our_name in dictionary_learning_names(sae).items():
        mine = gradients[our_name.removesuffix(".T")]
        mine = mine.t() if our_name.endswith(".T") else mine
        other = trainer.ae.get_parameter(their_name).grad
        assert other.norm() > 0 and (other - mine).norm() < 1e-7 * other.norm(), their_name


@pytest.mark.parametrize("rule, prefixes, aux", CASES)
def test_twenty_updates_against_dictionary_learning(rule, prefixes, aux):
    """To 1e-5 of the distance travelled: besides single precision (above) their projection divides rows by their norm +
    1e-6."""
    sae = start(rule, prefixes, aux)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    trainer, our_trainer = dictionary_learning_trainer(sae, RECIPE), Trainer(sae, RECIPE)
    for step, x in enumerate(batches(20), start=1):
        trainer.update(step, x)
        our_trainer.step(x, step)
    mine = named(sae, dictionary_learning_names(sae))
    for name, value in trainer.ae.state_dict().items():
        if name in mine:
            ours = dictionary_learning_names(sae)[name]
            start_value = before[ours.removesuffix(".T")]
            travelled = (getattr(sae, ours.removesuffix(".T")).detach() - start_value).norm()
            assert travelled > 1e-3 and (value - mine[name]).norm() < 1e-5 * travelled, name
    if rule.estimates_threshold:
        assert sae.threshold.item() == pytest.approx(float(trainer.ae.threshold), rel=1e-6) and sae.threshold > 0
        assert torch.equal(sae.tokens_since_fired, trainer.num_tokens_since_fired)
    if isinstance(rule, JumpReLU):
        assert sae.thresholds.min() > 0  # we project them to be at least 0, they don't; here it makes no difference


@pytest.mark.parametrize("rule, prefixes, aux", CASES)
def test_inference_against_dictionary_learning(rule, prefixes, aux):
    sae, x = start(rule, prefixes, aux).requires_grad_(False), random_batch()
    trainer = dictionary_learning_trainer(sae, RECIPE)
    if rule.estimates_threshold:
        sae.threshold.fill_(0.5)
        trainer.ae.threshold.fill_(0.5)
    torch.testing.assert_close(sae.encode(x), trainer.ae.encode(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae(x), trainer.ae(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule, prefixes", [case.values[:2] for case in CASES], ids=[case.id for case in CASES])
def test_forward_against_saelens(rule, prefixes):
    """Latents, reconstruction and main loss of their training pass; Matryoshka there is the unweighted sum over
    prefixes."""
    from sae_lens.saes.sae import TrainStepInput

    sae, x = random_sae(rule, prefixes, "sum" if prefixes else "1/G^2"), random_batch()
    theirs = saelens_sae(sae)
    given = {"l0": 1.0} if isinstance(rule, JumpReLU) else {"l1": getattr(rule, "l1", 0.0)}
    out = theirs.training_forward_pass(TrainStepInput(x, given, None, 0, False))
    loss, residual, f = dense_loss(sae, x, sae.pre_activations(x), getattr(rule, "l1", 0.0))
    norms = sae.W_dec.norm(dim=1) if rule.ranked else 1.0  # they rescale latents by rows, ours have norm 1 to rounding
    torch.testing.assert_close(out.feature_acts, f * norms, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.sae_out, x - residual, rtol=1e-6, atol=1e-9)
    if isinstance(rule, JumpReLU):
        torch.testing.assert_close(out.losses["mse_loss"], residual.square().sum(1).mean(), rtol=1e-9, atol=0)
    else:
        torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0)


def test_all_rules_are_covered():
    assert {type(case.values[0]) for case in CASES} == {type(rule) for rule in ALL_RULES}


@pytest.mark.parametrize("adapter", ["tensorboard", "wandb"])
def test_training_logs_reach_the_live_pages(adapter, tmp_path, monkeypatch):
    """Read back with the tools' own readers."""
    pytest.importorskip(adapter)
    from masksae.training import logs

    monkeypatch.setenv("MASKSAE_LOG", adapter)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "id" / "masked"
    log = logs.chosen(folder, ["a", "b"])
    for step in (0, 20, 40):
        for number in (0, 1):
            log(number, {"step": step, "loss": number + step / 100})
    if adapter == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard/b")).Reload().Scalars("loss")
        assert [(e.step, round(e.value, 3)) for e in events] == [(0, 1.0), (20, 1.2), (40, 1.4)]
    else:
        import wandb

        summary = dict(wandb.run.summary)  # of step 20: a step is kept back until the next one, or the end
        wandb.finish()
        assert summary["b/loss"] == 1.2 and list((folder / "wandb").rglob("*.wandb"))
