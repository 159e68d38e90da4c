"""What a stream of a model draws: masks for all epochs or for each, and Gaussian noise on the activations."""

import math
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tiny_project import tiny_model

import masksae
from masksae import BatchTopK, SAEConfig, mask_tokens
from masksae.activations import from_model, is_sink
from masksae.errors import CheckpointError, ConfigError
from masksae.tracing import activations

OPTIONS = dict(block=1, p=0.4, token_id=1, mask_seed=3, bos_id=None, batch_size=8, seed=0, pool_tokens=30)
FRESH, NOISY = {"fresh_masks": True}, {"p": 0.0, "noise": 0.5}
CONFIG = masksae.TrainConfig(steps=40, lr=1e-3, warmup=2, threshold_start=5)  # three epochs
SAES = [SAEConfig(16, 32, BatchTopK(3), seed=s, drop_masked=s == 1) for s in range(2)]


@pytest.fixture
def make(ids):
    return partial(from_model, SimpleNamespace(model=tiny_model("llama")), ids, progress=False)


def epochs(stream, count=3):
    """Pools of each epoch in one piece: (x [n, d], is_masked [n])."""
    n = len(stream._sizes)
    visits = [stream._load(stream._number(visit)) for visit in range(count * n)]
    return [tuple(map(torch.cat, zip(*visits[e * n : (e + 1) * n]))) for e in range(count)]


def batches(stream, count=40):
    return [x for x, _ in islice(stream, count)]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_an_epoch_of_fresh_masks_is_the_next_stretch_of_a_longer_text(make, ids):
    model = tiny_model("llama")
    corrupted, where = mask_tokens(ids.repeat(3, 1), p=0.4, token_id=1, seed=3)
    found = epochs(make(**OPTIONS | FRESH))
    for e, (x, is_masked) in enumerate(found):
        part = slice(e * len(ids), (e + 1) * len(ids))
        assert torch.equal(is_masked, where[part].flatten())
        assert torch.allclose(x, activations(model, corrupted[part], block=1).flatten(0, 1), atol=1e-5)
    assert not torch.equal(found[0][1], found[1][1]) and not torch.equal(found[1][1], found[2][1])
    fixed = epochs(make(**OPTIONS))
    assert equal(fixed[0], found[0]) and equal(fixed[0], fixed[1]) and equal(fixed[0], fixed[2])


@pytest.mark.parametrize(
    "changes", [FRESH, NOISY, FRESH | NOISY, FRESH | {"noise": 0.5}, FRESH | {"share": 0.6, "pool_tokens": 999}]
)
@pytest.mark.parametrize("taken", [13, 24])  # of 12 an epoch
def test_draws_resume_anywhere_and_do_not_depend_on_who_makes_the_pools(make, changes, taken):
    stream = make(**OPTIONS | changes)
    expected = batches(stream)
    batches(later := make(**OPTIONS | changes), taken)
    resumed = make(**OPTIONS | changes)
    resumed.load_state_dict(later.state_dict())
    assert equal(batches(resumed, 40 - taken), expected[taken:])
    assert equal(batches(make(**OPTIONS | changes, overlap=True)), expected)


@pytest.mark.parametrize("changes", [FRESH, NOISY, FRESH | {"noise": 0.5}])
def test_another_seed_draws_others(make, changes):
    one, other = (batches(make(**OPTIONS | changes | {"mask_seed": seed}), 1)[0] for seed in (3, 4))
    assert not torch.equal(one, other) and torch.equal(one, batches(make(**OPTIONS | changes), 1)[0])


@pytest.mark.parametrize("changes", [FRESH, NOISY])
def test_training_goes_on_after_a_kill_and_snapshots_change_nothing(make, tmp_path, changes):
    whole = masksae.train(SAES, make(**OPTIONS | changes), CONFIG, progress=False)

    class Stop(Exception):
        pass

    def stopping(sae, record):
        if record["step"] == 33:  # in the third epoch
            raise Stop

    config = masksae.TrainConfig(
        steps=40, lr=1e-3, warmup=2, threshold_start=5, snapshots=(15,), checkpoint_every=7, log_every=1
    )
    with pytest.raises(Stop):
        masksae.train(SAES, make(**OPTIONS | changes), config, checkpoint_dir=tmp_path, progress=False, log=stopping)
    resumed = masksae.train(SAES, make(**OPTIONS | changes), config, checkpoint_dir=tmp_path, progress=False)
    assert all(torch.equal(a, b) for x, y in zip(whole, resumed) for a, b in zip(x.parameters(), y.parameters()))


