"""What must be known of some SAEs before their scores are compared: they reconstruct badly, or are not as sparse as the
others."""


def _worse_than_the_mean(row: dict) -> bool:
    return row["ev_centred"] <= 0


def _worse_than_zeros(row: dict) -> bool:
    return row["ce_sae"] >= row["ce_zero"] or row["kl_sae"] >= row["kl_zero"]


def _short_of_k(row: dict) -> bool:
    return row["mode"] == "matched" and row["l0"] < 0.99 * row["k"]


REMARKS = {
    "reconstruct no better than the mean activation (explained variance 0 or less); other scores say little of such an "
    "SAE: train on more tokens (text.train_tokens, training.epochs) or with another training.lr": _worse_than_the_mean,
    "serve the language model no better than zeros in the activation's place": _worse_than_zeros,
    "do not reach L0 = k at any threshold, so they are not compared at equal L0: train longer": _short_of_k,
}
"""What can be wrong with an SAE's row of reconstruction scores."""


def remarks(rows: list[dict]) -> list[str]:
    """What is wrong with some of the SAEs, a sentence each; [] if all is well.

    rows  of `reconstruction_scores`
    """
    told = []
    for what, holds in REMARKS.items():
        names = [f"{row['sae']} ({row['mode'].replace('_', ' ')})" for row in rows if holds(row)]
        if names:
            shown = ", ".join([*names[:6], *(["..."] if len(names) > 6 else [])])
            told.append(f"{len(names)} of {len(rows)} rows {what}: {shown}.")
    return told
