"""Ground truth at scale: what masking does to SAEs in a world of thousands of known features (SynthSAEBench, Chanin and
Garriga-Alonso 2026, arXiv 2602.14687; `sae_lens.synthetic` of SAELens 6.54).

    make synthetic                                          # both of these
    .venv-peers/bin/python benchmarks/synthetic.py          # train and score: results/synthetic/scores.json
    .venv/bin/python benchmarks/synthetic.py --report       # effects, figure and the table of docs/synthetic.md

A cell is one SAE. Its scores are written when it is done, and cells that are there are skipped, so the run may be
stopped at any moment and costs one cell. All of it takes some ten minutes of one core.

The world is the benchmark's at an eighth of its features and a third of its width: Zipfian firing, trees in which a
child fires only where its parent does and siblings exclude one another, children scaled by their parent (its second
version), correlations of low rank. SAEs have a latent for every fourth feature and k about the number of active
features that such a dictionary could hold, as the benchmark recommends.

**What masking is here.** A sample of the benchmark is an activation at one position. What is active there was set by
some token: the word at the position, or one before it. So every feature gets an owner, a token, and a masked token
takes all its features with it. Three kinds of trees:

    word      root and subtree belong to the word at the position
    context   root and subtree belong to one token before it
    cross     the root belongs to a token before it, the rest of the tree to the word

Masking a token is then a drop of a root's subtree in the first two: parent and child go together and nothing that the
SAE learns from comes apart (**same-token** parents, as first letters are). In the third, the root goes and its children
stay, or the other way round (**cross-token** parents, "follows *the*"). Tokens are masked independently with
probability p. Where the word itself is masked the sample has a direction of its own, that of the special token, and
counts as masked: the arm `kept` trains on it, the arm `dropped` does not.

**Scores**, on clean samples that no SAE was trained on. Of the samples in which a parent is active, a share is *told*
(the parent's latent fires: recall), a share *absorbed* (it is silent, and latents of active descendants carry at least
40 % of what the parent adds along its direction), and the rest *lost*. The three sum to 1. A latent belongs to the
feature that it detects best, by F1, and the best of those that belong to a parent is the parent's; a parent without any
is never told. That is decided on one half of the samples and scored on the other. MCC is sae_lens's own.
"""

import argparse
import copy
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from masksae import C2R, SAE, ActivationStream, AuxK, BatchTopK, OrtSAE, SAEConfig, TopK, TrainConfig, train
from masksae.errors import DataError
from masksae.files import read_json, write_json, write_text
from masksae.metrics.absorption import SHARE
from masksae.metrics.reconstruction import calibrated_threshold, reconstruction
from masksae.study.stats import paired_effect

ROOT = Path(__file__).resolve().parents[1]
SCORES, EFFECTS = ROOT / "results/synthetic/scores.json", ROOT / "results/synthetic/effects.json"
FIGURE, PAGE = ROOT / "figures/synthetic/absorption", ROOT / "docs/synthetic.md"

KINDS = ("word", "cross", "context", "cross")
"""Of the trees in turn; each world begins at another, since trees are sorted by frequency."""
PARENTS = ("same", "cross", "inner")
"""Roots of word and context trees; roots of cross trees; what lies between roots and leaves (same-token in every
tree)."""
MASK_NORM = 5.0
"""Length of the special token's direction: the benchmark's largest mean magnitude."""
CHUNK = 4096
"""Samples that are drawn at a time."""
OWN_SEED = 10_000
"""Of SAEs, less that of their world: by the world's own seed an SAE would begin with the true directions, which the
benchmark draws in the same way."""


