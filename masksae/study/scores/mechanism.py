"""Scores of notebook 00, a world with known features: which absorption can masking remove, that of a parent set by the
same token as its child or that of one set by another token, and how sure must the other token be?

Each sample is the activation at a word that follows two context tokens.

    word      one of 16 common words, each a direction of its own (a child), or a rare one (one of many directions, too
              rare to be learned)
    same      two parents that the word sets itself ("starts with S"): each holds for half of the words, and always
    cross     two parents, each set by one context token ("follows 'the'"): half of the common words come with it, with
              probability q, the other half never; a rare word with probability .5

P(parent | word) is 1 for a parent of the word's own, by nature. For a parent that another token sets it is q, and q is
what varies between the words of a language. Three features are active on average, so an SAE that keeps two latents
folds parents into the words' latents: absorption. Masking a context token takes its parent away and leaves the word;
masking the word takes the word and its own parents away together. Only the first breaks a co-occurrence.

TopK is the architecture of the other notebooks: it keeps k latents of every token, so clean L0 is k in every arm.
BatchTopK stands beside it, since there an SAE that is trained on cheap masked positions spends the rest on clean ones.

A main latent can be silent because another one absorbed its parent, or because it does not exist. Its F1 on rare words,
which have no latents that could absorb anything, tells which. An SAE takes 0.6 s on one core.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from masksae import cache, provenance
from masksae.activations import ActivationStream
from masksae.metrics.absorption import absorbed
from masksae.metrics.probes import f1
from masksae.metrics.reconstruction import calibrated_threshold, reconstruction
from masksae.parallel import in_threads
from masksae.saes.config import SAEConfig
from masksae.saes.rules import BatchTopK, TopK
from masksae.saes.sae import SAE
from masksae.study.sections import Simulation
from masksae.study.stats import Effect, interpolate, paired_effect
from masksae.training.config import TrainConfig
from masksae.training.group import train

WORDS, RARE, WIDTH, LATENTS = 16, 400, 64, 24
"""Common words, rare ones, width of the activations, and latents; 20 features can be learned."""
PARENT, NOISE = 0.7, 0.02
"""Length of a parent's direction, where a word's is 1; noise per dimension."""
SAMPLES, BATCH = 60_000, 500
RULES = {"TopK": TopK, "BatchTopK": BatchTopK}
KINDS = {"same": (0, 1), "cross": (2, 3)}
"""Parents of each kind. Bit i of a word's number says whether the word comes with parent i."""
NOTICED = 0.05
"""Absorption below this is called none."""


@dataclass(frozen=True)
class Samples:
    """Activations and what made them."""

    x: Tensor
    """[n, 64]"""
    word: Tensor
    """int64 [n]: 0 to 15, or -1 for a rare word or a masked one."""
    parents: Tensor
    """bool [n, 4]: two of the same token, two of the context, as they are in x."""
    is_masked: Tensor
    """bool [n]: the word is masked."""


@dataclass(frozen=True)
class World:
    """Directions of the features, and how surely a common word comes with its cross-token parents."""

    seed: int
    q: float = 1.0
    """P(cross-token parent | word)."""

    def directions(self) -> dict[str, Tensor]:
        """Unit vectors: parents [4, 64], words [16, 64], rare [400, 64], mask [64]."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(n: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)

        return {"parents": draw(4), "words": draw(WORDS), "rare": draw(RARE), "mask": draw(1)[0]}

    def sample(self, n: int, *, p: float, seed: int) -> Samples:
        """n samples; the word and each context token are masked independently with probability p."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + seed)
        features = self.directions()

        def rand(*columns: int) -> Tensor:
            return torch.rand(n, *columns, generator=generator)

        common, rare, word = rand() < 0.5, (rand() * RARE).long(), (rand() * WORDS).long()
        same = comes_with(torch.where(common, word, rare), "same")
        cross = rand(2) < torch.where(common[:, None], self.q * comes_with(word, "cross").float(), 0.5)
        word_masked, context_masked = rand() < p, rand(2) < p
        parents = torch.cat([same & ~word_masked[:, None], cross & ~context_masked], 1)
        own = torch.where(common[:, None], features["words"][word], features["rare"][rare])
        x = torch.where(word_masked[:, None], features["mask"], own) + PARENT * parents.float() @ features["parents"]
        x = x + NOISE * torch.randn(n, WIDTH, generator=generator)
        return Samples(x, torch.where(common & ~word_masked, word, -1), parents, word_masked)


