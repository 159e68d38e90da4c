"""Masking in a world of known features: what a masked token takes along, scores of dictionaries that are right or wrong
in a known way, and MCC against SAELens 6.54.

The peers live in an environment of their own: `make test-peers`. Elsewhere these tests are skipped.
"""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

pytest.importorskip("sae_lens")

import synthetic
from sae_lens.synthetic import mean_correlation_coefficient
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from synthetic import ARMS, MASK_NORM, PAGE, PARENTS, SCORES, Cell, Settings, World, lens_scores, parent_scores

from masksae.errors import DataError
from masksae.files import read_json
from masksae.metrics.reconstruction import reconstruction

P = 0.3
SMALL = Settings(seeds=1, samples=16_384, held_out=8192, n_latents=64, k=6, steps=600, batch=256, lr=2e-3)


def small_world(seed: int = 0) -> World:
    return World(seed, n_features=256, d_model=64, n_roots=8)


@pytest.fixture(scope="module")
def world():
    return small_world()


@pytest.fixture(scope="module")
def features(world):
    return torch.cat(list(world.features(16_384, seed=1)))


@pytest.fixture(scope="module")
def masked(world, features):
    return world.mask(features, P, torch.Generator().manual_seed(0))


def near(share: float, expected: float, n: int) -> bool:
    """Within four standard errors of a share of n draws."""
    return abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_the_world_is_the_benchmarks(world, features):
    """Children fire only where their parent does, siblings exclude one another, and each kind has its trees."""
    active = features > 0
    for root in world.model.hierarchy.roots:
        for node in (root, *root.children):
            children = active[:, [child.feature_index for child in node.children]]
            assert not (children & ~active[:, [node.feature_index]]).any() and children.sum(1).max() == 1
    assert [len(world.parents[kind]) for kind in PARENTS] == [4, 4, 32]
    kinds = [tuple(World(seed, 256, 64, 8).kind_of.values()) for seed in range(4)]
    assert all(sorted(of_root) == ["context", "cross", "cross", "word"] for of_root in zip(*kinds))
    first = features[: synthetic.CHUNK]
    assert torch.equal(first, next(world.features(len(features), seed=1)))
    assert not torch.equal(first, next(world.features(len(features), seed=2)))


def test_a_masked_token_takes_along_what_it_set(world, features, masked):
    left, is_masked = masked
    stays = left > 0
    assert near(is_masked.float().mean().item(), P, len(features))
    assert torch.equal(left[stays], features[stays])  # nothing is added or changed
    assert not left[is_masked][:, world.owner == 0].any()
    assert torch.equal(left[~is_masked][:, world.owner == 0], features[~is_masked][:, world.owner == 0])
    for root, kind in world.kind_of.items():
        below = world.descendants[root]
        together = (features[:, root] > 0) & (features[:, below] > 0).any(1)
        child_left, root_left, n = stays[together][:, below].any(1), stays[together, root], int(together.sum())
        assert near(root_left.float().mean().item(), 1 - P, n) and near(child_left.float().mean().item(), 1 - P, n)
        if kind == "cross":  # parent and child come apart, either way
            assert near((root_left & ~child_left).float().mean().item(), P * (1 - P), n)
            assert near((child_left & ~root_left).float().mean().item(), P * (1 - P), n)
        else:
            assert torch.equal(child_left, root_left)
    inner = torch.tensor(world.parents["inner"])
    assert all(not (stays[:, world.descendants[int(i)]].any(1) & ~stays[:, i]).any() for i in inner)


def test_activations_are_sums_of_what_is_left(world, masked):
    left, is_masked = masked
    extra = world.activations(left, is_masked) - world.activations(left)
    assert not extra[~is_masked].any()
    assert torch.allclose(extra[is_masked].norm(dim=1), torch.tensor(MASK_NORM), atol=1e-4)
    assert torch.allclose(extra[is_masked], extra[is_masked][0], atol=1e-5)
    assert torch.allclose(world.activations(left), left @ world.directions + world.model.feature_dict.bias, atol=1e-4)