@dataclass(frozen=True)
class World:
    """Features, directions, trees and owners, drawn afresh from the seed."""

    seed: int
    n_features: int = 2048
    d_model: int = 256
    n_roots: int = 64
    """Trees of 1 + 4 + 16 features; two thirds of the features are in trees, as in the benchmark."""

    @cached_property
    def model(self):
        """The benchmark's `SyntheticModel`; its values are those of SynthSAEBench-16k but for the sizes, and directions
        are spread in 25 steps instead of 100 a fourth as long."""
        from sae_lens.synthetic import (
            FeatureDictionary,
            FoldedNormalMagnitudeConfig,
            HierarchyConfig,
            LinearMagnitudeConfig,
            LowRankCorrelationConfig,
            SyntheticModel,
            SyntheticModelConfig,
            ZipfianFiringProbabilityConfig,
            orthogonal_initializer,
        )

        config = SyntheticModelConfig(
            num_features=self.n_features,
            hidden_dim=self.d_model,
            firing_probability=ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=5e-4, exponent=0.5),
            hierarchy=HierarchyConfig(
                total_root_nodes=self.n_roots, branching_factor=4, max_depth=2, mutually_exclusive_portion=1.0,
                compensate_probabilities=True, scale_children_by_parent=True,
            ),
            correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=self.seed,
        )  # fmt: skip
        spread = orthogonal_initializer(num_steps=25, lr=1.2e-3)
        directions = FeatureDictionary(
            self.n_features, self.d_model, bias=config.bias, initializer=spread, seed=self.seed
        )
        return SyntheticModel(config, feature_dict=directions.requires_grad_(False))

    @property
    def directions(self) -> Tensor:
        """Unit vectors [n_features, d_model]."""
        return self.model.feature_dict.feature_vectors

    @cached_property
    def descendants(self) -> dict[int, list[int]]:
        """Every parent's features below it."""
        found = {}

        def walk(node) -> None:
            if node.children:
                found[node.feature_index] = [i for child in node.children for i in child.get_all_feature_indices()]
            for child in node.children:
                walk(child)

        for root in self.model.hierarchy.roots:
            walk(root)
        return found

    @cached_property
    def kind_of(self) -> dict[int, str]:
        """Root -> kind of its tree."""
        roots = [root.feature_index for root in self.model.hierarchy.roots]
        return {root: KINDS[(place + self.seed) % len(KINDS)] for place, root in enumerate(roots)}

    @cached_property
    def parents(self) -> dict[str, list[int]]:
        """Features of each of PARENTS."""
        groups: dict[str, list[int]] = {name: [] for name in PARENTS}
        for parent in self.descendants:
            kind = self.kind_of.get(parent)
            groups["inner" if kind is None else "cross" if kind == "cross" else "same"].append(parent)
        return groups

    @cached_property
    def owner(self) -> Tensor:
        """int64 [n_features]: the token that sets a feature; 0 is the word, 1, 2, ... are tokens before it. Features
        outside of trees belong to the word and to the others in turn."""
        owner, tokens = torch.zeros(self.n_features, dtype=torch.int64), 0
        for root, kind in self.kind_of.items():
            if kind != "word":
                tokens += 1
                owner[[root, *self.descendants[root]] if kind == "context" else [root]] = tokens
        free = range(max(map(max, self.descendants.values())) + 1, self.n_features)
        for place, feature in enumerate(free):
            owner[feature] = 0 if place % 2 == 0 else 1 + place // 2 % max(1, tokens)
        return owner

    def features(self, n: int, seed: int) -> Iterator[Tensor]:
        """Amounts [.., n_features] of n clean samples, in pieces; the same for the same n and seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.seed + seed)
            seeds = torch.randint(2**62, (-(-n // CHUNK),)).tolist()
        for place, own in enumerate(seeds):
            with torch.random.fork_rng(devices=[]):  # which the benchmark's sampling draws from
                torch.manual_seed(own)
                drawn = self.model.activation_generator.sample(min(CHUNK, n - place * CHUNK))
            yield drawn

    def mask(self, features: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is left of clean samples where tokens are masked with probability p, and bool [n]: the word is."""
        masked = torch.rand(len(features), int(self.owner.max()) + 1, generator=generator) < p
        return features * ~masked[:, self.owner], masked[:, 0]

    def activations(self, features: Tensor, is_masked: Tensor | None = None) -> Tensor:
        """x [n, d_model] of samples; those whose word is masked have the special token's direction too."""
        x = self.model.feature_dict(features)
        if is_masked is None:
            return x
        direction = torch.randn(self.d_model, generator=torch.Generator().manual_seed(self.seed + 77))
        return x + MASK_NORM * is_masked[:, None] * direction / direction.norm()

    def training_data(self, n: int, p: float) -> tuple[Tensor, Tensor, Tensor]:
        """The same n samples clean [n, d_model] and masked, and which have a masked word."""
        generator, parts = torch.Generator().manual_seed(self.seed + 99), []
        for clean in self.features(n, seed=0):
            left, is_masked = self.mask(clean, p, generator)
            parts.append((self.activations(clean), self.activations(left, is_masked), is_masked))
        return tuple(map(torch.cat, zip(*parts)))