def comes_with(word: Tensor, kind: str) -> Tensor:
    """bool [n, 2]: which parents of a kind belong to each word [n].

    >>> comes_with(torch.tensor([1, 6]), "same").tolist(), comes_with(torch.tensor([1, 6]), "cross").tolist()
    ([[True, False], [False, True]], [[False, False], [True, False]])
    """
    return torch.stack([(word >> parent) % 2 == 1 for parent in KINDS[kind]], -1)


@torch.no_grad()
def absorption(sae: SAE, world: World, samples: Samples, threshold: float | None) -> dict[str, float]:
    """Full absorption of either kind of parent, "same" and "cross": mean over its parents and the common words that
    come with them. "same_f1", "cross_f1": F1 of the main latents on the other words.

    The main latent of a parent is the one whose decoder row is nearest to its true direction.
    """
    f, scores, common = sae.encode(samples.x, threshold), {}, samples.word >= 0
    for kind, parents in KINDS.items():
        shares, found = [], []
        for parent in parents:
            direction, has = world.directions()["parents"][parent], samples.parents[:, parent]
            main = int((sae.W_dec @ direction).argmax())
            full, _ = absorbed(samples.x[has], f[has], sae.W_dec, direction, [main])
            word = samples.word[has]
            shares += [full[word == w].double().mean().item() for w in word[word >= 0].unique()]
            found.append(f1((f[~common, main] > 0)[:, None], has[~common, None]).item())
        scores |= {kind: fmean(shares), f"{kind}_f1": fmean(found)}
    return scores


