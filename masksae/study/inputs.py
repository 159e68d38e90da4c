"""What the SAEs of a profile are made of and scored on: model, text, masks, activations; and where results and pictures
go.

Each part is made on first use and kept in the user's cache under an id that covers its configuration, the content of
the files that the profile names, and the code that makes it, so a notebook may be run alone, again, or after a crash.
"""

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from masksae import activations, cache, jobs, masking, provenance, tracing
from masksae.data import blocks, models, texts
from masksae.errors import DataError
from masksae.files import cache_dir, ensure_writable, read_json, repository, run_id, write_json
from masksae.parallel import once
from masksae.study.profile import Profile, load_profile
from masksae.study.sections import Arm, Model, Section, Text

WRITES = {
    "00_mechanism": ["mechanism"],
    "01_data": ["data"],
    "02_train": ["train"],
    "03_reconstruction": ["reconstruction"],
    "04_absorption": ["absorption", "contexts", "along", "along_effects", "controls", "noise"],
    "05_probing": ["probing"],
    "06_perturbation": ["perturbation"],
    "07_ood": ["ood", "robustness"],
    "09_paper": ["claims"],
}
"""Results of each notebook."""

KINDS = ("results", "figures", "build")
"""Folders of a project, in each one for every profile: small JSON, pictures, and what can be made again."""


