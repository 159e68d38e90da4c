"""Somebody's own SAE in a run's place: `sae = OwnSAE("laptop", "MY_SAE", out="report")`, then `evaluate(sae,
["absorption"])`.

The profile says whose activations the SAE reads and on which text and tasks it is scored; it is scored by the very
functions that score a run's SAEs, as trained and at matched clean L0. Nothing is trained here.
"""

import re
import sys
from pathlib import Path

from masksae import cache, provenance
from masksae.data.models import MODELS
from masksae.errors import ConfigError, MasksaeError, OutputError, nearest
from masksae.export import load_sae
from masksae.metrics.reconstruction import calibrated_threshold, reconstruction
from masksae.parallel import once
from masksae.study.inputs import Inputs
from masksae.study.scores.absorption import absorption_scores, context_scores
from masksae.study.scores.perturbation import concept_scores
from masksae.study.scores.probing import ood_scores, probing_scores
from masksae.study.scores.reconstruction import reconstruction_scores
from masksae.study.scores.robustness import robustness_scores
from masksae.study.store import Entry, Subject

SCORERS = {
    "reconstruction": reconstruction_scores,
    "absorption": absorption_scores,
    "contexts": context_scores,
    "probing": probing_scores,
    "ood": ood_scores,
    "perturbation": concept_scores,
    "robustness": robustness_scores,
}
METRICS = tuple(SCORERS)
"""What can be scored, in the order of the notebooks."""

SILENT = 0.05
"""Clean L0 below which an SAE hardly fires; it is scored as trained only, unless it has a k to be matched at."""


class OwnSAE(Subject):
    """A profile's inputs with one SAE from a folder, or from whatever `masksae.load_sae` takes.

    name    what it is called; None: the folder's name
    l0      matched clean L0; None: the SAE's own k or target, or else the L0 that it has
    out     where results go
    anyway  take an SAE whose file names another model or hook point than the profile

    Raises ConfigError for an SAE of another width, model or hook point and for an l0 that it cannot have,
    CheckpointError, OutputError; SourceError for what cannot be fetched.
    """

    def __init__(self, profile, folder, *, out, name: str | None = None, l0: float | None = None, anyway: bool = False):
        self.folder, self.sae, self._l0 = Path(folder), load_sae(folder), l0
        self.name = name or self.folder.resolve().name
        super().__init__(Inputs(profile, out), self.name, [])
        if self.sae.config.d_model != self.width:
            raise ConfigError(
                f"The SAE in {folder} reads width {self.sae.config.d_model}, {self.profile.model.source} has "
                f"{self.width}. Name the profile of its model."
            )
        if not anyway:
            self._check_origin()
        self._check_l0()
        self.sae.to(self.device)
        self.entries = [self._entry()]

    def _check_origin(self) -> None:
        """Raise ConfigError if the SAE's file names another model or hook point than the profile reads; what it does
        not name is taken on trust."""
        theirs, ours = self.sae.origin, self.profile.model
        model, hook = theirs.get("model_name", ""), theirs.get("hook_name", "")
        if (model and not same_model(model, ours.source)) or (hook and place(hook) != place(ours.hook_name)):
            raise ConfigError(
                f"{self.folder} was trained on {model or 'a model that it does not name'} at "
                f"{hook or 'a place that it does not name'}, and the profile {self.profile.name} reads {ours.source} "
                f"at {ours.hook_name}. Name the profile of its model and hook point, or score it all the same: "
                "--anyway, or anyway=True."
            )

    def _check_l0(self) -> None:
        l0, latents, rule = self._l0, self.sae.config.n_latents, self.sae.config.selection
        if l0 is not None and not 0 < l0 <= latents:
            raise ConfigError(
                f"l0 is {l0}, expected a number above 0, up to the {latents} latents of this SAE. Or leave it out."
            )
        if l0 is not None and rule.keeps_k_per_token and l0 != rule.goal:
            raise ConfigError(
                f"l0 is {l0}, and this SAE keeps its k = {rule.goal} latents of every token. Leave l0 out."
            )

    @once
    def l0(self) -> float:
        """Clean L0 as trained."""
        return reconstruction(self.sae, self.held_out).l0

    @once
    def k(self) -> float | None:
        """The clean L0 at which matched scores are taken; None for an SAE that hardly fires and states none."""
        return self._l0 or self.sae.config.selection.goal or (round(self.l0, 1) if self.l0 >= SILENT else None)

    def check_reach(self) -> None:
        """If no threshold gives clean L0 = k: ConfigError if that k was asked for, a line on stderr if it is the SAE's
        own. A line also if the SAE hardly fires."""
        if self.l0 < SILENT:
            matched = "matched scores are taken all the same" if self.k else "its scores are those as trained"
            print(
                f"masksae: {self.name} is silent: L0 {self.l0:.2g} on the clean text, and {matched}.",
                file=sys.stderr,
                flush=True,
            )
        if self.sae.config.selection.keeps_k_per_token or self.k is None:
            return
        threshold = calibrated_threshold(self.sae, self.held_out, self.k)
        reached = reconstruction(self.sae, self.held_out, threshold=threshold).l0
        if abs(reached / self.k - 1) > 0.01:
            told = f"no threshold of this SAE gives L0 {self.k:g} on the clean text; the nearest is {reached:.4g}"
            if self._l0 is not None:
                raise ConfigError(f"l0 is {self.k:g}, and {told}. Give another, or leave l0 out.")
            print(f"masksae: {told}, and matched scores are taken there.", file=sys.stderr, flush=True)

    def _entry(self) -> Entry:
        row = {"sae": self.name, "arm": self.name, "p": 0.0, "grid": self.name, "k": self.k, "seed": 0}
        weights = cache.fingerprint(value for _, value in sorted(self.sae.state_dict().items()))
        recipe = [self.identity(self.profile.model, self.profile.text), self.sae.config.to_dict(), weights, self.k]
        rules = type(self.sae.config.selection), *map(type, self.sae.config.penalties)
        row |= {"architecture": self.sae.config.architecture}
        return Entry(row, recipe, lambda: self.sae, provenance.made_by(*rules))

    def latents_of(self, row: dict) -> int:
        return self.sae.config.n_latents