@torch.enable_grad()
def simulate(
    seed: int, *, q: float, p: float, k: int, rule: str, drop_masked: bool = False, steps: int = 400
) -> list[dict]:
    """Train one SAE on a world and score it on clean samples: one row as trained, one at clean L0 = k."""
    world = World(seed, q)
    source = world.sample(SAMPLES, p=p, seed=0)
    stream = ActivationStream.from_array(source.x, batch_size=BATCH, seed=seed, is_masked=source.is_masked)
    config = SAEConfig(WIDTH, LATENTS, RULES[rule](k), seed=seed, drop_masked=drop_masked)
    recipe = TrainConfig(steps=steps, lr=3e-3, warmup=50, threshold_start=steps // 2, threshold_ema=0.99)
    [sae] = train([config], stream, recipe, progress=False)
    clean, rows = world.sample(8000, p=0.0, seed=1), []
    arm = "unmasked" if p == 0 else "dropped" if drop_masked else "kept"
    for mode in ("as_trained", "matched"):
        moved = mode == "matched" and rule == "BatchTopK"
        threshold = calibrated_threshold(sae, clean.x, k) if moved else None
        scores = reconstruction(sae, clean.x, threshold=threshold)
        key = {"seed": seed, "rule": rule, "arm": arm, "p": p, "q": q, "k": k, "mode": mode}
        rows.append(key | {"l0": scores.l0, "ev": scores.ev_centred} | absorption(sae, world, clean, threshold))
    return rows


def grid(options: Simulation) -> list[dict]:
    """What a profile's `simulation` section asks for, for either rule and all arms: every q at the first k and the main
    p; the largest q at the other k, and at the other p."""
    q, (k, *others) = max(options.qs), options.ks
    planes = [(each, k, options.main_p) for each in options.qs]
    planes += [(q, each, options.main_p) for each in others]
    masked = [*planes, *((q, k, p) for p in options.ps if p != options.main_p)]
    cells = [{"q": q, "k": k, "p": 0.0} for q, k, _ in planes]
    cells += [{"q": q, "k": k, "p": p, "drop_masked": drop} for q, k, p in masked for drop in (False, True)]
    return [cell | {"rule": rule, "seed": seed} for cell in cells for rule in RULES for seed in range(options.seeds)]


def simulation_rows(options: Simulation) -> list[dict]:
    """Rows of every cell of the grid, kept in scratch: profiles that ask for the same worlds share them."""

    def make() -> list[dict]:
        cells = grid(options)
        rows = in_threads(lambda cell: simulate(steps=options.steps, **cell), cells, label="simulation", unit="SAE")
        return [row for pair in rows for row in pair]

    return cache.kept_rows("simulation", [options.model_dump(), provenance.code_id(make)], make)


def effects(rows: list[dict]) -> list[dict]:
    """Paired effect of masking on absorption of either kind at clean L0 = k: one row per rule, kind, k, q, p and arm,
    with a 95 % interval over worlds, and the mean F1 of the main latents before and after."""
    value = {(r["rule"], r["k"], r["q"], r["p"], r["arm"], r["seed"]): r for r in rows if r["mode"] == "matched"}
    table = []
    for rule, k, q, p, arm in dict.fromkeys(key[:5] for key in value if key[4] != "unmasked"):
        seeds = sorted(key[5] for key in value if key[:5] == (rule, k, q, p, arm))
        sides = [[value[rule, k, q, *cell, seed] for seed in seeds] for cell in ((0.0, "unmasked"), (p, arm))]
        for kind in KINDS:
            found = paired_effect(*([row[kind] for row in side] for side in sides))
            before, after = (fmean(row[f"{kind}_f1"] for row in side) for side in sides)
            cell = {"rule": rule, "kind": kind, "k": k, "q": q, "p": p, "arm": arm, "f1": before, "f1_after": after}
            table.append(cell | found.to_dict())
    return table


def in_words(row: dict) -> str:
    """What a row of `effects` says.

    >>> in_words({"baseline": 0.5, "treated": 0.1, "low": -0.6, "high": -0.2, "f1": 0.9, "f1_after": 0.4})
    'falls, 0.50 → 0.10 (−0.60 to −0.20); F1 0.90 → 0.40'
    """
    if row["low"] is None:
        word = "one world"
    elif max(row["baseline"], row["treated"]) < NOTICED:
        word = "none in either"
    else:
        word = "falls" if row["high"] < 0 else "rises" if row["low"] > 0 else "no clear change"
    interval = "" if row["low"] is None else f" ({row['low']:+.2f} to {row['high']:+.2f})"
    text = f"{word}, {row['baseline']:.2f} → {row['treated']:.2f}{interval}; F1 {row['f1']:.2f} → {row['f1_after']:.2f}"
    return text.replace("-", "−")


def predictions(found: list[dict], options: Simulation) -> list[dict]:
    """What masking is predicted to do, for either rule and kind, each q and arm, in words, at the first k and the main
    p."""
    table = {}
    for row in found:
        if (row["k"], row["p"]) == (options.ks[0], options.main_p):
            cell = {"rule": row["rule"], "parent": f"{row['kind']}-token", "q": row["q"]}
            table.setdefault(tuple(cell.values()), cell)[row["arm"]] = in_words(row)
    order = list(RULES), [f"{kind}-token" for kind in KINDS]
    return sorted(
        table.values(), key=lambda row: (order[0].index(row["rule"]), order[1].index(row["parent"]), row["q"])
    )


def at_equal_l0(rows: list[dict], options: Simulation) -> dict[str, Effect]:
    """Effect on absorption, by kind, of BatchTopK as trained with masked positions kept, against unmasked SAEs as
    trained to the same clean L0: between those of the profile's k. Empty where that L0 is outside of them."""
    part = [r for r in rows if (r["rule"], r["mode"], r["q"]) == ("BatchTopK", "as_trained", max(options.qs))]
    kept = [r for r in part if (r["arm"], r["k"], r["p"]) == ("kept", options.ks[0], options.main_p)]
    sides = {kind: ([], []) for kind in KINDS}
    for row in kept:
        plain = [r for r in part if (r["arm"], r["seed"]) == ("unmasked", row["seed"])]
        for kind, (baseline, treated) in sides.items():
            value = interpolate([r["l0"] for r in plain], [r[kind] for r in plain], row["l0"])
            if value is not None:
                baseline.append(value)
                treated.append(row[kind])
    return {kind: paired_effect(*values) for kind, values in sides.items() if values[0]}
