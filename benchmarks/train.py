"""Time and memory of one training step: masksae against dictionary_learning 0.1.0 and SAELens 6.54.

    make peers
    .venv-peers/bin/python benchmarks/train.py                    # the table of benchmarks/README.md
    .venv-peers/bin/python benchmarks/train.py --only Matryoshka  # one architecture
    .venv-peers/bin/python benchmarks/train.py --penalties        # what OrtSAE and C2R add to a step

Same process, same threads, same batches, same initial weights; the trainers take turns of a few steps, and every number
is a median over steps, every ratio a median over rounds with its quartiles. "Settled" rows have encoder biases (or
thresholds) moved so that the SAE starts at the L0 of the row, as it is for most of a training; "fresh" rows start as
initialised, half of all latents active. "floor" is the encoder's product alone, the part that a sparse step cannot
avoid.
"""

import argparse
import ctypes
import itertools
import statistics
import time
from pathlib import Path

import torch
from peers import dictionary_learning_trainer, saelens_trainer

from masksae import C2R, MATRYOSHKA, SAE, AuxK, BatchTopK, Gated, JumpReLU, OrtSAE, ReLU, SAEConfig, TopK, TrainConfig
from masksae.training.step import Trainer

RECIPE = TrainConfig(steps=100_000, lr=1e-6, warmup=10)  # nothing moves, so that a row stays at its L0
CASES = [
    ("Matryoshka BatchTopK, k = 20", BatchTopK(20), MATRYOSHKA, True),
    ("Matryoshka BatchTopK, k = 80", BatchTopK(80), MATRYOSHKA, True),
    ("BatchTopK, k = 20", BatchTopK(20), (), True),
    ("TopK, k = 20", TopK(20), (), True),
    ("JumpReLU, settled at 40", JumpReLU(40.0), (), True),
    ("JumpReLU, fresh", JumpReLU(40.0), (), False),
    ("Gated, settled at 40", Gated(0.03), (), True),
    ("Gated, fresh", Gated(0.03), (), False),
    ("ReLU, settled at 40", ReLU(0.03), (), True),
    ("ReLU, fresh", ReLU(0.03), (), False),
]


def make_batches(n: int, batch: int, d: int) -> list[torch.Tensor]:
    """Sparse sums of random directions with noise, mean norm 1: what SAEs are for, and the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(3000, d, generator=generator), dim=1)
    result = []
    for _ in range(n):
        amounts = (torch.rand(batch, 3000, generator=generator) < 0.01) * torch.rand(batch, 3000, generator=generator)
        x = amounts @ directions + 0.02 * torch.randn(batch, d, generator=generator)
        result.append(x / x.norm(dim=1).mean())
    return result


@torch.no_grad()
def settle(sae: SAE, x: torch.Tensor, l0: float) -> None:
    """Move biases (or thresholds) latent by latent so that each fires on its share of the tokens."""
    if sae.config.selection.ranked:
        return
    pre = sae.pre_activations(x)
    cut = pre.kthvalue(int(len(x) * (1 - l0 / pre.shape[1])), dim=0).values
    if isinstance(sae.config.selection, JumpReLU):
        sae.thresholds.copy_(cut.clamp(min=0.001))
    else:
        sae.b_enc.sub_(cut)


def peak_during(action) -> float:
    """Megabytes that `action` needs at its peak beyond what is held before it (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    action()
    return (_status("VmHWM") - before) / 1e3


def _status(key: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))


def updates(sae: SAE, batch: int) -> dict:
    """Name -> function of a batch that makes one update, for each trainer."""
    theirs, ours, lens = (
        dictionary_learning_trainer(sae, RECIPE),
        Trainer(sae, RECIPE),
        saelens_trainer(sae, RECIPE, batch),
    )
    numbers = {"DictionaryLearning": itertools.count(1), "Ours": itertools.count(1)}
    return {
        "SAELens": lens.step,
        "DictionaryLearning": lambda x: theirs.update(next(numbers["DictionaryLearning"]), x),
        "Ours": lambda x: ours.step(x, next(numbers["Ours"])),
    }