def same_model(name: str, source: str) -> bool:
    """Whether a model's name in an SAE's file can be that of a profile's `model.source`: owners, revisions, case and
    punctuation aside.

    >>> same_model("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"), same_model("gpt2-small", "hub:openai-community/gpt2")
    (True, True)
    >>> same_model("pythia-70m", "hub:EleutherAI/pythia-70m-deduped")
    False
    """
    ours = [source, *([MODELS[source].note.split(",")[0]] if source in MODELS else [])]
    theirs = _plain(name)
    return any(_plain(each) == theirs or (each.endswith(".gguf") and _plain(each).startswith(theirs)) for each in ours)


def _plain(name: str) -> str:
    """A model's name, or that of its folder, in letters and digits; "-pt" is the pretrained one, "-small" GPT-2's."""
    last = name.partition("@")[0].rstrip("/").rpartition("/")[2].lower().removeprefix("hub:").removesuffix("-pt")
    return re.sub("[^a-z0-9]", "", "gpt2" if last == "gpt2-small" else last)


def place(hook: str) -> tuple[int, str] | str:
    """(block, what is read there: "" for the residual stream after it) of a hook point, by TransformerLens' name or by
    a module's path; the name itself where it has no block.

    >>> place("blocks.4.hook_resid_post") == place("model.layers.4") == place("blocks.5.hook_resid_pre") == (4, "")
    True
    >>> place("blocks.4.hook_mlp_out"), place("gpt_neox.layers.4.mlp"), place("blocks.4.attn.hook_z")
    ((4, 'mlp'), (4, 'mlp'), (4, 'attn.hook_z'))
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", hook)
    if not found:
        return hook
    block, rest = int(found[1]), hook[found.end() :].removesuffix("output").rstrip(".")
    if rest == "hook_resid_pre":
        return block - 1, ""
    same = {"hook_resid_post": "", "hook_mlp_out": "mlp", "self_attn": "attn", "attention": "attn"}
    return block, (same | {"hook_attn_out": "attn"}).get(rest, rest)


def evaluate(own: OwnSAE, metrics: list[str]) -> dict[str, list[dict]]:
    """Rows of each metric, as trained and at matched clean L0, each written to `NAME.json` in the SAE's `results` as it
    comes.

    A metric that cannot be taken has one row, {"sae": name, "failed": why}, and the others are taken all the same.
    Raises ConfigError for an unknown metric, and the first reason if no metric can be taken.
    """
    for metric in metrics:
        if metric not in SCORERS:
            raise ConfigError(f"There is no metric {metric!r}.{nearest(metric, METRICS)}")
    own.check_reach()
    scores, errors = {}, []
    for metric in (each for each in METRICS if each in metrics):
        try:
            scores[metric] = SCORERS[metric](own)
        except OutputError:
            raise
        except MasksaeError as error:
            errors.append(error)
            scores[metric] = [{"sae": own.name, "failed": str(error)}]
            print(f"masksae: {metric} cannot be taken: {error}", file=sys.stderr, flush=True)
        own.save_result(metric, scores[metric])
    if len(errors) == len(scores):
        raise errors[0]
    return scores


def failed(scores: dict[str, list[dict]]) -> dict[str, str]:
    """Why, for each metric of `evaluate` that could not be taken.

    >>> failed({"reconstruction": [{"sae": "a", "l0": 3}], "absorption": [{"sae": "a", "failed": "too few letters"}]})
    {'absorption': 'too few letters'}
    """
    return {metric: rows[0]["failed"] for metric, rows in scores.items() if rows and "failed" in rows[0]}
