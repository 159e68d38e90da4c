"""What each score is called where a reader meets it, which result file holds it, and how many digits it deserves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One score, or one for each number of latents."""

    result: str
    """The file results/<profile>/NAME.json that holds it."""
    words: str
    """Its name; {} stands for the number of latents."""
    more: str = ""
    """What follows the name where nothing else explains it."""
    digits: int = 3
    """After the point."""
    heading: str = ""
    """Its name as a column of which the rest of the table says which kind or how many latents; empty: `words`."""


SCORES = {
    "l0": Score("reconstruction", "L0", ", latents active on a clean token", digits=1),
    "ev_centred": Score("reconstruction", "explained variance", digits=4),
    "ce_score": Score("reconstruction", "CE score", ": 1 is the model as it is, 0 zeros in place"),
    "dead_latents": Score("reconstruction", "dead latents", " on the held-out text", digits=0),
    "dead_in_training": Score("reconstruction", "latents dead in training", ", not active in its last part", digits=0),
    "silent_but_masked": Score("reconstruction", "silent latents that fire at masked positions", digits=0),
    "silent_but_corrupted": Score("reconstruction", "silent latents that fire beside masked positions", digits=0),
    "silent_everywhere": Score("reconstruction", "silent latents that fire nowhere", digits=0),
    "dense_latents": Score("reconstruction", "dense latents", ", active on more than a tenth of it", digits=0),
    "mean_full": Score("absorption", "absorption, first letters", heading="absorption"),
    "mean_specific": Score(
        "absorption", "specific absorption, first letters", ": by a latent that fires on less than a tenth of the words"
    ),
    "main_f1": Score("absorption", "F1 of main latents, first letters"),
    "main_recall": Score("absorption", "recall of main latents, first letters"),
    "mean_fraction": Score("absorption", "absorption fraction, first letters"),
    "dense_absorbers": Score("absorption", "share of absorption credited to dense latents"),
    "context_full": Score("contexts", "absorption, contexts", ": what came before", heading="absorption by context"),
    "context_specific": Score("contexts", "specific absorption, contexts"),
    "context_main_f1": Score("contexts", "F1 of main latents, contexts"),
    "context_main_recall": Score("contexts", "recall of main latents, contexts"),
    "probing_raw_auc": Score("probing", "probing, raw activations", ", AUC"),
    "probing_auc_": Score("probing", "probing, {} latents", ", AUC", heading="probing, AUC"),
    "ood_raw_auc": Score("ood", "shifted texts, raw activations", ", AUC"),
    "ood_auc_": Score("ood", "shifted texts, {} latents", ", AUC"),
    "ood_gap_": Score("ood", "gap under a shift, {} latents", ", AUC", heading="gap under a shift, AUC"),
    "tpp_": Score("perturbation", "TPP, {} latents", " ablated"),
    "scr_": Score("perturbation", "SCR, {} latents", " ablated"),
}
"""By its key in the rows of a result; a key that ends in an underscore stands for one score for each number of
latents."""


REPLACED = {"random": "a random token", "gradient": "one chosen by gradient", "mask": "the mask token"}
"""What stands in the place of a token, by kind (`masksae.study.scores.robustness.KINDS`)."""

SCORES |= {
    f"robustness_{kind}_{reach}_{key}": Score("robustness", f"{what}, {where} {token}")
    for kind, token in REPLACED.items()
    for reach, where in {"near": "near", "far": "far from"}.items()
    for key, what in {
        "jaccard": "overlap of active latents",
        "top_jaccard": "overlap of the largest latents",
        "recon": "change of the reconstruction",
        "code": "change of the latents",
        "x": "change of the activation",
    }.items()
}


def known(key: str) -> bool:
    """Whether a key is of a score that has a name, or what the keys of such a score begin with.

    >>> known("mean_full"), known("probing_auc_"), known("probing_auc_16"), known("probing_auc_x"), known("mean_16")
    (True, True, True, False, False)
    """
    start, _, number = key.rpartition("_")
    return key in SCORES or (number.isdigit() and f"{start}_" in SCORES)


def score(key: str) -> Score:
    """The score of a key, whatever its number of latents."""
    return SCORES[key if key in SCORES else key[: key.rindex("_") + 1]]


def words(key: str) -> str:
    """The name of a key, or of what keys begin with.

    >>> words("mean_full"), words("probing_auc_16"), words("probing_auc_1"), words("tpp_")
    ('absorption, first letters', 'probing, 16 latents', 'probing, 1 latent', 'TPP, k latents')
    """
    number = key.rpartition("_")[2] or "k"
    return score(key).words.format(number).replace(" 1 latents", " 1 latent")


def heading(key: str) -> str:
    """The name of a key, or of what keys begin with, as a column.

    >>> heading("probing_auc_"), heading("ce_score")
    ('probing, AUC', 'CE score')
    """
    return SCORES[key].heading or SCORES[key].words


def measured(start: str, keys) -> list[str]:
    """Those of some keys that are `start`, or that begin so and end in a number of latents, fewest first.

    >>> measured("tpp_", ["sae", "tpp_20", "tpp_5", "tpp_intended_5"]), measured("l0", ["sae", "l0"])
    (['tpp_5', 'tpp_20'], ['l0'])
    """
    if not start.endswith("_"):
        return [start] if start in keys else []
    return sorted(
        (key for key in keys if key.startswith(start) and key[len(start) :].isdigit()),
        key=lambda key: int(key[len(start) :]),
    )
