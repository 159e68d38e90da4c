"""Scores of a run as SAEBench result files, one per SAE and evaluation, so that tools which read those can read ours.

The keys are those of SAEBench 0.6.0's schemas (a test validates against the schemas that it ships). What a run did not
measure is -1, SAEBench's own mark for it; k and n that its schemas do not know are in `eval_result_unstructured`. The
shifted sets have no evaluation there and come as type "masksae_ood". Data and model differ from SAEBench's, so compare
numbers between such files of ours only. Ids and times are fixed, so that the same scores give the same bytes.
"""

import statistics
import uuid
from pathlib import Path

from masksae.files import ANYTHING, atomic_dir, write_json
from masksae.study.run import Run
from masksae.study.store import Subject

NOT_MEASURED = -1.0
KNOWN_KS = (1, 2, 5, 10, 20, 50, 100)
KNOWN_NS = (2, 5, 10, 20, 50, 100, 500)
PRECISION = "float32"


def core(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """(eval_result_metrics, eval_result_details, eval_config) of the type "core"."""
    n_latents = run.latents_of(row)
    metrics = {
        "model_behavior_preservation": {
            "kl_div_score": row["kl_score"], "kl_div_with_ablation": row["kl_zero"], "kl_div_with_sae": row["kl_sae"],
        },
        "model_performance_preservation": {
            "ce_loss_score": row["ce_score"], "ce_loss_with_ablation": row["ce_zero"],
            "ce_loss_with_sae": row["ce_sae"], "ce_loss_without_sae": row["ce_original"],
        },
        "reconstruction_quality": {
            "explained_variance": row["ev_saebench"], "explained_variance_legacy": row["ev_per_token"],
            "mse": NOT_MEASURED, "cossim": row["cosine"],  # its mse depends on the batch size
        },
        "shrinkage": {
            "l2_norm_in": NOT_MEASURED, "l2_norm_out": NOT_MEASURED, "l2_ratio": row["l2_ratio"],
            "relative_reconstruction_bias": row["relative_bias"],
        },
        "sparsity": {"l0": row["l0"], "l1": row["l1"]},
        "token_stats": {
            "total_tokens_eval_reconstruction": run.profile.evaluation.ce_tokens,
            "total_tokens_eval_sparsity_variance": row["tokens"],
        },
        "misc_metrics": {
            "freq_over_1_percent": NOT_MEASURED, "freq_over_10_percent": row["dense_latents"] / n_latents,
            "normalized_freq_over_1_percent": NOT_MEASURED, "normalized_freq_over_10_percent": NOT_MEASURED,
            "average_max_encoder_cosine_sim": row["encoder_cosine"],
            "average_max_decoder_cosine_sim": row["decoder_cosine"],
            "frac_alive": 1 - row["dead_latents"] / n_latents,
        },
    }  # fmt: skip
    text = run.profile.text
    config = {
        "dataset": ", ".join(text.sources),
        "context_size": text.block_length,
        "exclude_special_tokens_from_reconstruction": True,
    }
    return metrics, [], config | {"compute_kl": True, "compute_ce_loss": True}


def absorption(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """The same of the type "absorption_first_letter"."""
    letters = row["letters"]
    metrics = {
        "mean_absorption_fraction_score": row["mean_fraction"],
        "mean_full_absorption_score": row["mean_full"],
        "mean_num_split_features": row["mean_split_latents"],
        "std_dev_absorption_fraction_score": _spread([r["fraction"] for r in letters]),
        "std_dev_full_absorption_score": _spread([r["full"] for r in letters]),
        "std_dev_num_split_features": _spread([float(len(r["main"])) for r in letters]),
    }
    details = [
        {
            "first_letter": r["letter"], "mean_absorption_fraction": r["fraction"], "full_absorption_rate": r["full"],
            "num_full_absorption": round(r["full"] * r["words"]), "num_probe_true_positives": r["words"],
            "num_split_features": len(r["main"]),
        }
        for r in letters
    ]  # fmt: skip
    task = run.profile.absorption
    return {"mean": metrics}, details, {"random_seed": task.seed, "min_feats_for_eval": task.min_letters}


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def sparse_probing(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """The same of the type "sparse_probing": texts averaged over tokens."""

    def columns(raw: dict, accuracy: dict) -> tuple[dict, dict]:
        llm = {"llm_test_accuracy": raw["all"]} | {
            f"llm_top_{k}_test_accuracy": v for k, v in raw.items() if k != "all"
        }
        known = {k: v for k, v in accuracy.items() if k != "all" and int(k) in KNOWN_KS}
        return llm, {"sae_test_accuracy": accuracy["all"]} | {f"sae_top_{k}_test_accuracy": v for k, v in known.items()}

    tables = [(g["group"], *columns(g["raw"], g["accuracy"])) for g in row["groups"]]
    metrics = {"llm": _mean([llm for _, llm, _ in tables]), "sae": _mean([sae for _, _, sae in tables])}
    details = [{"dataset_name": name, **llm, **sae} for name, llm, sae in tables]
    return metrics, details, _perturbation_config(run) | {"k_values": run.profile.perturbation.ks}


def _mean(tables: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(table[key] for table in tables) for key in tables[0]}


def tpp(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """The same of the type "tpp"."""
    names = {"total": "total_metric", "intended": "intended_diff_only", "unintended": "unintended_diff_only"}
    metrics, details = {}, [{"dataset_name": group["group"]} for group in row["groups"]]
    for n in _known_ns(run):
        for kind, name in names.items():
            column = f"tpp_threshold_{n}_{name}"
            metrics[column] = row[f"tpp_{n}" if kind == "total" else f"tpp_{kind}_{n}"]
            for detail, group in zip(details, row["groups"]):
                detail[column] = group[kind][str(n)]
    config = _perturbation_config(run) | {"perform_scr": False, "n_values": _known_ns(run)}
    return {"tpp_metrics": metrics}, details, config


def scr(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """The same of the type "scr"; pairs without room are left out."""
    names = {"scr": "metric", "direction_1": "dir1", "direction_2": "dir2"}
    used = [pair for pair in row["pairs"] if pair["scr"]]
    metrics, details = {}, [{"dataset_name": pair["pair"]} for pair in used]
    for n in _known_ns(run):
        for kind, name in names.items():
            column = f"scr_{name}_threshold_{n}"
            metrics[column] = row.get(f"scr_{n}" if kind == "scr" else f"scr_{kind}_{n}")
            for detail, pair in zip(details, used):
                detail[column] = pair[kind][str(n)]
    return {"scr_metrics": metrics}, details, _perturbation_config(run) | {"n_values": _known_ns(run)}


def sae_probes(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """The same of the type "sparse_probing_sae_probes": AUC on last tokens; the tables by task are in
    `eval_result_unstructured`."""
    options = run.profile.probing
    sae = {f"sae_top_{k}_test_auc": row[f"probing_auc_{k}"] for k in options.ks if k in KNOWN_KS}
    metrics = {"llm": {"llm_test_auc": row["probing_raw_auc"]}, "sae": sae}
    config = {"dataset_names": options.tasks, "ks": options.ks, "reg_type": "l2", "random_seed": options.seed}
    return metrics, [], config


def ood(run: Subject, row: dict) -> tuple[dict, list[dict], dict]:
    """The same of our own type "masksae_ood"."""
    columns = {key: value for key, value in row.items() if key.startswith(("ood_", "domain_", "invariance_"))}
    options = run.profile.probing
    config = {"dataset_names": options.shifted, "ks": options.shifted_ks, "random_seed": options.seed}
    return {"ood": columns}, row["tasks"], config


EVALUATIONS = {
    "core": ("reconstruction", core),
    "absorption_first_letter": ("absorption", absorption),
    "sparse_probing": ("perturbation", sparse_probing),
    "tpp": ("perturbation", tpp),
    "scr": ("perturbation", scr),
    "sparse_probing_sae_probes": ("probing", sae_probes),
    "masksae_ood": ("ood", ood),
}
"""Type of evaluation: the run's result it comes from, and its form."""


def result(run: Subject, kind: str, row: dict) -> dict:
    """One SAEBench result."""
    metrics, details, config = EVALUATIONS[kind][1](run, row)
    model, name = run.profile.model, f"{row['sae']}-{row['mode']}"
    precision = {} if kind.endswith("sae_probes") else {"llm_dtype": PRECISION}
    return {
        "eval_type_id": kind,
        "eval_config": {"model_name": model.source, **precision, **config},
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"masksae/{run.profile.name}/{kind}/{name}")),
        "datetime_epoch_millis": 0,
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": "not run by SAEBench but by masksae",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": name,
        "sae_lens_version": None,
        "sae_cfg_dict": {
            "architecture": row["architecture"],
            "model_name": model.source,
            "hook_name": model.hook_name,
            "hook_layer": model.layer,
        },
        "eval_result_unstructured": row,
    }


def write_results(run: Run) -> Path:
    """Write build/<profile>/saebench/TYPE/NAME_custom_sae_eval_results.json for every SAE of the run, as trained and at
    matched L0."""
    rows = {name: run.result(name) for name in {source for source, _ in EVALUATIONS.values()}}
    folder = run.build / "saebench"
    with atomic_dir(folder, ANYTHING) as tmp:
        write_scores(run, rows, tmp)
    return folder


def write_scores(run: Subject, scores: dict[str, list[dict]], folder: Path) -> list[Path]:
    """Write TYPE/NAME_custom_sae_eval_results.json below a folder for each row of the scores that are there: result ->
    rows."""
    return [
        write_json(folder / kind / f"{row['sae']}-{row['mode']}_custom_sae_eval_results.json", result(run, kind, row))
        for kind, (source, _) in EVALUATIONS.items()
        for row in scores.get(source, ())
        if "failed" not in row
    ]


def _known_ns(run: Subject) -> list[int]:
    return [n for n in run.profile.perturbation.ns if n in KNOWN_NS]


def _perturbation_config(run: Subject) -> dict:
    options = run.profile.perturbation
    return {"dataset_names": list(options.groups), "context_length": options.max_tokens, "random_seed": options.seed}