def measure(rule, prefixes, settled: bool, batches, d: int, n_latents: int, rounds: int, turns: int) -> dict:
    """Milliseconds per step, ratio and its quartiles, and peak memory of each trainer; the encoder product's
    milliseconds."""
    aux = AuxK(dead_after_tokens=10_000_000) if rule.revived else None
    sae = SAE(SAEConfig(d, n_latents, rule, prefixes, aux=aux))
    if settled:
        settle(sae, batches[0], getattr(rule, "target_l0", None) or 40.0)
    trainers = updates(sae, len(batches[0]))
    floor, w_enc = torch.empty(len(batches[0]), n_latents), sae.W_enc.detach().clone()
    actions = trainers | {"floor": lambda x: torch.mm(x, w_enc, out=floor)}
    times: dict[str, list[float]] = {name: [] for name in actions}
    memory = {
        name: peak_during(lambda action=action: [action(x) for x in batches[:2]]) for name, action in actions.items()
    }
    for _ in range(rounds):
        for name, action in actions.items():
            taken = []
            for i in range(turns + 1):
                start = time.perf_counter()
                action(batches[i % len(batches)])
                taken.append(time.perf_counter() - start)
            times[name].append(statistics.median(taken[1:]))
    result = {"floor": 1e3 * statistics.median(times["floor"])}
    for name in trainers:
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["Ours"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {"ms": 1e3 * statistics.median(times[name]), "ratio": (middle, low, high), "mb": memory[name]}
    return result


def penalty_cost(penalty, batches, d: int, n_latents: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a TopK step without a penalty, and those that applying it adds: medians over neighbouring steps,
    of which every second one applies it."""
    trainer = Trainer(
        SAE(SAEConfig(d, n_latents, TopK(20), aux=AuxK(dead_after_tokens=10**7), penalties=(penalty,))), RECIPE
    )
    plain, added = [], []
    for i in range(rounds):
        times = []
        for step in (i * penalty.every + 1, i * penalty.every):
            start = time.perf_counter()
            trainer.step(batches[i % len(batches)], step)
            times.append(1e3 * (time.perf_counter() - start))
        plain.append(times[0])
        added.append(times[1] - times[0])
    return statistics.median(plain[1:]), statistics.median(added[1:])


def penalties(arguments) -> None:
    """The table of penalties: what they cost at every eighth step."""
    print("| penalty, every 8th step | batch | step without, ms | it adds when applied, ms | per step, % |")
    print("| --- | --- | --- | --- | --- |")
    for batch in (512, 2048):
        batches = make_batches(4, batch, 576)
        for penalty in (OrtSAE(every=8), C2R(every=8)):
            plain, added = penalty_cost(penalty, batches, 576, 2048, 8 * arguments.rounds)
            name = type(penalty).__name__
            print(f"| {name} | {batch} | {plain:.0f} | {added:.0f} | {added / penalty.every / plain:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure the architectures whose name begins so")
    parser.add_argument("--penalties", action="store_true", help="the penalties of d 576, F 2,048 instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turns", type=int, default=4, help="timed steps of a trainer in a round")
    parser.add_argument("--threads", type=int, default=2)
    for name, default in (("d", 768), ("latents", 4096), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.penalties:
        return penalties(arguments)
    batches = make_batches(4, arguments.batch, arguments.d)
    print(f"d {arguments.d}, F {arguments.latents}, batch {arguments.batch}, {arguments.threads} threads, float32\n")
    print("| architecture | ours, ms (floor) | MB | dictionary_learning, ms | MB | times | SAELens, ms | MB | times |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for label, rule, prefixes, settled in CASES:
        if not label.startswith(arguments.only):
            continue
        row = measure(
            rule, prefixes, settled, batches, arguments.d, arguments.latents, arguments.rounds, arguments.turns
        )
        ours, cells = row["Ours"], []
        for name in ("DictionaryLearning", "SAELens"):
            middle, low, high = row[name]["ratio"]
            cells.append(f"{row[name]['ms']:.0f} | {row[name]['mb']:.0f} | **{middle:.1f}** ({low:.1f} to {high:.1f})")
        share = row["floor"] / ours["ms"]
        print(f"| {label} | {ours['ms']:.0f} ({share:.0%}) | {ours['mb']:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
