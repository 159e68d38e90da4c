"""A plan as text that fits 80 columns: `make plan PROFILE=paper`."""

from masksae.app.plan import GPUS, SHARE, Plan, peers
from masksae.errors import ConfigError
from masksae.memory import ADAM_AND_WEIGHTS, parameters
from masksae.study.profile import Profile
from masksae.study.report.tables import to_markdown, to_text


def text(plan: Plan, device: str, kept: float = 0.0, measured: dict[str, float] | None = None) -> str:
    """The whole plan; `measured` holds hours of stages on this machine (`measure.hours_here`)."""
    profile = plan.profile
    head = [
        f"{profile.name}: {profile.description}" if profile.description else profile.name,
        _text(plan),
        f"{len(plan.saes)} SAEs in {len(plan.groups)} groups on {plan.streams} streams of activations; {plan.steps:,} steps of {profile.training.batch_size:,} tokens",
    ]
    return "\n\n".join(["\n".join(head), costs(plan, measured), _verdict(plan, device, kept)])


def costs(plan: Plan, measured: dict[str, float] | None = None) -> str:
    """What does not depend on the machine: time, other tools, space."""
    return "\n\n".join([_times(plan, measured), _peers(plan), _space(plan)])


def record(plan: Plan, device: str, kept: float = 0.0, measured: dict[str, float] | None = None) -> dict:
    """The same as JSON-able numbers: FLOP, hours by GPU, bytes."""
    stages = {work.stage: work for work in plan.work}
    return {
        "profile": plan.profile.name,
        "saes": len(plan.saes),
        "steps": plan.steps,
        "text_tokens": plan.text_tokens,
        "flop": {name: work.flop + work.sae_flop for name, work in stages.items()},
        "hours": {gpu.name: {name: plan.hours(work, gpu) for name, work in stages.items()} for gpu in GPUS},
        "hours_here": measured,
        "memory_bytes": {place: sum(plan.memory(place).values()) for place in ("cpu", "cuda")},
        "disk_bytes": sum(plan.disk().values()),
        "verdict": _verdict(plan, device, kept),
    }


def _text(plan: Plan) -> str:
    text, contexts = plan.profile.text, plan.profile.contexts.tokens
    parts = f"train {text.train_tokens:,}, held out {text.held_out_tokens:,}, contexts {contexts:,}"
    needed = f"Text needed: {plan.text_tokens:,.0f} tokens in whole blocks of {text.block_length}"
    return f"{needed}\n({parts}; {text.held_out_share:.3g} of documents held out)"


def amount(value: float, unit: str) -> str:
    """A number with a prefix.

    >>> amount(2.5e17, "FLOP"), amount(640e6, "B")
    ('250 PFLOP', '640 MB')
    """
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(hours: float) -> str:
    """
    >>> duration(0.01), duration(0.5), duration(30)
    ('36 s', '30 min', '30 h')
    """
    return f"{hours * 3600:.0f} s" if hours < 1 / 60 else f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.3g} h"


def _times(plan: Plan, measured: dict[str, float] | None) -> str:
    rows = [["stage", "work", *(gpu.name for gpu in GPUS), *(["here, measured"] if measured else [])]]
    for work in plan.work:
        here = [duration(measured[work.stage]) if work.stage in measured else ""] if measured else []
        hours = [duration(plan.hours(work, gpu)) for gpu in GPUS]
        rows.append([work.stage, amount(work.flop + work.sae_flop, "FLOP"), *hours, *here])
    total = [sum(plan.hours(work, gpu) for work in plan.work) for gpu in GPUS]
    rows.append(
        [
            "all",
            amount(sum(w.flop + w.sae_flop for w in plan.work), "FLOP"),
            *map(duration, total),
            *([""] if measured else []),
        ]
    )
    title = f"Time on one GPU, by arithmetic at {SHARE:.0%} of its data sheet (not measured):"
    return f"{title}\n{to_text(rows)}"


def _peers(plan: Plan) -> str:
    ours = {work.stage: work.flop + work.sae_flop for work in plan.work}
    columns = {"masksae": ours, **{f"{name} + SAEBench": cost for name, cost in peers(plan).items()}}
    rows = [["stage", *columns]]
    rows += [[stage, *(amount(cost[stage], "FLOP") for cost in columns.values())] for stage in ours]
    rows.append(["all", *(amount(sum(cost.values()), "FLOP") for cost in columns.values())])
    return f"The same grid elsewhere, by the work of its products:\n{to_text(rows)}"


def _space(plan: Plan) -> str:
    rows = []
    for title, parts in (("memory of a GPU", plan.memory()), ("disk (user's cache)", plan.disk())):
        rows.append([title, amount(sum(parts.values()), "B")])
        rows += [[f"  {name}", amount(value, "B")] for name, value in parts.items()]
    rows.append(["ordinary memory beside a GPU", amount(plan.host(), "B")])
    rows.append(["memory without a GPU", amount(sum(plan.memory("cpu").values()), "B")])
    return f"Space:\n{to_text(rows)}"


def _verdict(plan: Plan, device: str, kept: float) -> str:
    try:
        plan.check(device, kept)
    except ConfigError as error:
        return f"Here ({device}): does not fit. {error}"
    return f"Here ({device}): fits."


def beyond(profile: Profile) -> str:
    """A markdown table: a profile as it is, with 16 times the latents, with 20 times the tokens, on a model of 27 B parameters, and all
    three."""
    wide = profile.model_copy(
        update={"saes": [g.model_copy(update={"n_latents": 16 * g.n_latents}) for g in profile.saes]}
    )
    long = profile.model_copy(
        update={"text": profile.text.model_copy(update={"train_tokens": 20 * profile.text.train_tokens})}
    )
    model = profile.model.model_copy(update={"source": "hub:google/gemma-2-27b", "block": 22})
    large = profile.model_copy(update={"model": model})
    cases = {"as it is": profile, "16 x latents": wide, "20 x tokens": long, "27 B model": large}
    cases["all three"] = large.model_copy(update={"saes": wide.saes, "text": long.text})
    gpu = GPUS[-1]
    rows = [
        ["", "forwards", "training", "H100 hours", "GPU memory: model", "one SAE with Adam", "all of an arm", "disk", "activations, if stored"]
    ]  # fmt: skip
    for name, case in cases.items():
        plan = Plan(case)
        harvest, training, _ = plan.work
        one = 4 * ADAM_AND_WEIGHTS * parameters(plan.saes[0])
        stored = 2 * case.text.train_tokens * plan.width * plan.streams
        memory = [plan.memory()["language model"], one, sum(plan.memory().values()), sum(plan.disk().values()), stored]
        hours = f"{sum(plan.hours(w, gpu) for w in plan.work):.3g}"
        work = [amount(harvest.flop, "FLOP"), amount(training.sae_flop, "FLOP"), hours]
        rows.append([name, *work, *(amount(value, "B") for value in memory)])
    return to_markdown(rows).rstrip("\n")
