"""The simulated world is what it says, and its two kinds of absorption come apart."""

from types import SimpleNamespace

import pytest
import torch

from masksae import SAE, BatchTopK, SAEConfig, load_profile
from masksae.study.figures import mechanism as figures
from masksae.study.figures import style
from masksae.study.scores import mechanism
from masksae.study.scores.mechanism import World
from masksae.study.stats import Effect


def test_samples_are_sums_of_the_features_they_name():
    world = World(0)
    samples, features = world.sample(4000, p=0.0, seed=0), world.directions()
    common = samples.word >= 0
    expected = features["words"][samples.word[common]] + 0.7 * samples.parents[common].float() @ features["parents"]
    assert (samples.x[common] - expected).std().item() == pytest.approx(0.02, rel=0.05)
    assert not samples.is_masked.any() and common.double().mean().item() == pytest.approx(0.5, abs=0.05)
    for word in range(16):  # every common word has one pair of parents, always
        assert samples.parents[samples.word == word].unique(dim=0).tolist() == [[word % 2 == 0, word < 8]]
    assert 0.4 < samples.parents[~common].double().mean() < 0.6  # with rare words, parents come and go


def test_a_mask_breaks_only_what_comes_from_another_token():
    samples = World(1).sample(20_000, p=0.3, seed=0)
    assert samples.is_masked.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not samples.parents[samples.is_masked, 0].any()  # the same-token parent goes with the word
    after = (samples.word >= 0) & (samples.word < 8)
    assert samples.parents[after, 1].double().mean().item() == pytest.approx(
        0.7, abs=0.02
    )  # the context is masked or not
    assert samples.parents[samples.word == 2, 0].all()


def perfect(world, folded: int | None = None):
    """An SAE with a latent per parent and word; `folded`: this word's latent holds its parents, which stay silent on
    it."""
    features = world.directions()
    rows = torch.cat([features["parents"], features["words"]])
    sae = SAE(SAEConfig(64, 18, BatchTopK(2))).requires_grad_(False)
    encode = torch.linalg.pinv(rows)  # [64, 18]: each latent reads its own feature only
    sae.W_enc.copy_(encode)
    sae.W_dec.copy_(rows)
    if folded is not None:
        sae.W_dec[2 + folded] = torch.nn.functional.normalize(rows[2 + folded] + rows[0] + rows[1], dim=0)
        sae.W_enc[:, :2] -= encode[:, [2 + folded]]
    return sae


def test_absorption_of_a_perfect_and_of_a_planted_sae():
    world = World(0)
    clean = world.sample(8000, p=0.0, seed=1)
    assert mechanism.absorption(perfect(world), world, clean, 0.3) == (0, 0)
    assert mechanism.absorption(perfect(world, folded=4), world, clean, 0.3) == (1 / 8, 1 / 8)  # word 4 of eight each


@pytest.fixture(scope="module")
def rows():
    cells = [{"p": 0.0}, {"p": 0.3}, {"p": 0.3, "drop_masked": True}]
    return [row for seed in range(3) for cell in cells for row in mechanism.simulate(seed, k=1.2, n_latents=24, **cell)]


def test_masking_removes_cross_token_absorption_only(rows):
    dropped = {e["parent"]: e for e in mechanism.effects(rows, "masked, dropped")}
    assert dropped["cross"]["baseline"] > 0.3 and dropped["cross"]["difference"] < -0.25
    assert abs(dropped["same"]["difference"]) < 0.25 and dropped["same"]["baseline"] > 0.4
    assert Effect.from_dict(dropped["cross"]).pairs == 3


def test_kept_positions_raise_clean_l0_and_matching_restores_it(rows):
    l0 = lambda arm, mode: [row["l0"] for row in rows if row["arm"] == arm and row["mode"] == mode]
    assert min(l0("masked, kept", "as_trained")) > 1.4 > 1.25 > max(l0("unmasked", "as_trained"))
    assert l0("masked, kept", "matched") == pytest.approx([1.2] * 3, abs=1e-3)


def test_same_seed_same_rows(rows):
    assert mechanism.simulate(0, k=1.2, n_latents=24, p=0.0) == [
        r for r in rows if r["seed"] == 0 and r["arm"] == "unmasked"
    ]


def test_pictures_are_byte_stable_and_complete(rows, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    style.style()
    many = [{**row, "k": k, "l0": row["l0"] + k} for row in rows for k in (1.2, 1.5)]
    draw = {
        "curves": lambda: figures.draw_curves(many, 0.3),
        "phases": lambda: figures.draw_phases(mechanism.effects(many, "masked, dropped"), 0.3),
    }
    for name, make in draw.items():
        for folder in ("a", "b"):
            figure = make()
            run = SimpleNamespace(figures=tmp_path / folder, profile=load_profile("smoke"))
            style.save_figure(run, name, figure, "A caption.", simulated=True)
            matplotlib.pyplot.close(figure)
        for suffix in (".svg", ".png", ".txt"):
            assert (tmp_path / "a" / f"{name}{suffix}").read_bytes() == (
                tmp_path / "b" / f"{name}{suffix}"
            ).read_bytes()
        assert (tmp_path / "a" / f"{name}.txt").read_text() == "A caption. Profile smoke.\n"
        texts = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert name == "curves" or len(texts) == 4 and all(text[0] in "+−" for text in texts)
        titles = {axis.get_title() for axis in figure.axes if axis.get_title()}
        assert titles == set(figures.PARENTS.values())
