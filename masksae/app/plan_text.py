"""A plan as text that fits 80 columns: `masksae plan paper`."""

from masksae.app.amounts import amount, duration
from masksae.app.plan import GPUS, MEASURED, SHARE, Plan, peers
from masksae.errors import ConfigError
from masksae.study.report.tables import to_text


def text(plan: Plan, device: str, kept: float = 0.0, measured: dict[str, float] | None = None) -> str:
    """The whole plan; `measured` holds hours of stages on this machine (`measure.hours_here`)."""
    profile = plan.profile
    head = [
        f"{profile.name}: {profile.description}" if profile.description else profile.name,
        _text(plan),
        f"{len(plan.saes)} SAEs in {len(plan.groups)} groups on {plan.streams} streams of activations; {plan.steps:,} "
        f"steps of {profile.training.batch_size:,} tokens",
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


def _times(plan: Plan, measured: dict[str, float] | None) -> str:
    rows = [["stage", "work", *(gpu.name for gpu in GPUS), *(["here, measured"] if measured else [])]]
    for work in plan.work:
        here = [duration(measured[work.stage]) if work.stage in measured else ""] if measured else []
        hours = [duration(plan.hours(work, gpu)) for gpu in GPUS]
        rows.append([work.stage, amount(work.flop + work.sae_flop, "FLOP"), *hours, *here])
    total = [sum(plan.hours(work, gpu) for work in plan.work) for gpu in GPUS]
    work = amount(sum(w.flop + w.sae_flop for w in plan.work), "FLOP")
    rows.append(["all", work, *map(duration, total), *([""] if measured else [])])
    return "\n".join(
        [f"Time on one GPU, by arithmetic at {SHARE:.0%} of its data sheet ({_measured()}):", to_text(rows)]
    )


def _measured() -> str:
    """What of the shares was measured, and where."""
    found = [
        f"{name}: {', '.join(f'{stage} {share:.0%}' for stage, share in shares.items())}"
        for name, shares in MEASURED.items()
    ]
    return "but as measured on " + "; ".join(found) if found else "not measured"


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