@torch.no_grad()
def parent_scores(world: World, features: Tensor, latents: Tensor, w_dec: Tensor) -> dict[str, dict[str, float]]:
    """Told, absorbed and F1, as means over the parents of each kind.

    features [n, n_features], latents [n, F]   of the same clean samples
    w_dec [F, d_model]                         decoder; the length of a row counts with its latent

    Parents that are never active in the second half are left out; a kind without parents has no entry.
    """
    half = len(features) // 2
    table = detection(features[:half], latents[:half])
    label = table.argmax(1)
    features, latents = features[half:], latents[half:]
    fires, active = latents > 0, features > 0
    along = w_dec @ world.directions.T  # [F, n_features]
    scores = {}
    for kind, parents in world.parents.items():
        rows = []
        for parent in parents:
            has = active[:, parent]
            if not has.any():
                continue
            own = (label == parent).nonzero().flatten()
            told = fires[:, own[table[own, parent].argmax()]] if len(own) else torch.zeros_like(has)
            below = torch.isin(label, torch.tensor(world.descendants[parent]))
            by = latents[has][:, below] * active[has][:, label[below]]
            carried = by @ along[below, parent]
            absorbed = ~told[has] & (carried >= SHARE * features[has, parent])
            hits = (has & told).sum()
            f1 = 2 * hits / (has.sum() + told.sum())
            rows.append([hits / has.sum(), absorbed.float().mean(), f1])
        if rows:
            told, absorbed, f1 = torch.tensor(rows).double().mean(0).tolist()
            scores[kind] = {"recall": told, "absorption": absorbed, "f1": f1}
    return scores


def detection(features: Tensor, latents: Tensor) -> Tensor:
    """F1 [F, n_features] of "the latent fires" for "the feature is active"."""
    active, fires = (features > 0).float(), (latents > 0).float()
    return 2 * fires.T @ active / (fires.sum(0)[:, None] + active.sum(0)).clamp(min=1)