@pytest.mark.parametrize(
    "changes, words",
    [
        (FRESH, r"stream \(fresh_masks\)"),
        ({"noise": 0.1}, r"stream \(noise, noise_seed\)"),
        ({"noise": 0.1} | FRESH, r"stream \(noise, noise_seed, fresh_masks\)"),
    ],
)
def test_a_checkpoint_belongs_to_the_draws(make, tmp_path, changes, words):
    config = masksae.TrainConfig(steps=9, lr=1e-3, warmup=1, threshold_start=5)
    masksae.train(SAES, make(**OPTIONS), config, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=words):
        masksae.train(SAES, make(**OPTIONS | changes), config, checkpoint_dir=tmp_path, progress=False)


def test_identities_tell_apart_what_differs_and_nothing_else(make):
    assert make(**OPTIONS | {"noise": 0.1}).identity() != make(**OPTIONS | {"noise": 0.2}).identity()
    clean = {"p": 0.0}
    assert make(**OPTIONS | NOISY).identity() != make(**OPTIONS | NOISY | {"mask_seed": 4}).identity()
    assert make(**OPTIONS | clean | FRESH).identity() == make(**OPTIONS | clean).identity()
    assert not {"fresh_masks", "noise", "noise_seed"} & make(**OPTIONS).identity().keys()  # checkpoints of before


@pytest.mark.parametrize("bos_id", [None, 1])
def test_noise_has_the_stated_share_of_the_variance(bos_id):
    """Against the definition, entry by entry, on enough tokens to tell .5 from .51."""
    ids = torch.randint(2, 128, (128, 40), generator=torch.Generator().manual_seed(1))
    if bos_id is not None:
        ids[:, 0] = bos_id
    model = SimpleNamespace(model=tiny_model("llama"))
    options = OPTIONS | {"bos_id": bos_id, "pool_tokens": 1000, "progress": False}
    clean, masked = epochs(from_model(model, ids, **options), 1)[0]
    noisy, also_masked = epochs(from_model(model, ids, noise=0.5, **options), 1)[0]
    assert torch.equal(masked, also_masked) and masked.any()
    noise, first = (noisy - clean).double(), clean[: from_model(model, ids, **options)._sizes[0]].double()
    variance = first.var(0, correction=0).mean()
    share = noise.square().mean() / variance
    assert share.item() == pytest.approx(0.25, rel=5 * math.sqrt(2 / noise.numel()))
    error = noise.square().mean().sqrt() / math.sqrt(len(noise))
    assert (noise.mean(0).abs() < 5 * error).all()
    covariance = noise.T @ noise / len(noise) / noise.square().mean()
    assert (covariance - torch.eye(16)).abs().max() < 5 * math.sqrt(2 / len(noise))
    with_x = noise.T @ (clean - clean.mean(0)).double() / len(noise)
    assert with_x.abs().max() < 5 * error * clean.std(0).max()
    neighbours = (noise[1:] * noise[:-1]).sum(1).mean() / noise.square().sum(1).mean()
    assert abs(neighbours) < 5 / math.sqrt(noise.numel())


def test_noise_is_not_the_masks_in_another_form(make):
    """Both come from one seed and one number; they must not come from the same random numbers."""
    from masksae.masking import draws

    assert draws(3, 5).random() == draws(3, 5).random() != draws(3, 5, stretch=1).random()
    normal = torch.from_numpy(draws(3, 5, stretch=1).standard_normal(100_000))
    uniform = torch.from_numpy(draws(3, 5).random(100_000))
    assert abs(torch.corrcoef(torch.stack([normal, uniform]))[0, 1]) < 5 / math.sqrt(100_000)


def test_noise_is_the_same_in_every_epoch_unless_it_is_fresh(make):
    clean = epochs(make(**OPTIONS | {"p": 0.0}), 1)[0][0]
    fixed, fresh = ([x - clean for x, _ in epochs(make(**OPTIONS | NOISY | c))] for c in ({}, FRESH))
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(fixed[0], fresh[0])
    cosines = torch.nn.functional.normalize(torch.stack(fresh).flatten(1), dim=1)
    assert (cosines @ cosines.T - torch.eye(3)).abs().max() < 5 / math.sqrt(fresh[0].numel())


