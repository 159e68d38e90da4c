"""Reference checks: what was published about unmasked SAEs of the paper's models, beside what this code finds; `masksae
verify paper`.

Three kinds. The released SAEs of SAEBench's suite, scored by our metrics: they test the metrics, and should agree
closely. Our own unmasked SAEs: they test the trainer, and agree loosely, since the released ones were trained with an
auxiliary loss that hardly worked. And raw activations under shift, which need no SAE at all. What cannot be checked is
listed with the reason.

Published numbers: SAEBench's result set of 8 January 2025 as re-run with its version 0.6.0
(github.com/meowmaryexe/SAEBench-Reliability), and the result tables of Kantamneni et al. 2025 (arXiv 2502.16681).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from masksae.errors import MasksaeError, SourceError
from masksae.files import cache_dir, read_json, run_id
from masksae.metrics.reconstruction import ce_score, reconstruction
from masksae.study.report.tables import number, to_text
from masksae.study.run import Run


@dataclass(frozen=True)
class Suite:
    """What is known of a model's Matryoshka SAEs of 4,096 latents: k -> (CE score, L0 on text, mean full absorption or
    None)."""

    repository: str
    folder: str
    """What a folder's path holds if it is one of those SAEs."""
    scores: dict[int, tuple[float, float, float | None]]
    raw: dict[str, float]
    """Shifted set -> AUC of a probe of raw activations."""


SUITES = {
    "hub:EleutherAI/pythia-160m-deduped": Suite(
        "adamkarvonen/saebench_pythia-160m-deduped_width-2pow12_date-0108", "Matryoshka",
        {20: (0.9269, 18.8, 0.139), 40: (0.9525, 37.8, 0.084), 80: (0.9696, 75.8, 0.054), 160: (0.9839, 153.4, 0.026)},
        {},
    ),
    "hub:google/gemma-2-2b": Suite(
        "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108", "Matryoshka",
        {20: (0.9406, 19.8, None), 40: (0.9630, 40.1, None), 80: (0.9772, 80.1, None), 160: (0.9866, 160.7, None)},
        {
            "66_living-room_OOD": 0.840, "87_glue_cola_OOD": 0.720, "73_control-group_OOD": 0.775,
            "7_hist_fig_ispolitician_OOD": 0.641, "6_hist_fig_isamerican_OOD": 0.909, "67_social-security_OOD": 0.913,
            "5_hist_fig_ismale_OOD": 0.975,
        },
    ),
}  # fmt: skip
"""By model, at the paper's block. Of the eight shifted sets (mean .795 on Gemma) one, QNLI, cannot be used as it is
shipped."""

TEXT = "hub:Skylion007/openwebtext@refs/convert/parquet"
"""What the released SAEs were scored on."""

TOKENS = 3200 * 128
"""Of that text, as SAEBench takes them for the CE score."""


@dataclass(frozen=True)
class Check:
    """One published number."""

    name: str
    published: float
    tolerance: float
    found: float | None = None
    reason: str = ""
    """Why there is nothing to compare."""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not checked"
        return "agrees" if abs(self.found - self.published) <= self.tolerance else "differs"


def verify(run: Run) -> list[Check]:
    """All checks of a profile; none is left out, those that could not be made say why."""
    suite = SUITES.get(run.profile.model.source.partition("@")[0])
    if suite is None:
        return []
    return [*released_checks(run, suite), *own_checks(run, suite), *raw_checks(run, suite)]


def released_checks(run: Run, suite: Suite) -> list[Check]:
    """The released SAEs by our metrics: CE score within .003, L0 within 1 %, full absorption within .02."""
    found: dict[int, dict[str, float]] = {}
    reason = _reason(lambda: found.update(score_released(run, suite)))
    names = ("CE score", "L0", "full absorption")
    return [
        Check(
            f"released SAE, k {k}: {name}",
            value,
            tolerance,
            found.get(k, {}).get(name),
            reason or "the repository lacks it",
        )
        for k, published in suite.scores.items()
        for name, value, tolerance in zip(names, published, (0.003, 0.01 * published[1], 0.02))
        if value is not None
    ]


def own_checks(run: Run, suite: Suite) -> list[Check]:
    """Our unmasked Matryoshka SAEs as trained, mean over seeds: CE score within .01, full absorption within .03."""
    checks = []
    for result, score, at, tolerance in (("reconstruction", "ce_score", 0, 0.01), ("absorption", "mean_full", 2, 0.03)):
        rows: list[dict] = []
        reason = _reason(lambda result=result, rows=rows: rows.extend(run.result(result)))
        for k, published in suite.scores.items():
            if published[at] is None:
                continue
            wanted = {"p": 0.0, "k": k, "architecture": "Matryoshka BatchTopK", "mode": "as_trained"}
            values = [row[score] for row in rows if all(row[key] == value for key, value in wanted.items())]
            mean = sum(values) / len(values) if values else None
            checks.append(
                Check(f"own SAE, k {k}: {score}", published[at], tolerance, mean, reason or f"{result} has no such SAE")
            )
    return checks


