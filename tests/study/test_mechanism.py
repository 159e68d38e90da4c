"""The simulated world is what it says, and its two kinds of absorption come apart."""

from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from masksae import SAE, BatchTopK, SAEConfig, load_profile
from masksae.study.figures import mechanism as figures
from masksae.study.figures import style
from masksae.study.scores import mechanism
from masksae.study.scores.mechanism import World
from masksae.study.sections import Simulation
from masksae.study.stats import Effect

OPTIONS = Simulation(seeds=2, qs=[0.5, 1.0], ks=[2], ps=[0.3], main_p=0.3)


def test_samples_are_sums_of_the_features_they_name():
    world = World(0)
    samples, features = world.sample(4000, p=0.0, seed=0), world.directions()
    common = samples.word >= 0
    expected = features["words"][samples.word[common]] + 0.7 * samples.parents[common].float() @ features["parents"]
    assert (samples.x[common] - expected).std().item() == pytest.approx(0.02, rel=0.05)
    assert not samples.is_masked.any() and common.double().mean().item() == pytest.approx(0.5, abs=0.05)
    for word in range(16):  # at q = 1 every common word has the same parents, always
        [found] = samples.parents[samples.word == word].unique(dim=0).tolist()
        assert sum(bit << parent for parent, bit in enumerate(found)) == word
    assert 0.4 < samples.parents[~common].double().mean() < 0.6  # with rare words, parents come and go
    assert (1 + samples.parents.double().sum(1)).mean().item() == pytest.approx(3, abs=0.05)  # active features


@pytest.mark.parametrize("q", [0.5, 0.7, 0.9])
def test_a_cross_token_parent_comes_with_its_words_with_probability_q(q):
    samples = World(0, q).sample(60_000, p=0.0, seed=0)
    common = samples.word >= 0
    for kind, expected in (("same", 1.0), ("cross", q)):
        parents = samples.parents[common][:, mechanism.KINDS[kind]]
        belongs = mechanism.comes_with(samples.word[common], kind)
        assert parents[belongs].double().mean().item() == pytest.approx(expected, abs=0.01)
        assert not parents[~belongs].any()
    assert samples.parents[~common][:, 2:].double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_mask_breaks_only_what_comes_from_another_token():
    samples = World(1).sample(20_000, p=0.3, seed=0)
    assert samples.is_masked.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not samples.parents[samples.is_masked, :2].any()  # a parent of the word's own goes with the word
    after = (samples.word >= 0) & mechanism.comes_with(samples.word, "cross")[:, 0]
    kept = samples.parents[after, 2].double().mean().item()
    assert kept == pytest.approx(0.7, abs=0.02)  # the context is masked or not
    assert samples.parents[samples.word == 1, 0].all()


def perfect(world, folded: int | None = None):
    """An SAE with a latent per parent and word; `folded`: this word's latent holds its parents, which stay silent on
    it."""
    features = world.directions()
    rows = torch.cat([features["parents"], features["words"]])
    sae = SAE(SAEConfig(64, 20, BatchTopK(2))).requires_grad_(False)
    encode = torch.linalg.pinv(rows)  # [64, 20]: each latent reads its own feature only
    sae.W_enc.copy_(encode)
    sae.W_dec.copy_(rows)
    if folded is not None:
        sae.W_dec[4 + folded] = torch.nn.functional.normalize(rows[4 + folded] + rows[:4].sum(0), dim=0)
        sae.W_enc[:, :4] -= encode[:, [4 + folded]]
    return sae


def test_absorption_of_a_perfect_and_of_a_planted_sae():
    world = World(0)
    clean = world.sample(8000, p=0.0, seed=1)
    found = mechanism.absorption(perfect(world), world, clean, 0.3)
    assert found["same"] == found["cross"] == 0 and min(found["same_f1"], found["cross_f1"]) > 0.7
    planted = mechanism.absorption(perfect(world, folded=15), world, clean, 0.3)  # word 15 of each parent's eight
    assert planted["same"] == planted["cross"] == 1 / 8
    assert planted["same_f1"] == pytest.approx(found["same_f1"], abs=0.15)  # the latents are there all the same


def test_f1_tells_a_latent_that_is_missing_from_one_that_is_absorbed():
    """A silent main latent with nobody to take its place is no absorption: the score is 0, and only F1 says so."""
    world = World(0)
    clean, sae = world.sample(8000, p=0.0, seed=1), perfect(world)
    sae.b_enc[2:4] = -9.0
    found = mechanism.absorption(sae, world, clean, 0.3)
    assert found["cross"] == 0 and found["cross_f1"] == 0 and found["same_f1"] > 0.7


@pytest.fixture(scope="module")
def rows():
    cells = [cell for cell in mechanism.grid(OPTIONS) if cell["q"] == 1.0 or cell["rule"] == "TopK"]
    return [row for cell in cells for row in mechanism.simulate(steps=250, **cell)]


@pytest.fixture(scope="module")
def found(rows):
    return {(e["rule"], e["kind"], e["q"], e["arm"]): e for e in mechanism.effects(rows)}