def test_noise_does_not_depend_on_pools_shares_or_forwards_but_for_its_scale(make):
    clean = epochs(make(**OPTIONS | {"p": 0.0}), 1)[0][0]
    noise = epochs(make(**OPTIONS | NOISY), 1)[0][0] - clean
    few = epochs(make(**OPTIONS | NOISY, share=0.4, sequences=1), 1)[0][0]
    assert torch.allclose(few - clean[: len(few)], noise[: len(few)], atol=1e-5)
    other = epochs(make(**OPTIONS | NOISY | {"pool_tokens": 60}), 1)[0][0] - clean
    assert torch.allclose(other / other.std(), noise / noise.std(), atol=1e-4)


@pytest.mark.parametrize("changes", [NOISY, NOISY | FRESH])
def test_scratch_is_shared_with_the_stream_without_noise(make, ids, tmp_path, changes):
    list(islice(make(**OPTIONS | {"p": 0.0}, scratch=tmp_path), 13))
    files = sorted(tmp_path.iterdir())
    contents = [file.read_bytes() for file in files]
    language_model = SimpleNamespace(model=tiny_model("llama"))
    stream = from_model(language_model, ids, scratch=tmp_path, progress=False, **OPTIONS | changes)
    language_model.model = None
    expected = make(**OPTIONS | changes)
    pairs = [(a, b) for a, b in zip(batches(stream), batches(expected), strict=True)]
    assert all(torch.allclose(a, b, rtol=0, atol=2e-3 * b.abs().max()) for a, b in pairs)  # half precision
    assert sorted(tmp_path.iterdir()) == files and [file.read_bytes() for file in files] == contents


def test_fresh_masks_need_no_scratch_where_nothing_is_masked(make, tmp_path):
    clean = {"p": 0.0} | FRESH
    assert equal(*(batches(make(**OPTIONS | c, scratch=tmp_path)) for c in (clean, {"p": 0.0})))
    with pytest.raises(ConfigError, match="fresh_masks gives other activations in every epoch, which scratch cannot"):
        make(**OPTIONS | FRESH, scratch=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("changes", [{}, FRESH])
def test_clean_targets_stay_clean(make, changes):
    clean = make(**OPTIONS | {"p": 0.0})
    stream = make(**OPTIONS | changes | {"noise": 0.5}).with_targets(make(**OPTIONS | {"p": 0.0}))
    targets = [view[2] for [view] in islice(stream.batches([(0, False)]), 40)]
    assert equal(targets, batches(clean))


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), True, "0.1", None])
def test_noise_that_cannot_be_is_refused(make, noise):
    with pytest.raises(ConfigError, match="noise is the standard deviation .* a finite number from 0, found"):
        make(**OPTIONS | {"noise": noise})


def test_noise_is_sized_by_what_is_no_sink(make):
    options = OPTIONS | {"p": 0.0, "pool_tokens": 999, "sinks": 1.1}
    x, noisy = (make(**options | changes)._load(0)[0] for changes in ({}, NOISY))
    ordinary = x[~is_sink(x, 1.1)]
    assert 20 < len(ordinary) < len(x) - 5
    wanted = 0.5 * (ordinary - ordinary.mean(0)).square().mean().sqrt()
    whole = 0.5 * (x - x.mean(0)).square().mean().sqrt()
    assert (noisy - x).std().item() == pytest.approx(wanted.item(), rel=0.05) and abs(whole / wanted - 1) > 0.05


def test_orders_are_not_the_masks_in_another_form():
    """The seed of a pair's masks is the seed of an SAE's own order, and a block may have the number of a visit."""
    from masksae.masking import draws, mask_tokens

    x = torch.arange(64.0)[:, None]
    for seed, visit in ((100, 0), (100, 3)):
        stream = masksae.ActivationStream.from_array(x, batch_size=64, seed=seed)
        order = next(islice(stream, visit, None))[0].flatten().long()
        assert sorted(order.tolist()) == list(range(64))
        of_masks, of_noise = (draws(seed, visit, stretch).permutation(64).tolist() for stretch in (0, 1))
        assert order.tolist() not in (of_masks, of_noise)
        is_masked = mask_tokens(torch.zeros(1, 64).long(), p=0.5, token_id=1, seed=seed, first_sequence=visit)[1]
        assert torch.equal(is_masked[0], torch.from_numpy(draws(seed, visit).random(64) < 0.5))  # what they start with