class Inputs:
    """One profile's model, text and activations, and its folders `results`, `figures`, `build`.

    profile  shipped name, path of a YAML file, or a `Profile`
    out      one folder for all three; None: results/, figures/ and build/ of the project, each by the profile's name
    writes   make the folders; False: nothing is going to be written

    Raises ConfigError for a profile that cannot be used, OutputError for a folder that cannot be written.
    """

    def __init__(self, profile="smoke", out=None, *, writes: bool = True):
        given = isinstance(profile, Profile)
        self.profile, self.source = profile if given else load_profile(profile), profile.name if given else str(profile)
        self._shared: dict = {}
        folders = [repository() / kind / self.profile.name for kind in KINDS] if out is None else [Path(out)] * 3
        self.results, self.figures, self.build = map(ensure_writable, folders) if writes else folders

    def save_result(self, name: str, value) -> Path:
        """Write NAME.json into `results`."""
        return write_json(self.results / f"{name}.json", value)

    def result(self, name: str):
        """Read NAME.json from `results`. Raises DataError with the remedy if it is not there."""
        path = self.results / f"{name}.json"
        if not path.exists():
            notebook = next((notebook for notebook, names in WRITES.items() if name in names), "that writes it")
            raise DataError(f"{path} is missing. {self.remedy(notebook)}")
        return read_json(path)

    def remedy(self, notebook: str) -> str:
        """How to get what a notebook makes."""
        return (
            f"Run notebook {notebook} with profile {self.profile.name} first. From here, in a cell: "
            f"!python -m masksae run {notebook} {self.source}. Everything: `make repro PROFILE={self.source}`."
        )

    def identity(self, *sections: Section) -> list:
        """What some sections of the profile stand for: their values, and the content of the files that they name. A
        model and texts stand for their content alone, wherever they lie; tasks are named in the rows of their scores.
        """
        found = []
        for section in sections:
            values, known = (
                section.model_dump(mode="json"),
                {name: cache.contents([name]) for name in section.named_data},
            )
            if isinstance(section, Model | Text):
                values = _without_paths(values, {name.partition("#")[0] for name, content in known.items() if content})
            found.append([values, [content for each in known.values() for content in each]])
        return found

    def scratch(self, kind: str, key, make) -> dict[str, Tensor]:
        """Tensors of the model that `make()` gives, kept under an id of the model, of `key` and of the code that `make`
        reaches."""
        return cache.kept_tensors(kind, [self.identity(self.profile.model), key, provenance.code_id(make)], make)

    def shared(self, name: str, make: Callable):
        """What `make()` gives, such as tasks with their probes: made once for all SAEs that are scored on these
        inputs."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    @once
    def device(self) -> str:
        """Where models run: `$MASKSAE_DEVICE`, else a GPU if there is one."""
        return jobs.chosen_device()

    @once
    def language_model(self):
        """The model with its tokenizer; it has the block that the profile names, and positions for its
        blocks of text."""
        loaded = models.load_model(self.profile.model.source, device=self.device, dtype=self.profile.model.dtype)
        tracing.hook_point(loaded.model, self.profile.model.block)
        tracing.check_length(loaded.model, self.profile.text.block_length)
        return loaded

    @once
    def width(self) -> int:
        """Of the activations at the hook point."""
        return tracing.hook_width(self.language_model.model, self.profile.model.block)

    @once
    def bos_id(self) -> int | None:
        """Id of the token that starts every block, or None."""
        text, tokenizer = self.profile.model.bos_token, self.language_model.tokenizer
        if text is None and tokenizer.bos_token is not None:
            print(
                f"masksae: the tokenizer has a BOS token, {tokenizer.bos_token}, and the profile names none in "
                "model.bos_token. The first position of a block is often an attention sink of many times the usual "
                "norm; without a BOS it is a word, and it is trained on.",
                file=sys.stderr,
                flush=True,
            )
        return None if text is None else models.token_id(tokenizer, text)

    @property
    def start(self) -> list[int]:
        """Ids that every block starts with, [BOS] or []; their own activations are never used."""
        return [] if self.bos_id is None else [self.bos_id]

    @once
    def blocks(self) -> dict:
        """`datasets.Dataset`s of token blocks: train, held_out, and contexts, which is more held-out text."""
        text, contexts = self.profile.text, self.profile.contexts.tokens
        streamed = any(source.startswith("hub:") for source in text.sources)
        code = provenance.code_id("data.blocks", "data.texts", "data.models")
        key = run_id([self.identity(self.profile.model, text), contexts, code])
        return blocks.build(
            texts.TextStream(text.sources) if streamed else chain.from_iterable(map(texts.documents, text.sources)),
            self.language_model.tokenizer,
            cache_dir("blocks", key),
            tokens={"train": text.train_tokens, "held_out": text.held_out_tokens, "contexts": contexts},
            block_length=text.block_length,
            bos_id=self.bos_id,
            held_out_share=text.held_out_share,
            seed=text.seed,
            ordered=not streamed,
        )

    def ids(self, split: str, part: slice = slice(None)) -> Tensor:
        """Token blocks int64 [n, block_length]."""
        return blocks.Blocks(self.blocks[split])[part]

    def replacement(self, arm: Arm) -> dict:
        """What stands at an arm's masked positions, as keywords of `mask_tokens`."""
        if arm.token not in ("rare", "random"):
            return {
                "token_id": models.token_id(self.language_model.tokenizer, arm.token or self.profile.model.mask_token)
            }
        text = self.ids("train")[:, len(self.start) :].flatten()
        if arm.token == "random":
            return {"token_id": 0, "replacements": text}
        tokens, counts = text.unique(return_counts=True)
        return {"token_id": tokens[counts.argmin()].item()}

    def corrupt(self, arm: Arm, ids: Tensor, pair: int = 0) -> tuple[Tensor, Tensor]:
        """Blocks as an arm's model sees them in one of its pairs, and where they are masked."""
        return masking.mask_tokens(ids, p=arm.p, seed=arm.mask_seed(pair), spare=self.start, **self.replacement(arm))

    def activations(self, ids: Tensor, label: str | None = None) -> Tensor:
        """Residual stream [tokens, d] at the hook point, BOS left out."""
        x = tracing.activations(self.language_model.model, ids, block=self.profile.model.block, label=label)
        return x[:, len(self.start) :].reshape(-1, x.shape[-1])

    def stream(self, arm: Arm, pair: int = 0):
        """Training activations of an arm with the masks of one of its pairs."""
        training = self.profile.training
        scratch = self.stream_folder(arm, pair) if training.epochs > 1 and not arm.fresh_masks else None
        stream = activations.from_model(
            self.language_model,
            blocks.Blocks(self.blocks["train"]),
            block=self.profile.model.block,
            p=arm.p,
            mask_seed=arm.mask_seed(pair),
            fresh_masks=arm.fresh_masks,
            noise=arm.noise,
            bos_id=self.bos_id,
            batch_size=training.batch_size,
            seed=self.profile.text.seed,
            pool_tokens=training.pool_tokens,
            scratch=scratch,
            share=arm.tokens,
            sinks=self.profile.model.sinks,
            **self.replacement(arm),
        )
        return stream.with_targets(self.stream(Arm(name="clean", p=0, tokens=arm.tokens))) if arm.denoise else stream

    def stream_recipe(self, arm: Arm, pair: int = 0) -> list:
        """All that the model's activations on an arm's text are made of, but the code: those of an arm without masks
        are the same in all pairs, and noise is added when they are read."""
        profile = self.profile
        made_of = [self.identity(profile.model, profile.text), profile.contexts.tokens, profile.training.pool_tokens]
        return [made_of, arm.masks(pair)]

    def stream_folder(self, arm: Arm, pair: int = 0) -> Path:
        """Where they are kept."""
        return cache_dir("activations", run_id([self.stream_recipe(arm, pair), provenance.code_id("study.inputs")]))

    @once
    def held_out(self) -> Tensor:
        """Clean held-out activations [tokens, d] but for sinks (`model.sinks`): every score of every arm is taken on
        these."""
        x = self.held_out_all
        return x[~self.is_sink(x)] if self.profile.model.sinks else x

    def is_sink(self, x: Tensor) -> Tensor:
        """bool [n, ...]: which of x [n, ..., d] are sinks, by the norms of the held-out text; none where the profile
        leaves none out."""
        if not self.profile.model.sinks:
            return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        return activations.row_norms(x) > self._most_norm

    @once
    def _most_norm(self) -> float:
        return self.profile.model.sinks * activations.row_norms(self.held_out_all).median().item()

    @once
    def held_out_all(self) -> Tensor:
        """Clean held-out activations [tokens, d], in the order of the text."""
        key = [self.identity(self.profile.text), self.profile.contexts.tokens]
        return self.scratch("held_out", key, self._held_out)["x"]

    def _held_out(self) -> dict[str, Tensor]:
        return {"x": self.activations(self.ids("held_out"), label="held-out activations")}


def _without_paths(value, paths: set[str]):
    """JSON without some paths, as whole strings or before a "#"."""
    if isinstance(value, dict):
        return {key: _without_paths(each, paths) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each, paths) for each in value]
    if isinstance(value, str) and value.partition("#")[0] in paths and not value.startswith("hub:"):
        return value.partition("#")[2]
    return value