def lens_scores(world: World, sae, features: Tensor) -> dict:
    """sae_lens's own evaluation of an SAE (anything with `encode`, `decode` and `W_dec`), on given samples."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    pieces = iter(features.split(CHUNK))
    replay = SimpleNamespace(sample=lambda n: next(pieces)[:n])
    found = eval_sae_on_synthetic_data(sae, world.model.feature_dict, replay, len(features), CHUNK)
    return found.to_dict()


@dataclass(frozen=True)
class Settings:
    """What all cells share; results of other settings are not mixed."""

    seeds: int = 3
    """Worlds; each with an SAE in every cell."""
    p: float = 0.3
    samples: int = 65_536
    held_out: int = 8_192
    n_latents: int = 512
    k: int = 12
    steps: int = 1500
    batch: int = 512
    lr: float = 1e-3


RULES = {"TopK": (TopK, ()), "BatchTopK": (BatchTopK, ()), "Matryoshka BatchTopK": (BatchTopK, (1 / 4, 1 / 4, 1 / 2))}
ARMS = ("unmasked", "kept", "dropped")
PENALTIES = {
    "": (),
    "OrtSAE": (OrtSAE(weight=0.25, every=5),),
    "C2R": (C2R(weight=5.0, every=5),),
    "C2R at a tenth": (C2R(weight=0.5, every=5),),
}
"""Rivals of masking, with the weights of their authors. C2R grows with how often a latent fires, and dictionaries are
small here, so a tenth of it stands beside it."""


@dataclass(frozen=True)
class Cell:
    """One SAE of a world."""

    rule: str
    arm: str
    penalty: str = ""
    """Of PENALTIES."""

    def config(self, world: World, settings: Settings) -> SAEConfig:
        rule, prefixes = RULES[self.rule]
        return SAEConfig(
            world.d_model, settings.n_latents, rule(settings.k), prefixes, aux=AuxK(), seed=OWN_SEED + world.seed,
            drop_masked=self.arm == "dropped", penalties=PENALTIES[self.penalty],
        )  # fmt: skip


CELLS = [
    *(Cell(rule, arm) for rule in ("TopK", "Matryoshka BatchTopK", "BatchTopK") for arm in ARMS),
    *(Cell("TopK", arm, penalty) for penalty in ("OrtSAE", "C2R") for arm in ("unmasked", "kept")),
    Cell("TopK", "unmasked", "C2R at a tenth"),
]


def train_cell(cell: Cell, world: World, data, settings: Settings) -> SAE:
    """The SAE of a cell, trained on `World.training_data`."""
    clean, masked, is_masked = data
    given = {"x": clean} if cell.arm == "unmasked" else {"x": masked, "is_masked": is_masked}
    stream = ActivationStream.from_array(**given, batch_size=settings.batch, seed=world.seed)
    recipe = TrainConfig(settings.steps, lr=settings.lr)
    [sae] = train([cell.config(world, settings)], stream, recipe, progress=False)
    return sae


@torch.no_grad()
def score_cell(cell: Cell, sae: SAE, world: World, held_out: Tensor, settings: Settings) -> list[dict]:
    """One row as trained, and unless the rule keeps k of every sample one with clean L0 made k ("matched")."""
    x, rows = world.activations(held_out), []
    dead_after = sae.config.aux.dead_after(settings.steps * settings.batch)
    saes = {"as_trained": sae}
    if not sae.config.selection.keeps_k_per_token:
        saes["matched"] = matched = copy.deepcopy(sae)
        matched.threshold.fill_(calibrated_threshold(sae, x, settings.k))
    for mode, scored in saes.items():
        theirs, ours = lens_scores(world, scored, held_out), reconstruction(scored, x)
        row = {"seed": world.seed, **asdict(cell), "mode": mode, "l0": ours.l0, "ev": ours.ev_centred}
        row |= {"dead": int((sae.tokens_since_fired >= dead_after).sum()), "silent": theirs["dead_latents"]}
        row |= {
            "mcc": theirs["mcc"],
            "uniqueness": theirs["uniqueness"],
            "latent_f1": theirs["classification"]["f1_score"],
        }
        for kind, scores in parent_scores(world, held_out, scored.encode(x), scored.W_dec).items():
            row |= {f"{name}_{kind}": value for name, value in scores.items()}
        rows.append({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def run(settings: Settings, cells: list[Cell], path: Path, make=World) -> None:
    """Train and score what is not in `path` yet. Raises DataError if it holds results of other settings."""
    shared = {name: value for name, value in asdict(settings).items() if name != "seeds"}  # worlds may be added
    record = read_json(path) if path.exists() else {"settings": shared, "rows": []}
    if record["settings"] != shared:
        raise DataError(f"{path} holds results of other settings: {record['settings']}. Delete it; it is made again.")
    done = {(row["seed"], row["rule"], row["arm"], row["penalty"]) for row in record["rows"]}
    for seed in range(settings.seeds):
        left = [cell for cell in cells if (seed, cell.rule, cell.arm, cell.penalty) not in done]
        if not left:
            continue
        world, start = make(seed), time.perf_counter()
        data = world.training_data(settings.samples, settings.p)
        held_out = torch.cat(list(world.features(settings.held_out, seed=1)))
        print(f"world {seed}: {settings.samples:,} samples in {time.perf_counter() - start:.0f} s", flush=True)
        for cell in left:
            start = time.perf_counter()
            sae = train_cell(cell, world, data, settings)
            rows = score_cell(cell, sae, world, held_out, settings)
            record["rows"] = sorted(record["rows"] + rows, key=lambda row: (row["seed"], *_place(row)))
            write_json(path, record)
            told = ", ".join(f"{name} {rows[-1][name]:.3f}" for name in ("absorption_same", "absorption_cross", "mcc"))
            taken = time.perf_counter() - start
            print(f"  {name_of(cell.rule, cell.penalty)}, {cell.arm}: {told} ({taken:.0f} s)", flush=True)


NAMES = {"absorption": "absorption", "f1": "F1", "mcc": "MCC", "ev": "EV"}
MEASURED = ("absorption_same", "absorption_cross", "f1_same", "f1_cross", "mcc", "ev")


def comparisons() -> list[tuple[str, Cell, Cell]]:
    """What is compared with what, paired by world: name, baseline, treated."""
    plain, known = Cell("TopK", "unmasked"), set(CELLS)
    found = [(f"{rule}: {arm}", Cell(rule, "unmasked"), Cell(rule, arm)) for rule in RULES for arm in ARMS[1:]]
    for penalty in filter(None, PENALTIES):
        alone = replace(plain, penalty=penalty)
        found += [(f"TopK: {penalty}", plain, alone), (f"TopK + {penalty}: kept", alone, replace(alone, arm="kept"))]
    found += [(f"{rule} in place of TopK", plain, Cell(rule, "unmasked")) for rule in RULES if rule != "TopK"]
    return [(name, *pair) for name, *pair in found if known.issuperset(pair)]


def effects(rows: list[dict]) -> list[dict]:
    """Paired effects with 95 % intervals over worlds: one row per comparison, matching and score. TopK has one
    matching, which stands for both."""
    at = {(row["seed"], row["rule"], row["arm"], row["penalty"], row["mode"]): row for row in rows}

    def row_of(seed: int, cell: Cell, mode: str) -> dict | None:
        key = seed, cell.rule, cell.arm, cell.penalty
        return at.get((*key, mode)) or (at.get((*key, "as_trained")) if cell.rule == "TopK" else None)

    found, seeds = [], sorted({row["seed"] for row in rows})
    for name, baseline, treated in comparisons():
        for mode in ("as_trained", "matched"):
            if mode == "matched" and baseline.rule == treated.rule == "TopK":
                continue
            pairs = [(row_of(seed, baseline, mode), row_of(seed, treated, mode)) for seed in seeds]
            pairs = [pair for pair in pairs if all(pair)]
            for score in MEASURED if pairs else ():
                effect = paired_effect(*([row[score] for row in side] for side in zip(*pairs)))
                found.append({"comparison": name, "mode": mode, "score": score, **effect.to_dict()})
    return found


def describe(effect: dict) -> str:
    """-0.12 (-0.20 to -0.04): falls."""
    if effect["low"] is None:
        return f"{effect['difference']:+.3f} (one world)"
    word = "falls" if effect["high"] < 0 else "grows" if effect["low"] > 0 else "undecided"
    return f"{effect['difference']:+.3f} ({effect['low']:+.3f} to {effect['high']:+.3f}) {word}"


def tables(record: dict) -> str:
    """Markdown: what was run, means of every cell, effects."""
    settings, rows = record["settings"], record["rows"]
    worlds, blank = len({row["seed"] for row in rows}), World(0)
    of = SimpleNamespace(**settings)
    lines = [
        f"{worlds} worlds of {blank.n_features:,} features in {blank.d_model} dimensions with {blank.n_roots} trees; "
        f"SAEs of {of.n_latents} latents, k = {of.k}, {of.steps:,} steps of {of.batch} on {of.samples:,} samples; "
        f"p = {of.p}; scored on {of.held_out:,} clean samples.",
        "",
        "Means over worlds (parents: roots set by the same token as their children, by another one, inner nodes):",
        "",
        "| SAE | arm | L0 is | L0 | EV | MCC | silent | absorbed: same | cross | inner | F1: same | cross | inner |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shown = ["l0", "ev", "mcc", "silent", *(f"{score}_{kind}" for score in ("absorption", "f1") for kind in PARENTS)]
    for first in [row for row in rows if row["seed"] == rows[0]["seed"]]:
        rule, penalty, arm, mode = key = [first[name] for name in ("rule", "penalty", "arm", "mode")]
        part = [r for r in rows if [r["rule"], r["penalty"], r["arm"], r["mode"]] == key]
        means = [sum(r[name] for r in part) / len(part) for name in shown]
        cells = [f"{v:.1f}" if name in ("l0", "silent") else f"{v:.3f}" for name, v in zip(shown, means)]
        matching = "k" if rule == "TopK" else mode.replace("_", " ")
        lines.append(f"| {name_of(rule, penalty)} | {arm} | {matching} | {' | '.join(cells)} |")
    lines += [
        "",
        "Paired differences, 95 % intervals of Student's t over worlds; each stands for itself, none is corrected:",
        "",
        f"| comparison | L0 is | {' | '.join(_heading(score) for score in MEASURED)} |",
        "| --- | --- |" + " --- |" * len(MEASURED),
    ]
    found = effects(rows)
    lines[2:2] = [*predictions(found), ""]
    for name, mode in dict.fromkeys((e["comparison"], e["mode"]) for e in found):
        of = {e["score"]: describe(e) for e in found if (e["comparison"], e["mode"]) == (name, mode)}
        matching = "k" if mode == "as_trained" and name.startswith("TopK") else mode.replace("_", " ")
        lines.append(f"| {name} | {matching} | {' | '.join(of[score] for score in MEASURED)} |")
    return "\n".join(lines)


PREDICTED = {"same": "C1, first letters (parents that the same token sets)", "cross": "Parents that another token sets"}


def predictions(found: list[dict]) -> list[str]:
    """What the world says of masking at clean L0 = k, for each kind of parent: a line of Markdown each."""
    at = {(e["comparison"], e["score"], e["mode"]): e for e in found}
    lines = []
    for kind, label in PREDICTED.items():
        for arm in ARMS[1:]:
            told = []
            for rule in RULES:
                key = f"{rule}: {arm}", f"absorption_{kind}", "as_trained" if rule == "TopK" else "matched"
                told += [f"{rule} {describe(at[key])}"] if key in at else []
            lines.append(f"* {label}, arm `{arm}`: absorption changes by " + "; ".join(told) + ".")
    return ["**Predicted for a language model**, at equal clean L0:", "", *lines]


def name_of(rule: str, penalty: str) -> str:
    """Of an SAE, in tables and figures.

    >>> name_of("TopK", "C2R"), name_of("TopK", "")
    ('TopK + C2R', 'TopK')
    """
    return " + ".join(filter(None, (rule, penalty)))


def _heading(score: str) -> str:
    name, *kind = score.split("_")
    return ", ".join([NAMES[name], *kind])


def _place(row: dict) -> tuple:
    """Of a row among those of its world."""
    places = ((RULES, "rule"), (PENALTIES, "penalty"), (ARMS, "arm"))
    return (*(list(order).index(row[name]) for order, name in places), row["mode"])


BEGIN, END = "<!-- written by benchmarks/synthetic.py -->\n", "\n<!-- up to here -->"


def with_tables(page: str, text: str) -> str:
    """A page with the text between its two marks replaced."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def draw(rows: list[dict]):
    """Absorption and F1 of same-token and cross-token parents: worlds, means, 95 % intervals; L0 matched."""
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    from masksae.study.figures.style import FAMILY, style

    style()
    table = pd.DataFrame([r for r in rows if r["mode"] == "matched" or r["rule"] == "TopK"])
    table["SAE"] = [name_of(*pair) for pair in zip(table["rule"], table["penalty"])]
    order = [name for rule in RULES for name in (name_of(rule, p) for p in PENALTIES) if name in set(table["SAE"])]
    look = dict(x="SAE", hue="arm", order=order, hue_order=ARMS, palette=list(FAMILY[: len(ARMS)]))
    means = dict(errorbar=t_interval, linestyle="none", marker="_", markersize=13, err_kws={"linewidth": 1.4})
    figure, axes = plt.subplots(2, 2, figsize=(14, 6.4), sharex=True, sharey=True)
    titles = {"same": "parent and child set by the same token", "cross": "parent set by another token"}
    for row, (score, label) in zip(axes, (("absorption", "absorbed share"), ("f1", "F1 of the parent's latent"))):
        for axis, (kind, title) in zip(row, titles.items()):
            look |= {"ax": axis, "y": f"{score}_{kind}"}
            sns.stripplot(table, size=3.5, alpha=0.6, legend=False, dodge=True, jitter=False, **look)
            sns.pointplot(table, dodge=0.8 * (1 - 1 / len(ARMS)), **means, **look)  # where stripplot has its dots
            axis.set(ylabel=label, xlabel="", ylim=(0, 1), title=title if score == "absorption" else "")
            axis.set_xticks(range(len(order)), [textwrap.fill(name, 12) for name in order], fontsize="small")
            axis.get_legend().remove()
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def t_interval(values) -> tuple[float, float]:
    """95 % interval of the mean."""
    effect = paired_effect([0.0] * len(values), list(values))
    return (effect.low, effect.high) if effect.low is not None else (effect.difference, effect.difference)


def report(record: dict) -> None:
    """Write effects, figure and the page's tables."""
    write_json(EFFECTS, effects(record["rows"]))
    PAGE.write_text(with_tables(PAGE.read_text(), tables(record)))
    figure = draw(record["rows"])
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
        figure.savefig(FIGURE.with_suffix(suffix), metadata=metadata, transparent=True, bbox_inches="tight", dpi=150)
    write_text(FIGURE.with_suffix(".txt"), f"{draw.__doc__.splitlines()[0]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write effects, figure and tables of what is scored")
    parser.add_argument("--seeds", type=int, default=Settings.seeds, help="worlds")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.report:
        report(read_json(SCORES))
    else:
        run(replace(Settings(), seeds=arguments.seeds), CELLS, SCORES)


if __name__ == "__main__":
    main()
