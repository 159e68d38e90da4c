"""What makes the regime, on a page: docs/gate.md, out of results/gate/gate.json."""

import pandas as pd

from masksae.study.profile import Profile
from masksae.study.report.claims import checked
from masksae.study.report.tables import number, to_markdown
from masksae.study.sections import Gate

PAGE = "docs/gate.md"

COLUMNS = (
    ("EV", "ev_centred", 3),
    ("dead", "dead_in_training", 0),
    ("letters: absorption", "mean_full", 3),
    ("specific", "mean_specific", 3),
    ("dense absorbers", "dense_absorbers", 2),
    ("main F1", "main_f1", 2),
    ("recall", "main_recall", 2),
    ("contexts: absorption", "context_full", 3),
    ("specific", "context_specific", 3),
    ("main F1", "context_main_f1", 2),
    ("recall", "context_main_recall", 2),
    ("minutes", "minutes", 1),
)
"""Title, key of a row, digits."""


def failed(row: dict, bounds: Gate) -> list[str]:
    """What a row of `gate_rows` does not reach, in words; nothing if it passes."""
    checks = checked(pd.DataFrame([row | {"dead": row["dead_in_training"] / row["latents"]}]), bounds)
    words = (
        f"main F1 of letters {row['main_f1']:.2f}",
        f"main F1 of contexts {row['context_main_f1']:.2f}",
        f"dense {row['dense_absorbers'] or 0.0:.2f}",
        f"dead {row['dead_in_training']}",
    )
    return [told for told, check in zip(words, checks.values(), strict=True) if not check["passed"]]


def page(profile: Profile, rows: list[dict]) -> str:
    """docs/gate.md: every row that was taken, what passes, and what is chosen by that. rows: of `gate_rows`."""
    bounds = profile.decisions.gate
    table = [["what is changed", "SAE", "block", "batch", "steps", "seed", *(title for title, _, _ in COLUMNS), "gate"]]
    for row in rows:
        misses = failed(row, bounds)
        values = [number(row.get(key), digits) for _, key, digits in COLUMNS]
        told = [
            row["variant"].replace("_", " "),
            row["grid"],
            *(number(row[key]) for key in ("block", "batch", "steps", "seed")),
        ]
        table.append([*told, *values, "passes" if not misses else "; ".join(misses)])
    widths = " or ".join(f"{n:,}" for n in sorted({row["latents"] for row in rows}))
    return f"""<!-- written by tools/pages.py; edit that -->
# What makes absorption measurable

A word counts as absorbed when the main latents of its letter are silent and another latent carries the letter. That
says something only of an SAE that *has* latents for letters. So before any masked SAE was trained for a result,
unmasked ones were scored under one change at a time (`masksae gate`, {profile.description}), and
bounds were set:

* mean F1 of the main latents: at least {bounds.letters_f1:g} for first letters, and at least {bounds.contexts_f1:g}
  for parents that another token sets;
* at most {100 * bounds.dense_absorbers:g} % of absorbed words credited to latents that fire on more than 30 % of all;
* at most {100 * bounds.dead:g} % of the latents dead at the end of training.

What fails one of them is "not measurable" wherever absorption is judged ([the rules](preregistration.md)). Every row
that was taken stands here, with the threshold that the SAE was trained with.

![Every row: explained variance, F1 of main latents, dense absorbers, absorption](../figures/gate/gate.png)

{choice(profile, rows)}

{to_markdown(table)}
*Minutes*: steps times the median of a step of one SAE on 2 cores, timed after all else one after the other, without the
language model's forwards. *Dead*: latents that no longer fired at the end of training, of {widths}. *Specific*:
credited to a latent that fires on less than a tenth of the words.
"""


def choice(profile: Profile, rows: list[dict]) -> str:
    """What the rule says: of those that pass at the first grid's k, the highest letter F1, then the fewest minutes."""
    bounds = profile.decisions.gate
    k = profile.main_grid.l0
    asked = {variant.name for variant in profile.variants if variant.candidate}
    found = [r for r in rows if r["k"] == k and r["variant"] in asked and not failed(r, bounds)]
    found.sort(key=lambda row: (-round(row["main_f1"], 2), row.get("minutes", 0.0)))
    if not found:
        return f"**At L0 {k:g} no row passes.**"
    lines = [
        f"{place}. {row['variant'].replace('_', ' ')}, {row['grid']}, seed {row['seed']}: letters F1 "
        f"{row['main_f1']:.2f}, contexts F1 {row['context_main_f1']:.2f}, {number(row.get('minutes'), 1)} minutes"
        for place, row in enumerate(found, 1)
    ]
    told = f"Rows that pass at L0 {k:g}, by the F1 of letters, then by minutes; the first is what the profiles use."
    told += _seeds([row for row in rows if row["variant"] in asked])
    return "\n".join([told, "", *lines])


def _seeds(rows: list[dict]) -> str:
    """How far two seeds of the same thing are apart, as a sentence; "" without any."""
    same: dict[tuple, list[dict]] = {}
    for row in rows:
        same.setdefault(tuple(row[key] for key in ("grid", "block", "batch", "steps")), []).append(row)
    pairs = [found for found in same.values() if len({row["seed"] for row in found}) > 1]
    if not pairs:
        return ""
    apart = [max(r["main_f1"] for r in found) - min(r["main_f1"] for r in found) for found in pairs]
    return f" Two seeds of the same SAE are up to {max(apart):.2f} apart: rows that are nearer are not told apart."
