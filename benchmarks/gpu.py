"""What a card does: the training step beside the peers', the language model's forwards, and both at once; as ratios.

    make peers
    .venv-peers/bin/python benchmarks/gpu.py                 # ten minutes on a card; all tables
    .venv-peers/bin/python benchmarks/gpu.py --only steps    # or graphs, harvest, pair
    .venv-peers/bin/python benchmarks/gpu.py --dry           # the same script on a CPU at tiny sizes, as a test runs it

One process, the same batches, the same initial weights. Every number is a median over rounds; what is compared takes
turns. "floor" is the time of the five products of a step alone, on the same card, in the same number format, measured
here; "share" is the floor's share of the step. Float32 is TF32 for everybody (`masksae.jobs.allow_tf32`), bfloat16
everybody's autocast.

Goals on an H100, on which none of this had run when they were written: .35 ms for an SAE's step at d 768, F 4,096 in a
group of eight, a third of dictionary_learning's; forwards at 60 % of their products' rate.
"""

import argparse
import json
import re
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from masksae import (
    C2R,
    MATRYOSHKA,
    SAE,
    ActivationStream,
    AuxK,
    BatchTopK,
    Gated,
    JumpReLU,
    OrtSAE,
    ReLU,
    SAEConfig,
    TopK,
    TrainConfig,
    load_profile,
    train,
)
from masksae.activations import from_model
from masksae.app.plan import GPUS, SHARE, Plan, step_flop, step_traffic
from masksae.jobs import allow_tf32
from masksae.saes.loss import dense_terms
from masksae.tracing import activations
from masksae.training.group import STACKED
from masksae.training.stack import Stack, own_stream
from masksae.training.step import Trainer

RECIPE = TrainConfig(steps=1_000_000, lr=1e-6, warmup=10, threshold_start=5)  # nothing moves


CARDS = {"L4": r"\bL4$", "RTX 4090": "RTX 4090$", "A100 80GB": "A100.*80GB", "H100 SXM": "H100 80GB HBM3"}
"""What the driver calls the GPUs whose data sheets a plan has."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the dry run has small numbers."""

    shapes: tuple[tuple[int, int], ...]
    """(d, F) of the table of steps."""
    members: tuple[int, ...]
    batch: int
    rounds: int
    turns: int
    """Calls in one turn."""
    sequences: int
    """Of a forward."""
    layers: int | None
    pair_tokens: int
    """Of the text on which forwards and training run together."""
    pool_tokens: int


CARD = Sizes(
    ((576, 4096), (768, 4096), (768, 16384), (2304, 16384)), (1, 8), 2048, 5, 40, 256, None, 4_194_304, 262_144
)
DRY = Sizes(((16, 64), (24, 128)), (1, 2), 32, 2, 2, 1, 1, 2048, 512)