def test_arms_see_the_same_samples(world):
    clean, changed, is_masked = world.training_data(5000, P)
    again = world.training_data(5000, P)
    assert all(torch.equal(a, b) for a, b in zip((clean, changed, is_masked), again))
    assert torch.equal(clean, world.activations(torch.cat(list(world.features(5000, seed=0)))))
    untouched = (clean == changed).all(1)
    assert 0 < untouched.float().mean() < 1 and not untouched[is_masked].any()


def test_the_true_dictionary_tells_every_parent(world, features):
    found = parent_scores(world, features, features, world.directions)
    assert set(found) == set(PARENTS)
    assert all(scores == {"recall": 1.0, "absorption": 0.0, "f1": 1.0} for scores in found.values())
    assert mcc(world.directions, world.directions) == pytest.approx(1, abs=1e-6)


def absorbing(world, features, parent: int, child: int):
    """The true dictionary, but the parent's latent is silent where that child is active, whose latent carries the
    parent's direction instead, eight times its own."""
    latents, w_dec = features.clone(), world.directions.clone()
    latents[features[:, child] > 0, parent] = 0
    w_dec[child] += 8 * world.directions[parent]
    return latents, w_dec


@pytest.mark.parametrize("kind", ["same", "cross"])
def test_a_planted_absorber_is_found_in_the_share_that_was_planted(world, features, kind):
    parent = world.parents[kind][1]
    child = world.descendants[parent][0]
    latents, w_dec = absorbing(world, features, parent, child)
    half = features[len(features) // 2 :]
    share = (half[half[:, parent] > 0, child] > 0).double().mean().item()
    assert 0.1 < share < 0.5
    found, size = parent_scores(world, features, latents, w_dec), len(world.parents[kind])
    assert found[kind]["absorption"] == pytest.approx(share / size, abs=1e-6)
    assert found[kind]["recall"] == pytest.approx(1 - share / size, abs=1e-6)
    other = parent_scores(world, features, latents, w_dec)["cross" if kind == "same" else "same"]
    assert other == {"recall": 1.0, "absorption": 0.0, "f1": 1.0}


def test_a_missing_parent_is_lost_and_not_absorbed(world, features):
    """No latent for it, and its children's carry as much of it as features in superposition do by chance: next to
    nothing."""
    parent = world.parents["same"][0]
    latents = features.clone()
    latents[:, parent] = 0
    flat = torch.eye(256)  # no superposition
    found = parent_scores(_Flat(world, flat), features, latents, flat)
    assert found["same"] == {"recall": 0.75, "absorption": 0.0, "f1": 0.75}


class _Flat:
    """A world whose directions are orthogonal."""

    def __init__(self, world, directions):
        self.parents, self.descendants, self.directions = world.parents, world.descendants, directions


def mcc(a, b) -> float:
    """Mean |cosine| of the best one-to-one matching of rows: double precision, and another algorithm than sae_lens's
    (sparse Jonker-Volgenant instead of the Hungarian one)."""
    a, b = (torch.nn.functional.normalize(v.double(), dim=1) for v in (a, b))
    cosine = (a @ b.T).abs().numpy()
    row, column = min_weight_full_bipartite_matching(csr_array(2 - cosine))
    return float(cosine[row, column].mean())


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_mcc_is_that_of_every_matching_tried(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    a, b = (torch.randn(n, 3, generator=generator) for n in shape)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).abs()
    cosine = cosine if shape[0] <= shape[1] else cosine.T
    tried = permutations(range(cosine.shape[1]), cosine.shape[0])
    best = max(cosine[range(len(cosine)), columns].mean().item() for columns in map(list, tried))
    assert mcc(a, b) == pytest.approx(best, abs=1e-6) == mean_correlation_coefficient(a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The rows of three arms, and the SAEs that they are of."""
    path, saes, inner = tmp_path_factory.mktemp("synthetic") / "scores.json", {}, synthetic.train_cell
    cells = [Cell("TopK", arm) for arm in ARMS] + [Cell("BatchTopK", "kept")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "train_cell", lambda cell, *given: saes.setdefault(cell, inner(cell, *given)))
        synthetic.run(SMALL, cells, path, make=small_world)
    return path, cells, saes


def test_scores_are_those_of_sae_lens(world, trained):
    path, cells, saes = trained
    held_out = torch.cat(list(world.features(SMALL.held_out, seed=1)))
    x = world.activations(held_out)
    for cell, sae in saes.items():
        theirs, ours = lens_scores(world, sae, held_out), reconstruction(sae, x)
        assert mcc(sae.W_dec.detach(), world.directions) == pytest.approx(theirs["mcc"], abs=1e-5)
        assert ours.ev_centred == pytest.approx(theirs["explained_variance"], abs=1e-4)
        assert ours.l0 == pytest.approx(theirs["sae_l0"], abs=1e-4)
        row = next(r for r in read_json(path)["rows"] if (r["rule"], r["arm"]) == (cell.rule, cell.arm))
        assert row["mcc"] == pytest.approx(theirs["mcc"], abs=1e-6) and row["silent"] == theirs["dead_latents"]


def test_training_finds_features_and_absorbs_parents(world, trained):
    path, _, saes = trained
    rows = read_json(path)["rows"]
    assert [(r["rule"], r["mode"]) for r in rows] == [("TopK", "as_trained")] * 3 + [
        ("BatchTopK", "as_trained"),
        ("BatchTopK", "matched"),
    ]
    [matched] = [r for r in rows if r["mode"] == "matched"]
    assert matched["l0"] == pytest.approx(SMALL.k, abs=0.01)
    untrained = synthetic.SAE(next(iter(saes.values())).config)
    for row in rows:
        assert row["mcc"] > mcc(untrained.W_dec.detach(), world.directions) + 0.1
        for kind in PARENTS:
            assert 0 <= row[f"absorption_{kind}"] and row[f"absorption_{kind}"] + row[f"recall_{kind}"] <= 1 + 1e-6
    assert rows[0]["absorption_same"] > 0.1


def test_a_run_goes_on_where_it_was(trained, monkeypatch):
    path, cells, _ = trained
    before = path.read_bytes()
    monkeypatch.setattr(synthetic, "train_cell", None)
    synthetic.run(SMALL, cells, path, make=small_world)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="other settings"):
        synthetic.run(replace(SMALL, k=7), cells, path, make=small_world)


def rows_of(changes: dict[str, list[float]]) -> list[dict]:
    """Rows of TopK whose scores are .5 in the unmasked arm and differ by so much in another, a world each."""
    known = dict(rule="TopK", penalty="", mode="as_trained", l0=6.0, silent=0)
    names = {*synthetic.MEASURED, *(f"{score}_inner" for score in ("absorption", "f1"))}
    return [
        known | {"seed": seed, "arm": arm} | dict.fromkeys(names, 0.5 + (change if arm != "unmasked" else 0))
        for other, differences in changes.items()
        for seed, change in enumerate(differences)
        for arm in {"unmasked", other}
    ]


@pytest.mark.parametrize(
    ("changes", "word"), [([-0.2, -0.1], "undecided"), ([-0.2, -0.21], "falls"), ([0.2, 0.21], "grows")]
)
def test_words_follow_the_intervals(changes, word):
    """Two worlds: the interval is the mean difference -+ 12.706 standard errors."""
    found = synthetic.effects(rows_of({"kept": changes}))
    assert {(e["comparison"], e["score"]) for e in found} == {("TopK: kept", score) for score in synthetic.MEASURED}
    middle, error = sum(changes) / 2, abs(changes[0] - changes[1]) / 2
    low, high = middle - 12.7062 * error, middle + 12.7062 * error
    assert synthetic.describe(found[0]) == f"{middle:+.3f} ({low:+.3f} to {high:+.3f}) {word}"
    text = synthetic.tables({"settings": vars(SMALL), "rows": rows_of({"kept": changes})})
    assert f"arm `kept`: absorption changes by TopK {synthetic.describe(found[0])}." in text
    page = f"a\n{synthetic.BEGIN}old{synthetic.END}\nb"
    assert synthetic.with_tables(page, text) == f"a\n{synthetic.BEGIN}{text}{synthetic.END}\nb"


def test_the_page_and_the_effects_are_those_of_the_scores():
    record = read_json(SCORES)
    assert synthetic.with_tables(PAGE.read_text(), synthetic.tables(record)) == PAGE.read_text()
    assert read_json(synthetic.EFFECTS) == synthetic.effects(record["rows"])
    assert record["settings"] | {"seeds": Settings().seeds} == vars(Settings())
    cells = {tuple(row[name] for name in ("seed", "rule", "arm", "penalty")) for row in record["rows"]}
    assert cells == {(seed, *vars(cell).values()) for seed in range(Settings().seeds) for cell in synthetic.CELLS}


def test_what_is_said_of_the_world_is_what_was_measured():
    rows = read_json(SCORES)["rows"]
    found = {(e["comparison"], e["score"]): e for e in synthetic.effects(rows) if e["mode"] == "as_trained"}
    side = lambda name, score: (lambda e: (e["low"] > 0) - (e["high"] < 0))(found[name, score])
    for arm in ("kept", "dropped"):
        assert side(f"TopK: {arm}", "absorption_same") == 0 and side(f"TopK: {arm}", "absorption_cross") == -1
    matched = {(e["comparison"], e["score"]): e for e in synthetic.effects(rows) if e["mode"] == "matched"}
    assert found["TopK: dropped", "absorption_same"]["low"] == pytest.approx(-0.19, abs=0.005)
    for rule in ("BatchTopK", "Matryoshka BatchTopK"):
        kept, dropped = (matched[f"{rule}: {arm}", "absorption_same"] for arm in ("kept", "dropped"))
        assert kept["high"] < 0 and dropped["low"] < 0 < dropped["high"]
    at = {(r["seed"], r["rule"], r["penalty"], r["arm"]): r for r in rows if r["mode"] == "as_trained"}
    worlds = {row["seed"] for row in rows}
    cross = lambda seed, arm: at[seed, "TopK", "", arm]["absorption_cross"]
    assert all(cross(seed, "kept") < cross(seed, "dropped") for seed in worlds)
    l0 = lambda seed, arm: at[seed, "Matryoshka BatchTopK", "", arm]["l0"]
    assert all(l0(seed, "kept") > l0(seed, "dropped") > l0(seed, "unmasked") for seed in worlds)
    assert side("TopK + OrtSAE: kept", "absorption_cross") == -1
    for kind in ("same", "cross"):
        assert side("TopK: OrtSAE", f"absorption_{kind}") == -1
        change = lambda name, kind=kind: found[name, f"absorption_{kind}"]["difference"]
        assert change("Matryoshka BatchTopK in place of TopK") < change("TopK: OrtSAE")
    worst = lambda score: min(at, key=lambda cell: at[cell][score])
    assert {worst(score)[2] for score in ("ev", "mcc", "f1_inner")} == {"C2R"}
    for seed in worlds:
        full, tenth, none = (at[seed, "TopK", p, "unmasked"] for p in ("C2R", "C2R at a tenth", ""))
        assert full["absorption_same"] < 0.05 and full["absorption_cross"] < 0.05
        assert full["absorption_same"] < tenth["absorption_same"] < none["absorption_same"]
        assert all(full[score] < tenth[score] < none[score] for score in ("ev", "mcc", "f1_inner"))
