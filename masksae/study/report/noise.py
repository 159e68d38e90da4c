"""The noise study: where the variance of absorption comes from."""

import pandas as pd

from masksae.study import stats


def noise_table(rows: list[dict]) -> list[dict]:
    """Where the variance of absorption comes from, per arm and for the difference of each later arm to the first:
    standard deviations by source, and their shares of the variance. Rows of the noise study."""
    table = pd.DataFrame(rows)
    axes = ["seed", "draw", "split"]
    values = {
        arm: part.set_index(axes)["mean_full"].sort_index().to_numpy().reshape([part[axis].nunique() for axis in axes])
        for arm, part in table.groupby("arm", sort=False)
    }
    first, *others = values
    values |= {f"{arm} less {first}": values[arm] - values[first] for arm in others}
    sources = []
    for name, array in values.items():
        used = [axis for axis, size in zip(axes, array.shape) if size > 1]
        parts = stats.variance_components(array.squeeze(), used)
        total = sum(parts.values()) or 1.0
        sources += [
            {"of": name, "mean": float(array.mean()), "source": source, "sd": v**0.5, "share": v / total}
            for source, v in parts.items()
        ]
    return sources


def in_words(components: list[dict]) -> str:
    """How much of the difference between arms is the SAEs' own, and what most of the rest is; rows of `noise_table`."""
    told = []
    for name in dict.fromkeys(row["of"] for row in components if " less " in row["of"]):
        share = {row["source"]: row["share"] for row in components if row["of"] == name}
        other = max((source for source in share if source != "seed"), key=share.get)
        told.append(
            f"of the variance of {name.replace(' less ', ' less the ')}, {100 * share['seed']:.0f} % belongs to the "
            f"pair of SAEs, and most of the rest ({100 * share[other]:.0f} %) to {other.replace(' x ', ' × ')}"
        )
    off = [sum(r["sd"] ** 2 for r in components if r["of"] == arm and r["source"] != "seed") ** 0.5
           for arm in dict.fromkeys(row["of"] for row in components if " less " not in row["of"])]  # fmt: skip
    size = f"One evaluation of one SAE is off by {min(off):.3f} to {max(off):.3f} (SD)"
    return f"{size}; {'; '.join(told)}."
