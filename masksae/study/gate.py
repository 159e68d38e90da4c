"""What makes the regime: the variants of a profile, unmasked SAEs only, one row of a table for each SAE.

A variant is the profile with some of its keys changed, and a run of its own. Every row that was ever taken stays in the
table; a score of absorption is worth its name only where the SAE has latents for what is absorbed.
"""

import time

from masksae import progress
from masksae.errors import ConfigError
from masksae.saes.sae import SAE
from masksae.study.run import Run
from masksae.study.sections import Variant
from masksae.study.work import SCORES
from masksae.training.step import Trainer

TAKEN = ("training", "reconstruction", "absorption", "contexts")
COLUMNS = (
    "ev_centred", "l0", "dead_in_training", "dead_latents", "mean_full", "mean_specific", "mean_dense",
    "dense_absorbers", "main_f1", "main_recall", "context_full", "context_specific", "context_dense_absorbers",
    "context_main_f1", "context_main_recall",
)  # fmt: skip


def variant_run(run: Run, variant: Variant) -> Run:
    """The run of one variant, with folders of its own below the profile's."""
    changed = Run(run.profile.changed(variant))
    changed.results = run.results / "variants" / variant.name
    changed.build = run.build / "variants" / variant.name
    return changed


def gate_rows(run: Run) -> list[dict]:
    """One row for each SAE of each variant: what was changed, and its scores as trained; written to `gate.json` as they
    come. Raises ConfigError for a profile without variants, or with an arm that masks."""
    profile = run.profile
    if not profile.variants:
        raise ConfigError(f"Profile {profile.name} has no variants. Name some: [{{name: ..., changes: {{...}}}}].")
    if any(member.arm.drawn for member in profile.members):
        raise ConfigError("The gate is for unmasked SAEs alone: leave arms that mask out of the profile.")
    rows, speeds = [], {}
    for number, variant in enumerate(profile.variants, 1):
        progress.say(f"variant {number} of {len(profile.variants)}: {variant.name}")
        for part in variant_run(run, variant).parts:
            rows += _rows(part, variant)
            run.save_result("gate", rows)
    for variant in profile.variants:  # after all that computes, one after the other, so that they can be compared
        speeds |= {(variant.name, name): value for name, value in seconds_per_step(variant_run(run, variant)).items()}
    rows = [row | {"minutes": row["steps"] * speeds[row["variant"], row["grid"]] / 60} for row in rows]
    run.save_result("gate", rows)
    return rows


def seconds_per_step(run: Run, steps: int = 30) -> dict[str, float]:
    """By grid, what a training step of one of its SAEs takes here on held-out activations: the median of some."""
    training, found = run.profile.training, {}
    x = run.held_out.float()
    x = x / x.pow(2).sum(1).mean().sqrt()  # as training scales them
    for name, member in {member.grid.name: member for member in run.profile.members}.items():
        config = training.config(10 * steps)
        trainer = Trainer(SAE(member.config(run.width)), config, run.device)
        taken = []
        for step in range(steps):
            start = step * training.batch_size % (len(x) - training.batch_size)
            begun = time.perf_counter()
            trainer.step(x[start : start + training.batch_size], step)
            taken.append(time.perf_counter() - begun)
        found[name] = sorted(taken)[steps // 2]
    return found


def _rows(part, variant: Variant) -> list[dict]:
    scores = {}
    for name in TAKEN:
        for row in SCORES[name](part):
            if row.get("mode", "as_trained") == "as_trained":
                scores.setdefault(row["sae"], {}).update(row)
    training = part.profile.training
    return [
        {
            "variant": variant.name,
            "block": part.profile.model.block,
            "batch": training.batch_size,
            "steps": row["step"] + 1,
            "latents": part.run.latents_of(row),
        }
        | {key: row[key] for key in ("architecture", "grid", "k", "seed")}
        | {key: row[key] for key in COLUMNS if key in row}
        for row in scores.values()
    ]