def test_every_cell_is_there_once(rows):
    cells = mechanism.grid(Simulation(seeds=2, qs=[0.5, 1.0], ks=[2, 3], ps=[0.1, 0.3], main_p=0.3))
    assert len({tuple(sorted(cell.items())) for cell in cells}) == len(cells) == 2 * 2 * (3 * 3 + 2)
    keys = ("seed", "rule", "arm", "p", "q", "k", "mode")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)


def test_masking_the_context_removes_cross_token_absorption_only(found):
    for rule in mechanism.RULES:
        cross, same = (found[rule, kind, 1.0, "dropped"] for kind in ("cross", "same"))
        assert cross["baseline"] > 0.3 and cross["difference"] < -0.1, rule
        assert same["baseline"] > 0.3 and same["difference"] > -0.25, rule
        assert Effect.from_dict(cross).pairs == 2


def test_where_the_context_leaves_it_open_there_is_nothing_to_absorb(found):
    sure, open_ = (found["TopK", "cross", q, "dropped"]["baseline"] for q in (1.0, 0.5))
    assert open_ < 0.1 < sure - 0.2


def test_clean_l0_of_batch_topk_moves_where_masked_positions_are_kept_and_that_of_topk_never(rows):
    def l0(rule, arm, mode):
        return [row["l0"] for row in rows if (row["rule"], row["arm"], row["mode"]) == (rule, arm, mode)]

    assert min(l0("BatchTopK", "kept", "as_trained")) > 2.5 > 2.1 > max(l0("BatchTopK", "unmasked", "as_trained"))
    assert l0("BatchTopK", "kept", "matched") == pytest.approx([2] * 2, abs=1e-3)
    for arm in figures.ARMS:
        assert max(l0("TopK", arm, "as_trained")) <= 2
        assert l0("TopK", arm, "as_trained") == l0("TopK", arm, "matched")


def test_same_seed_same_rows(rows):
    again = mechanism.simulate(0, q=1.0, k=2, p=0.0, rule="TopK", steps=250)
    assert again == [
        row for row in rows if (row["seed"], row["rule"], row["arm"], row["q"]) == (0, "TopK", "unmasked", 1.0)
    ]


def test_predictions_are_the_effects_in_words(found, rows):
    table = mechanism.predictions(mechanism.effects(rows), OPTIONS)
    assert len(table) == 2 + 1 + 2 and all({"kept", "dropped"} <= set(row) for row in table)
    for row in table:
        kind, q = row["parent"].removesuffix("-token"), row["P(parent | word)"]
        effect = found[row["rule"], kind, q, "dropped"]
        word, rest = row["dropped"].split(",", 1)
        assert f"{effect['baseline']:.2f} → {effect['treated']:.2f}" in rest
        clear = effect["low"] * effect["high"] > 0 and max(effect["baseline"], effect["treated"]) >= 0.05
        assert clear == (word in ("falls", "rises"))
        assert (word == "falls") == (clear and effect["difference"] < 0)


def test_unmasked_saes_of_other_k_give_the_score_at_equal_l0():
    row = {"rule": "BatchTopK", "mode": "as_trained", "q": 1.0, "seed": 0, "p": 0.0, "arm": "unmasked"}
    plain = [row | {"k": k, "l0": k, "same": s, "cross": c} for k, s, c in ((2, 0.6, 0.4), (4, 0.2, 0.0))]
    kept = row | {"arm": "kept", "p": 0.3, "k": 2, "l0": 8**0.5, "same": 0.1, "cross": 0.3}
    effects = mechanism.at_equal_l0([*plain, kept], OPTIONS)
    assert effects["same"].difference == pytest.approx(0.1 - 0.4)
    assert effects["cross"].difference == pytest.approx(0.3 - 0.2)
    assert mechanism.at_equal_l0([*plain, kept | {"l0": 5.0}], OPTIONS) == {}


def test_pictures_are_byte_stable_and_complete(rows, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    style.style()
    draw = {"curves": lambda: figures.draw_curves(rows, 0.3), "phases": lambda: figures.draw_phases(rows)}
    for name, make in draw.items():
        for folder in ("a", "b"):
            figure = make()
            run = SimpleNamespace(figures=tmp_path / folder, profile=load_profile("smoke"))
            style.save_figure(run, name, figure, "A caption.", simulated=True)
            matplotlib.pyplot.close(figure)
        for suffix in (".svg", ".png", ".txt"):
            first, second = (tmp_path / folder / f"{name}{suffix}" for folder in "ab")
            assert first.read_bytes() == second.read_bytes()
        assert (tmp_path / "a" / f"{name}.txt").read_text() == "A caption. Profile smoke.\n"
        titles = {axis.get_title() for axis in figure.axes}
        assert titles == {f"{rule}: {title}" for rule in mechanism.RULES for title in figures.PARENTS.values()}
        assert len(figure.axes[0].containers) == {"curves": 3, "phases": 2}[name]  # lines with bars, of each arm
        shown = figure.axes[0].containers[0].lines[0].get_ydata()
        mine = [r["same"] for r in rows if (r["rule"], r["arm"], r["q"]) == ("TopK", "unmasked", 1.0)]
        assert name == "phases" or shown[-1] == pytest.approx(fmean(mine))
