"""The generated parts of docs/scale.md: `.venv/bin/python tools/scale.py`."""

from masksae import Profile, load_profile
from masksae.app.plan import GPUS, Plan
from masksae.app.plan_text import costs
from masksae.app.text import amount
from masksae.memory import ADAM_AND_WEIGHTS, parameters

PROFILES = ("paper", "paper-gemma")


def beyond(profile: Profile) -> str:
    """A markdown table: a profile as it is, with 16 times the latents, with 20 times the tokens, on a model of 27 B
    parameters, and all three."""
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
        "| | forwards | training | H100 hours | GPU memory: model | one SAE with Adam | all of an arm | disk | activations, if stored |",
        "|" + " --- |" * 9,
    ]
    for name, case in cases.items():
        plan = Plan(case)
        harvest, training, _ = plan.work
        one = 4 * ADAM_AND_WEIGHTS * parameters(plan.saes[0])
        stored = 2 * case.text.train_tokens * plan.width * plan.streams
        cells = [
            amount(harvest.flop, "FLOP"),
            amount(training.sae_flop, "FLOP"),
            f"{sum(plan.hours(w, gpu) for w in plan.work):.3g}",
        ]
        memory = [plan.memory()["language model"], one, sum(plan.memory().values()), sum(plan.disk().values()), stored]
        rows.append(f"| {name} | " + " | ".join([*cells, *(amount(value, "B") for value in memory)]) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    for name in PROFILES:
        print(f"{name}\n\n{costs(Plan(load_profile(name)))}\n")
    print(beyond(load_profile("paper-gemma")))
