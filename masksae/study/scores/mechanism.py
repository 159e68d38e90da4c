"""Scores of notebook 00, a world with known features: which absorption can masking remove, that of a parent set by the
same token as its child or that of one set by another token?

Each sample is the activation at a word that follows a context token.

    word      one of 16 common words, each a direction of its own (a child), or a rare one (one of many directions, too
              rare to be learned)
    same      a parent that half of the words have, set by the word itself ("starts with S")
    cross     a parent that is set by the context token ("follows 'the'"); half of the common words stand after such a
              context only

So every common word always comes with the same parents, and an SAE that is short of latents folds a parent into the
word's latent: absorption. Masking the context takes the cross parent away and leaves the word; masking the word takes
the word and the same parent away together. Only the first breaks a co-occurrence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from masksae import cache
from masksae.activations import ActivationStream
from masksae.metrics.absorption import absorbed
from masksae.metrics.reconstruction import calibrated_threshold, reconstruction
from masksae.parallel import in_threads
from masksae.saes.config import SAEConfig
from masksae.saes.rules import BatchTopK
from masksae.saes.sae import SAE
from masksae.study.sections import Simulation
from masksae.study.stats import paired_effect
from masksae.training.config import TrainConfig
from masksae.training.group import train

WORDS, RARE, WIDTH = 16, 400, 64
PARENT, NOISE = 0.7, 0.02
"""Length of a parent's direction, where a word's is 1; noise per dimension."""
SAMPLES, BATCH = 60_000, 500


@dataclass(frozen=True)
class Samples:
    """Activations and what made them."""

    x: Tensor
    """[n, 64]"""
    word: Tensor
    """int64 [n]: 0 to 15, or -1 for a rare word or a masked one."""
    parents: Tensor
    """bool [n, 2]: same and cross, as they are in x."""
    is_masked: Tensor
    """bool [n]: the word is masked."""


@dataclass(frozen=True)
class World:
    """Directions of the features."""

    seed: int

    def directions(self) -> dict[str, Tensor]:
        """Unit vectors: parents [2, 64] (same, cross), words [16, 64], rare [400, 64], mask [64]."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(n: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)

        return {"parents": draw(2), "words": draw(WORDS), "rare": draw(RARE), "mask": draw(1)[0]}

    def sample(self, n: int, *, p: float, seed: int) -> Samples:
        """n samples; word and context are masked independently with probability p."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + seed)
        features = self.directions()

        def rand() -> Tensor:
            return torch.rand(n, generator=generator)

        common, rare = rand() < 0.5, (rand() * RARE).long()
        word = (rand() * WORDS).long()
        after = torch.where(common, word < WORDS // 2, rand() < 0.5)
        same = torch.where(common, word % 2 == 0, rare % 2 == 0)
        word_masked, context_masked = rand() < p, rand() < p
        parents = torch.stack([same & ~word_masked, after & ~context_masked], 1)
        own = torch.where(common[:, None], features["words"][word], features["rare"][rare])
        x = torch.where(word_masked[:, None], features["mask"], own) + PARENT * parents.float() @ features["parents"]
        x = x + NOISE * torch.randn(n, WIDTH, generator=generator)
        return Samples(x, torch.where(common & ~word_masked, word, -1), parents, word_masked)


@torch.no_grad()
def absorption(sae: SAE, world: World, samples: Samples, threshold: float) -> tuple[float, float]:
    """Full absorption of the same-token parent and of the cross-token one: mean over the common words that have it.

    The main latent of a parent is the one whose decoder row is nearest to its true direction.
    """
    f, shares = sae.encode(samples.x, threshold), []
    for parent, direction in enumerate(world.directions()["parents"]):
        main = int((sae.W_dec @ direction).argmax())
        has = samples.parents[:, parent]
        full, _ = absorbed(samples.x[has], f[has], sae.W_dec, direction, [main])
        word = samples.word[has]
        shares.append(torch.stack([full[word == w].double().mean() for w in word[word >= 0].unique()]).mean().item())
    return shares[0], shares[1]


@torch.enable_grad()
def simulate(
    seed: int, *, p: float, k: float, n_latents: int, drop_masked: bool = False, steps: int = 400
) -> list[dict]:
    """Train one SAE on a world and score it on clean samples: one row as trained, one at clean L0 = k."""
    world = World(seed)
    source = world.sample(SAMPLES, p=p, seed=0)
    stream = ActivationStream.from_array(source.x, batch_size=BATCH, seed=seed, is_masked=source.is_masked)
    config = SAEConfig(WIDTH, n_latents, BatchTopK(k), seed=seed, drop_masked=drop_masked)
    recipe = TrainConfig(steps=steps, lr=3e-3, warmup=50, threshold_start=steps // 2, threshold_ema=0.99)
    [sae] = train([config], stream, recipe, progress=False)
    clean = world.sample(8000, p=0.0, seed=1)
    rows = []
    for mode, threshold in (("as_trained", sae.threshold.item()), ("matched", calibrated_threshold(sae, clean.x, k))):
        scores = reconstruction(sae, clean.x, threshold=threshold)
        same, cross = absorption(sae, world, clean, threshold)
        arm = "unmasked" if p == 0 else "masked, dropped" if drop_masked else "masked, kept"
        key = {"seed": seed, "arm": arm, "p": p, "k": k, "n_latents": n_latents, "mode": mode}
        rows.append(key | {"l0": scores.l0, "ev": scores.ev_centred, "same": same, "cross": cross})
    return rows


def grid(options) -> list[dict]:
    """What a profile's `simulation` section asks for: every p at the first width, kept and dropped; at the others p = 0
    and the main p, dropped."""
    first, *others = options.widths
    cells = [{"p": 0.0, "n_latents": first}]
    cells += [{"p": p, "n_latents": first, "drop_masked": drop} for p in options.ps for drop in (False, True)]
    for width in others:
        cells += [{"p": 0.0, "n_latents": width}, {"p": options.main_p, "n_latents": width, "drop_masked": True}]
    return [cell | {"k": k, "seed": seed} for cell in cells for k in options.ks for seed in range(options.seeds)]


def simulation_rows(options: Simulation) -> list[dict]:
    """Rows of every cell of the grid, kept in scratch: profiles that ask for the same worlds share them."""

    def make() -> list[dict]:
        cells = grid(options)
        rows = in_threads(lambda cell: simulate(steps=options.steps, **cell), cells, label="simulation", unit="SAE")
        return [row for pair in rows for row in pair]

    return cache.kept_rows("simulation", [options.model_dump(), cache.code_of(make)], make)


def effects(rows: list[dict], arm: str, *, mode: str = "matched") -> list[dict]:
    """Paired effect of an arm on absorption of either parent: one row per parent, p, width and k, with a 95 % interval
    over seeds."""
    value = {(r["arm"], r["p"], r["n_latents"], r["k"], r["seed"]): r for r in rows if r["mode"] == mode}
    table = []
    for p, width, k in dict.fromkeys((key[1], key[2], key[3]) for key in value if key[0] == arm):
        seeds = sorted(key[4] for key in value if key[:4] == (arm, p, width, k))
        for parent in ("same", "cross"):
            sides = [[value[a, q, width, k, s][parent] for s in seeds] for a, q in (("unmasked", 0.0), (arm, p))]
            cell = {"parent": parent, "arm": arm, "p": p, "n_latents": width, "k": k}
            table.append(cell | paired_effect(*sides).to_dict())
    return table
