"""What makes the regime: the variants of a profile, unmasked SAEs only, one row of a table for each SAE.

A variant is the profile with some of its keys changed, and a run of its own. Every row that was ever taken stays in the
table; a score of absorption is worth its name only where the SAE has latents for what is absorbed.
"""

from masksae import progress
from masksae.errors import ConfigError
from masksae.study.run import Run
from masksae.study.sections import Variant
from masksae.study.work import SCORES

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
    rows = []
    for number, variant in enumerate(profile.variants, 1):
        progress.say(f"variant {number} of {len(profile.variants)}: {variant.name}")
        for part in variant_run(run, variant).parts:
            rows += _rows(part, variant)
            run.save_result("gate", rows)
    return rows


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
        }
        | {key: row[key] for key in ("architecture", "grid", "k", "seed")}
        | {key: row[key] for key in COLUMNS if key in row}
        for row in scores.values()
    ]