def raw_checks(run: Run, suite: Suite) -> list[Check]:
    """Raw activations under shift: each set within two standard errors of an AUC on 300 rows (.056), the mean within
    .01."""
    rows: list[dict] = []
    reason = _reason(lambda: rows.extend(run.result("ood")))
    found = {task["task"]: task["raw_auc"] for task in rows[0]["tasks"]} if rows else {}
    checks = [
        Check(f"raw AUC, {name}", value, 0.056, found.get(name), reason or "not among probing.shifted")
        for name, value in suite.raw.items()
    ]
    if suite.raw:
        complete = all(name in found for name in suite.raw)
        here = fmean(found[name] for name in suite.raw) if complete else None
        reason = reason or "some sets are missing"
        checks.append(Check(f"raw AUC, mean of {len(suite.raw)}", fmean(suite.raw.values()), 0.01, here, reason))
    return checks


def _reason(act: Callable) -> str:
    """Why `act` could not be done, in one line; "" if it was."""
    try:
        act()
    except MasksaeError as error:
        return str(error).splitlines()[0]
    return ""


def score_released(run: Run, suite: Suite) -> dict[int, dict[str, float]]:
    """k -> scores of the released SAEs, by our metrics, on the text that SAEBench took."""
    from masksae.data import blocks, texts
    from masksae.export import load_dictionary_learning
    from masksae.metrics.absorption import first_letter
    from masksae.metrics.probes import letter_probe
    from masksae.study.scores import absorption
    from masksae.tracing import spliced_losses

    saes = {
        k: load_dictionary_learning(folder, device=run.device)
        for k, folder in _download(suite, run.profile.model.block).items()
    }
    key = run_id([TEXT, TOKENS, run.profile.model.source, run.profile.text.block_length])
    built = blocks.build(
        texts.TextStream([TEXT]), run.language_model.tokenizer, cache_dir("blocks", key), tokens={"train": TOKENS},
        block_length=run.profile.text.block_length, bos_id=run.bos_id, held_out_share=0.0, seed=0, ordered=False,
    )  # fmt: skip
    ids = blocks.Blocks(built["train"])[:]
    x = run.activations(ids, label="activations of the reference text")
    splices = {str(k): lambda y, sae=sae: sae.decode(sae.encode(y)) for k, sae in saes.items()}
    options = dict(block=run.profile.model.block, keep_first=run.bos_id is not None, label="CE with the released SAEs")
    losses = spliced_losses(run.language_model.model, ids, splices, **options)
    words, acts = absorption.word_activations(run)
    probe = letter_probe(acts, words, seed=run.profile.absorption.seed)
    letters = dict(probe=probe, min_letters=run.profile.absorption.min_letters)
    return {
        k: {
            "CE score": ce_score(losses["original"].ce, losses["zero"].ce, losses[str(k)].ce),
            "L0": reconstruction(sae, x).l0,
            "full absorption": first_letter(sae, acts, words, **letters).mean_full,
        }
        for k, sae in saes.items()
    }


def _download(suite: Suite, block: int) -> dict[int, Path]:
    """k -> folder of each of the suite's SAEs. Raises SourceError if the hub is out of reach."""
    from huggingface_hub import snapshot_download

    pattern = f"*{suite.folder}*resid_post_layer_{block}/*"
    try:
        root = Path(snapshot_download(suite.repository, allow_patterns=[pattern]))
    except Exception as error:  # of the hub's client and the network below it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{suite.repository} is out of reach ({reason}).") from error
    folders = [
        file.parent
        for file in sorted(root.rglob("ae.pt"))
        if suite.folder in str(file) and f"layer_{block}" in str(file)
    ]
    return {read_json(folder / "config.json")["trainer"]["k"]: folder for folder in folders}


def text(checks: list[Check], profile: str) -> str:
    """The checks as a table, and in a sentence what they come to."""
    if not checks:
        return f"Nothing was published about the model of {profile} that could be checked."
    rows = [["check", "published", "within", "here", "verdict"]]
    rows += [[c.name, number(c.published), number(c.tolerance), number(c.found), c.verdict] for c in checks]
    reasons = dict.fromkeys(check.reason for check in checks if check.found is None)
    count = {
        verdict: sum(check.verdict == verdict for check in checks) for verdict in ("agrees", "differs", "not checked")
    }
    end = f"{count['agrees']} agree, {count['differs']} differ, {count['not checked']} could not be checked."
    return "\n".join([to_text(rows), "", end, *(f"  Not checked: {reason}" for reason in reasons)])
