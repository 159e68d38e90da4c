"""Norms of the residual stream at ordinary and at masked positions (notebook 01): a special token may become an
attention sink."""

import pandas as pd

from masksae.activations import row_norms
from masksae.study.inputs import Inputs

SEQUENCES = 32
"""Blocks whose positions are measured."""


def norms(run: Inputs) -> list[dict]:
    """Norm of the residual stream at every position of some training blocks, by arm and by whether the position is
    masked."""
    rows = []
    for arm in run.profile.arms:
        ids, is_masked = run.corrupt(arm, run.ids("train", slice(SEQUENCES)))
        norm = row_norms(run.activations(ids))
        rows += [
            {"arm": arm.name, "masked": m, "norm": round(v, 4)}
            for m, v in zip(is_masked[:, len(run.start) :].flatten().tolist(), norm.tolist())
        ]
    return rows


def norm_table(rows: list[dict]) -> list[dict]:
    """Median and largest norm by arm and by whether the position is masked; rows of `norms`."""
    grouped = pd.DataFrame(rows).groupby(["arm", "masked"], sort=False)["norm"]
    return grouped.agg(positions="size", median="median", largest="max").reset_index().to_dict("records")
