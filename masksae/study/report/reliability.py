"""Which metric can be trusted here: how much the seed moves each score, against what it should see. `masksae reliability`.

Reads the results of a profile and prints the table of docs/metrics.md. For each score, on the unmasked SAEs of the first grid at matched clean
L0: the standard deviation between seeds; the smallest true difference of the arms that so many pairs find with probability .8; and, as
a signal of known size, how far the score moves when every token gets more latents (the same SAEs at the largest L0), in standard deviations.
"""

from statistics import mean, stdev

import pandas as pd

from masksae.files import read_json, repository
from masksae.study.profile import load_profile
from masksae.study.report.tables import to_markdown
from masksae.study.stats import paired_effect

SCORES = {
    "reconstruction": {"ev_centred": "explained variance", "ce_score": "CE score"},
    "absorption": {"mean_full": "absorption, first letters"},
    "contexts": {"context_full": "absorption, contexts"},
    "probing": {"probing_auc_1": "probing, 1 latent", "probing_auc_16": "probing, 16 latents"},
    "ood": {"ood_auc_16": "shifted texts, 16 latents"},
    "perturbation": {"tpp_10": "TPP, 10 latents"},
}
"""Results and their scores, with names for the table."""


def reliability(profile="laptop") -> pd.DataFrame:
    """A row per score; `signal` is None where no SAEs of another L0 and the same architecture were scored."""
    folder, grids = repository() / "results" / load_profile(profile).name, load_profile(profile).grids
    [first, *others] = [grid.name for grid in grids if grid.architecture == grids[0].architecture]
    rows = []
    for result, names in SCORES.items():
        scores = pd.DataFrame(read_json(folder / f"{result}.json")).query("mode == 'matched'")
        for score, words in names.items():
            if score not in scores:
                continue
            of = lambda arm, grid: scores.query("arm == @arm and grid == @grid").sort_values("seed")[score].tolist()  # noqa: B023
            unmasked, masked = of("unmasked", first), of("masked", first)
            spread, other = stdev(unmasked), of("unmasked", others[-1]) if others else []
            rows.append(
                {
                    "score": words,
                    "unmasked": mean(unmasked),
                    "between seeds": spread,
                    "arms differ by": mean(masked) - mean(unmasked),
                    "seen from": paired_effect(unmasked, masked).detectable,
                    "signal": (mean(other) - mean(unmasked)) / spread if other else None,
                }
            )
    return pd.DataFrame(rows)


def page_table(table: pd.DataFrame) -> str:
    """The table as it stands in docs/metrics.md."""
    signal = lambda value: "–" if pd.isna(value) else f"{round(value):+d} SD".replace("+0", "0")
    columns = {
        "score": ("score", str),
        "mean, unmasked": ("unmasked", "{:.3f}".format),
        "SD between seeds": ("between seeds", "{:.4f}".format),
        "masked less unmasked": ("arms differ by", "{:+.3f}".format),
        "smallest difference seen": ("seen from", "{:.3f}".format),
        "more latents move it by": ("signal", signal),
    }
    return to_markdown(pd.DataFrame({title: table[name].map(form) for title, (name, form) in columns.items()}))