def seconds(act, device: torch.device, times: int) -> float:
    """Of one call, mean over some."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        act()
    wait()
    return (time.perf_counter() - start) / times


def in_turns(actions: dict, device, sizes: Sizes) -> dict[str, float]:
    """Seconds of a call of each: medians over rounds, after one round that does not count. Those that fail are named
    and left out: a peer may not run on every card."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(sizes.rounds + 1):
        for name in [name for name in actions if name in found]:
            try:
                taken = seconds(actions[name], device, sizes.turns)
            except Exception as error:
                print(f"  {name} left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
                del found[name]
                continue
            if number:
                found[name].append(taken)
    return {name: statistics.median(times) for name, times in found.items()}


def memory(act, device) -> float:
    """Peak MB of a call beyond what is held; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def floor(d: int, n: int, members: int, batch: int, precision: str, device):
    """The five products of a step of several SAEs, and nothing else."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, f, w = (torch.randn(members, *shape, device=device, dtype=dtype) for shape in ((batch, d), (batch, n), (d, n)))

    def products():
        for _ in range(2):
            x @ w  # encoder; gradient of the latents
            f.mT @ x  # gradients of encoder and decoder
        f @ w.mT  # decoder

    return products


def ours(config: SAEConfig, members: int, precision: str, x, how: str, device):
    """One update of some SAEs: "graph", "compiled" (a graph with the loss and its gradients by `torch.compile`),
    "stacked" without a graph, or "alone", one SAE after the other."""
    recipe = replace(RECIPE, precision=precision)
    trainers = [Trainer(SAE(replace(config, seed=seed)), recipe, device) for seed in range(members)]
    for trainer in trainers:
        trainer.sparse = trainer.sparse and how == "alone"
    steps = iter(range(10, 10**9))
    if how == "alone":
        return lambda: [trainer.step(x, step) for step in [next(steps)] for trainer in trainers]
    stack = Stack(trainers, [0] * members)
    stack.graphs = None if how == "stacked" else stack.graphs
    if how == "compiled":
        stack._terms = compiled_terms(stack)
    return lambda: stack.step([[x]], next(steps))


class Seen:
    """An SAE as the loss sees it, which `torch.compile` can follow where a module's tensors are not its own."""

    def __init__(self, config: SAEConfig, tensors: dict[str, torch.Tensor]):
        self.config = config
        for name, value in tensors.items():
            setattr(self, name, value)


def compiled_terms(stack: Stack):
    """`Stack._terms` by `torch.compile`, forward and backward; on a CPU traced only."""

    def terms(leaves, target, pre, phase):
        def one(tensors, *given):
            return dense_terms(Seen(stack.sae.config, tensors), *given, phase.dead_after)

        return torch.vmap(one)(leaves | dict(stack.sae.named_buffers()), target, pre, stack.coefficient * stack.ramp)

    backend = "inductor" if stack.sae.device.type == "cuda" else "eager"
    return torch.compile(terms, backend=backend, fullgraph=True, dynamic=False)


def lost(config: SAEConfig, x) -> list[str]:
    """Parameters whose gradients are other ones when the loss is compiled: a wrong step's time says nothing. As of
    torch 2.13, of a derivative that a rule states itself (JumpReLU's thresholds) under `torch.vmap` some is lost."""
    stacks = [Stack([Trainer(SAE(config), RECIPE, x.device)], [0]) for _ in range(2)]
    stacks[1]._terms = compiled_terms(stacks[1])
    for stack in stacks:
        stack.schedule(10)
        stack.gradients(x[None], 10)
    plain, compiled = (dict(stack.sae.named_parameters()) for stack in stacks)
    return [name for name in plain if not _close(compiled[name].grad, plain[name].grad)]


def _close(found, wanted) -> bool:
    """To a hundredth of its norm, where products are rounded to ten bits."""
    return found is not None and bool((found - wanted).norm() <= 1e-2 * wanted.norm())


def peers(config: SAEConfig, x, precision: str, device) -> dict:
    """One update of one SAE by each peer that is installed."""
    found = {}
    sae = SAE(config)
    half = torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
    try:
        from peers import dictionary_learning_trainer, saelens_trainer

        theirs = dictionary_learning_trainer(sae, RECIPE, device=device)
        steps = iter(range(10, 10**9))

        def update():
            with half:
                theirs.update(next(steps), x)

        found["dictionary_learning"] = update
        lens = saelens_trainer(sae, RECIPE, len(x), device=device, autocast=precision == "bfloat16")
        found["SAELens"] = lambda: lens.step(x)
    except ImportError as error:
        print(f"  without peers ({error}): run it in the environment of `make peers`", flush=True)
    return found


def steps(sizes: Sizes, device, report) -> None:
    """The step by width, dictionary and size of the group."""
    print(
        "\n| d, F | SAEs | format | ms per SAE-step | share of floor | MB | times dictionary_learning | times SAELens |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for d, n in sizes.shapes:
        config = SAEConfig(d, n, TopK(min(20, n // 4)), aux=AuxK(dead_after_tokens=10**12))
        x = torch.randn(sizes.batch, d, device=device) / d**0.5
        for precision in ("float32", "bfloat16"):
            theirs = peers(config, x, precision, device)
            for members in sizes.members:
                step = ours(config, members, precision, x, "graph", device)
                used = memory(step, device)
                actions = {"ours": step, "floor": floor(d, n, members, sizes.batch, precision, device)} | theirs
                found = in_turns(actions, device, sizes)
                if not {"ours", "floor"} <= found.keys():
                    continue
                one = found["ours"] / members
                ratios = [f"{found[p] / one:.1f}" if p in found else "" for p in ("dictionary_learning", "SAELens")]
                share = found["floor"] / found["ours"]
                row = [f"{d}, {n}", members, precision, f"{1e3 * one:.3f}", f"{share:.0%}", f"{used:.0f}", *ratios]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
                report["steps"].append(dict(d=d, n=n, members=members, precision=precision, floor_share=share, **found))


def graphs(sizes: Sizes, device, report) -> None:
    """What stacking, the graph and `torch.compile` inside it give, by architecture."""
    d, n = sizes.shapes[min(1, len(sizes.shapes) - 1)]
    members, k = sizes.members[-1], min(20, n // 4)
    x = torch.randn(sizes.batch, d, device=device) / d**0.5
    dead = AuxK(dead_after_tokens=1)
    cases = {
        "TopK": SAEConfig(d, n, TopK(k)),
        "TopK with AuxK at work": SAEConfig(d, n, TopK(k), aux=dead),
        "BatchTopK": SAEConfig(d, n, BatchTopK(k)),
        "Matryoshka BatchTopK": SAEConfig(d, n, BatchTopK(k), MATRYOSHKA),
        "JumpReLU": SAEConfig(d, n, JumpReLU(float(k))),
        "ReLU": SAEConfig(d, n, ReLU(0.03)),
        "Gated": SAEConfig(d, n, Gated(0.03)),
        "TopK with OrtSAE every step": SAEConfig(d, n, TopK(k), penalties=(OrtSAE(every=1),)),
        "TopK with C2R every step": SAEConfig(d, n, TopK(k), penalties=(C2R(every=1),)),
        "TopK with OrtSAE in chunks": SAEConfig(d, n, TopK(k), penalties=(OrtSAE(every=1, chunk=n // 2),)),
    }
    print(f"\nd {d}, F {n}, groups of {members}, float32\n")
    print(
        "| architecture | ms per SAE-step | of TopK's | times one by one | times stacked without a graph | times "
        "compiled |\n| --- | --- | --- | --- | --- | --- |"
    )
    first = None
    for name, config in cases.items():
        torch.compiler.reset()  # it gives up on a function that it has compiled for many SAEs
        others = ["alone", "stacked", "compiled"]
        if names := lost(config, x):
            print(f"  {name}: compiled left out, it loses gradients of {', '.join(names)}", flush=True)
            others.remove("compiled")
        found = in_turns({how: ours(config, members, "float32", x, how, device) for how in ("graph", *others)},
                         device, sizes)  # fmt: skip
        if "graph" not in found:
            continue
        one = found["graph"] / members
        first = first or one
        times = [
            f"{found[how] / found['graph']:.2f}" if how in found else "" for how in ("alone", "stacked", "compiled")
        ]
        row = [name, f"{1e3 * one:.3f}", f"{one / first:.2f}", *times]
        print("| " + " | ".join(row) + " |", flush=True)
        report["graphs"].append({"architecture": name, **found})


def model_of(plan: Plan, sizes: Sizes, dtype: str, device):
    """The profile's language model up to its hook point, with random weights."""
    import copy

    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(plan.config)
    config.num_hidden_layers = min(plan.prefix + 1, sizes.layers or 10**9)
    config.vocab_size = 1000
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def harvest(sizes: Sizes, device, report) -> None:
    """Forwards of the `gpu` profile's model to its hook point, beside the products in them."""
    plan = Plan(load_profile("gpu"))
    print("\n| forwards | tokens/s | share of their products' rate |\n| --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        model = model_of(plan, sizes, dtype, device)
        last = model.config.num_hidden_layers - 1
        ids = torch.randint(100, 900, (sizes.sequences, plan.length), generator=torch.Generator().manual_seed(0))
        x = torch.randn(ids.numel(), plan.width, device=device, dtype=model.dtype)
        weights = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
        inputs = {p.shape[1]: torch.randn(len(x), p.shape[1], device=device, dtype=model.dtype) for p in weights}

        def forward():
            return activations(model, ids, block=last, batch=len(ids), device=device, dtype=None)

        found = in_turns(
            {"forward": forward, "products": lambda: [inputs[p.shape[1]] @ p.t() for p in weights]}, device, sizes
        )
        share, rate = found["products"] / found["forward"], ids.numel() / found["forward"]
        print(f"| {dtype}, {len(ids)} x {plan.length} tokens | {rate:,.0f} | {share:.0%} |", flush=True)
        report["harvest"].append({"dtype": dtype, "tokens_per_second": rate, "share": share, **found})


def pair(sizes: Sizes, device, report) -> None:
    """Forwards and training of a group of eight: each alone, one after the other, and at once."""
    plan = Plan(load_profile("gpu"))
    model = SimpleNamespace(model=model_of(plan, sizes, "bfloat16" if device.type == "cuda" else "float32", device))
    last = model.model.config.num_hidden_layers - 1
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(100, 900, (sizes.pair_tokens // plan.length, plan.length), generator=generator)
    n = min(plan.saes[0].n_latents, 4 * sizes.batch)
    saes = [
        replace(plan.saes[0], n_latents=n, seed=seed, own_order=True, aux=None) for seed in range(sizes.members[-1])
    ]

    def stream(overlap: bool):
        return from_model(
            model, blocks, block=last, p=0.3, token_id=1, mask_seed=0, bos_id=None, batch_size=sizes.batch, seed=0,
            pool_tokens=sizes.pool_tokens, overlap=overlap, progress=False,
        )  # fmt: skip

    x = torch.cat(
        [x for x, _ in zip((x for x, _ in stream(False).to(device)), range(sizes.pool_tokens // sizes.batch))]
    )
    steps = sizes.pair_tokens // sizes.batch
    recipe = TrainConfig(steps, precision="bfloat16" if device.type == "cuda" else "float32")
    runs = {
        "forwards alone": lambda: [None for _ in zip(range(steps), stream(False).to(device))],
        "training alone": lambda: train(
            saes, ActivationStream.from_array(x, batch_size=sizes.batch, seed=0), recipe, device=device, progress=False
        ),  # fmt: skip
        "in turn": lambda: train(saes, stream(False), recipe, device=device, progress=False),
        "at once": lambda: train(saes, stream(True), recipe, device=device, progress=False),
    }
    print(
        f"\n{len(saes)} SAEs of {n} latents, {steps} steps\n\n| what | tokens/s | of the slower alone |\n"
        "| --- | --- | --- |"
    )
    rates = {}
    for name, act in runs.items():
        rates[name] = steps * sizes.batch / seconds(act, device, 1)
        slower = min(rates[each] for each in ("forwards alone", "training alone") if each in rates)
        print(f"| {name} | {rates[name]:,.0f} | {rates[name] / slower:.0%} |", flush=True)
    report["pair"].append(rates)


def shares(report, device) -> None:
    """The share of its data sheet that a card reached, where a plan assumes one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = [gpu for gpu in GPUS if re.search(CARDS[gpu.name], name)]
    if not known or not report["steps"] or not report["harvest"]:
        return
    [gpu] = known
    plan = Plan(load_profile("gpu"))
    training = plan.profile.training
    rows = [
        r for r in report["steps"] if (r["d"], r["n"]) == (plan.width, 4096) and r["precision"] == training.precision
    ]
    row = min(rows, key=lambda r: r["members"])  # its groups are small
    config = SAEConfig(row["d"], row["n"], TopK(20))
    peak = gpu.half if training.precision == "bfloat16" else gpu.single
    arithmetic = training.batch_size * step_flop(config) / (1e12 * peak)
    arithmetic += step_traffic(config, training.batch_size) / (1e12 * gpu.bandwidth)
    forwards = next(r for r in report["harvest"] if r["dtype"] == plan.profile.model.dtype)
    flop = plan.forward_flop(plan.prefix, 1) * forwards["tokens_per_second"]
    peak = gpu.half if plan.profile.model.dtype == "bfloat16" else gpu.single
    found = {
        "activations": round(flop / (1e12 * peak), 3),
        "training": round(arithmetic * row["members"] / row["ours"], 3),
    }
    report["shares"] = {gpu.name: found}
    told = ", ".join(f"{stage} {share:.1%}" for stage, share in found.items())
    card = f"{gpu.name} ({name}, torch {torch.__version__})"
    print(f"\nShare of the data sheet of {card}: {told}; plans assume {SHARE:.0%}")


PARTS = {"steps": steps, "graphs": graphs, "harvest": harvest, "pair": pair}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one of the tables")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at sizes that say nothing")
    parser.add_argument("--out", type=Path, help="write all numbers there as JSON")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry runs the script on the CPU.")
    device, sizes = (torch.device("cpu"), DRY) if given.dry else (torch.device("cuda"), CARD)
    card = "CPU, a dry run: the numbers say nothing" if given.dry else torch.cuda.get_device_name(device)
    report: dict = {"card": card, "torch": torch.__version__, "batch": sizes.batch, **{name: [] for name in PARTS}}
    print(f"{card}, torch {torch.__version__}, batches of {sizes.batch} tokens", flush=True)
    before = set(STACKED)
    if given.dry:
        STACKED.add("cpu")
    else:
        allow_tf32()
    try:
        with own_stream(device):
            for name in [given.only] if given.only else PARTS:
                PARTS[name](sizes, device, report)
                if given.out:
                    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            shares(report, device)
    finally:
        STACKED.intersection_update(before)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
