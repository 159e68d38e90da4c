"""The steps of the pipeline as the notebooks call them: `run = Run("laptop")`, then `run.saes`, `run.held_out`, ...

Each step is made on first use and kept in scratch under an id that covers its configuration and the code that makes it, so a
notebook may be run alone, again, or after a crash: what is finished is read back, what is missing is made.
"""

import os
import shutil
import sys
from itertools import chain
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from masksae import jobs, logs
from masksae.code_ids import SOURCE_CODE, STREAM_CODE, TRAINING_CODE, code_id
from masksae.errors import DataError
from masksae.files import (
    atomic_dir,
    cache_dir,
    ensure_writable,
    run_id,
)
from masksae.parallel import once
from masksae.profile import Arm, Grid
from masksae.saes.config import SAEConfig
from masksae.saes.sae import SAE
from masksae.store import Store


class Run(Store):
    """One profile at work: model, text, arms, and the groups of SAEs trained on them."""

    @once
    def device(self) -> str:
        """Where models run: `$MASKSAE_DEVICE`, else a GPU if there is one."""
        import torch

        return os.environ.get("MASKSAE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")

    @once
    def language_model(self):
        """The model with its tokenizer; it has the block that the profile names."""
        from masksae.models import load_model
        from masksae.tracing import hook_point

        loaded = load_model(self.profile.model.source, device=self.device, dtype=self.profile.model.dtype)
        hook_point(loaded.model, self.profile.model.block)
        return loaded

    def replacement(self, arm: Arm) -> dict:
        """What stands at an arm's masked positions, as keywords of `mask_tokens`."""
        from masksae.models import token_id

        if arm.token not in ("rare", "random"):
            return {"token_id": token_id(self.language_model.tokenizer, arm.token or self.profile.model.mask_token)}
        text = self.ids("train")[:, 0 if self.bos_id is None else 1 :].flatten()
        if arm.token == "random":
            return {"token_id": 0, "replacements": text}
        found, counts = text.unique(return_counts=True)
        return {"token_id": found[counts.argmin()].item()}

    @once
    def bos_id(self) -> int | None:
        """Id of the token that starts every block, or None."""
        from masksae.models import token_id

        text, tokenizer = self.profile.model.bos_token, self.language_model.tokenizer
        if text is None and tokenizer.bos_token is not None:
            print(
                f"masksae: the tokenizer has a BOS token, {tokenizer.bos_token}, and the profile names none in model.bos_token. The first position of a block is "
                "often an attention sink of many times the usual norm; without a BOS it is a word, and it is trained on.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        return None if text is None else token_id(tokenizer, text)

    @once
    def blocks(self) -> dict:
        """`datasets.Dataset`s of token blocks: train, held_out, and contexts, which is more held-out text."""
        from masksae import corpus, sources

        text, model, contexts = self.profile.text, self.profile.model, self.profile.contexts.tokens
        streamed = any(source.startswith("hub:") for source in text.sources)
        code = code_id("corpus", *SOURCE_CODE)
        key = run_id([model.source, model.bos_token, text.model_dump(), contexts, code])
        return corpus.build(
            sources.TextStream(text.sources) if streamed else chain.from_iterable(map(sources.documents, text.sources)),
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
        from masksae.corpus import Blocks

        return Blocks(self.blocks[split])[part]

    def corrupt(self, arm: Arm, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks as an arm's model sees them, and where they are masked."""
        from masksae.masking import mask_tokens

        spare = () if self.bos_id is None else (self.bos_id,)
        return mask_tokens(ids, p=arm.p, seed=arm.seed, spare=spare, **self.replacement(arm))

    def activations(self, ids: Tensor, label: str | None = None) -> Tensor:
        """Residual stream [tokens, d] at the hook point, BOS left out."""
        from masksae.tracing import activations

        first = 0 if self.bos_id is None else 1
        x = activations(self.language_model.model, ids, block=self.profile.model.block, label=label)[:, first:]
        return x.reshape(-1, x.shape[-1])

    def stream(self, arm: Arm):
        """Training activations of an arm."""
        from masksae.activations import from_model
        from masksae.corpus import Blocks

        training = self.profile.training
        scratch = cache_dir("activations", self.id_of("stream", arm)) if training.epochs > 1 else None
        stream = from_model(
            self.language_model, Blocks(self.blocks["train"]), block=self.profile.model.block, p=arm.p, mask_seed=arm.seed, bos_id=self.bos_id,
            batch_size=training.batch_size, seed=self.profile.text.seed, pool_tokens=training.pool_tokens, scratch=scratch,
            share=arm.tokens, **self.replacement(arm),
        )  # fmt: skip
        return stream.with_targets(self.stream(Arm(name="clean", p=0, tokens=arm.tokens))) if arm.denoise else stream

    @once
    def saes(self) -> dict[str, SAE]:
        """Trained SAEs by name, such as "masked-matryoshka20-s0", ablations too; trains the groups that are not finished."""
        missing = [arm for arm in self.arms if not (self._folder(arm) / "saes").exists()]
        if missing and jobs.executor()[0] != "inline":
            self.blocks  # made once, before several jobs want them
            jobs.run_jobs([jobs.Job(arm.name, "masksae.stages:train_arm", (self.source, arm.name)) for arm in missing])
        trained = {}
        for arm in self.arms:
            trained |= self._group(arm)
        return trained

    @property
    def finished(self) -> bool:
        """Whether every group is trained."""
        return all((self._folder(arm) / "saes").exists() for arm in self.arms)

    @property
    def kept_bytes(self) -> int:
        """What the run has in the user's cache already."""
        folders = [self._folder(arm) for arm in self.arms]
        folders += [cache_dir("activations", self.id_of("stream", arm)) for arm in self.arms]
        files = (file for folder in {*folders} if folder.exists() for file in folder.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files)

    @property
    def arms(self) -> list[Arm]:
        """The arms and the ablations."""
        return [*self.profile.arms, *self.profile.ablations]

    def members(self, arm: Arm) -> list[tuple[str, Grid, int]]:
        """(name, grid, seed) of every SAE of an arm or of an ablation."""
        return [(f"{arm.name}-{grid.name}-s{seed}", grid, seed) for grid, seed in self.profile.members(arm)]

    @property
    def table(self) -> list[dict]:
        """One row per SAE of the arms: what it is, without scores."""
        return self.rows_of(self.profile.arms)

    def rows_of(self, arms: list[Arm]) -> list[dict]:
        """One row per SAE of some arms or ablations."""
        return [
            {"sae": name, "arm": arm.name, "p": arm.p, "grid": grid.name, "k": grid.selection.config.goal, "seed": seed}
            | {"architecture": grid.architecture}
            for arm in arms
            for name, grid, seed in self.members(arm)
        ]

    def latents_of(self, row: dict) -> int:
        """Size of the dictionary of a row's SAE."""
        return next(grid.n_latents for grid in self.profile.grids if grid.name == row["grid"])

    def id_of(self, kind: str, arm: Arm) -> str:
        """Id of an arm's activation stream, or of the group of SAEs trained on it."""
        profile = self.profile
        masks = [arm.p, arm.seed, arm.token] if arm.p else []
        stream = [profile.model.model_dump(), profile.text.model_dump(), masks, profile.training.pool_tokens]
        if kind == "stream":
            return run_id([stream, code_id(*SOURCE_CODE, *STREAM_CODE)])
        saes = [(grid.model_dump(mode="json"), seed) for _, grid, seed in self.members(arm)]
        return run_id(
            [stream, arm.tokens, arm.drop_masked, arm.denoise, profile.training.model_dump(), saes]
            + [code_id(*SOURCE_CODE, *TRAINING_CODE)]
        )

    def _folder(self, arm: Arm) -> Path:
        """Where an arm's SAEs, checkpoint and snapshots are kept."""
        return cache_dir("groups", self.id_of("group", arm), arm.name)

    def _group(self, arm: Arm) -> dict[str, SAE]:
        """All SAEs of one arm: read back if finished, else trained (or trained on from the last checkpoint)."""
        members, kept, shown = self.members(arm), self._folder(arm), self.build / "saes" / arm.name
        ensure_writable(kept)
        with FileLock(kept / ".lock"):  # a second run of the same group waits, and finds it done
            if not (kept / "saes").exists():
                drop = arm.drop_masked or arm.denoise
                saes = self._train(arm, [grid.config(self.width, seed, drop) for _, grid, seed in members], kept)
                with atomic_dir(kept / "saes") as tmp:
                    for (name, _, _), sae in zip(members, saes):
                        sae.save(tmp / name)
                shutil.rmtree(kept / "checkpoint", ignore_errors=True)
        with atomic_dir(shown) as tmp:
            shutil.copytree(kept / "saes", tmp, dirs_exist_ok=True)
        return {name: SAE.load(kept / "saes" / name, device=self.device) for name, _, _ in members}

    @once
    def width(self) -> int:
        """Of the activations at the hook point."""
        from masksae.tracing import hook_width

        return hook_width(self.language_model.model, self.profile.model.block)

    def _train(self, arm: Arm, configs: list[SAEConfig], folder: Path) -> list[SAE]:
        from masksae.training import train

        training, stream = self.profile.training, self.stream(arm)
        config = training.config(training.epochs * stream.batches_per_epoch)
        done = f"arm {arm.name}: {len(configs)} SAEs, {config.steps} steps of {training.batch_size} tokens"
        print(done, file=sys.stderr, flush=True)
        log = logs.chosen(folder, [name for name, _, _ in self.members(arm)])
        return train(configs, stream, config, checkpoint_dir=folder, device=self.device, log=log)

    def snapshots(self, arm: Arm) -> dict[int, dict[str, SAE]]:
        """SAEs of the first grid by step and name, the finished ones too; an arm whose scratch was deleted is trained again."""
        from masksae.training import load_snapshots

        finished, first = self.load_saes([arm]), self.profile.grids[0].name
        last = next(iter(finished.values())).history[-1]["step"] + 1
        folder = self._folder(arm)
        kept = load_snapshots(folder, device=self.device) if folder.exists() else {}
        if sorted(kept) != sorted(n for n in self.profile.training.snapshots if n < last):
            shutil.rmtree(self._folder(arm), ignore_errors=True)
            self._group(arm)
            kept = load_snapshots(self._folder(arm), device=self.device)
        steps = kept | {last: finished.values()}
        return {
            step: {name: sae for (name, grid, _), sae in zip(self.members(arm), saes) if grid.name == first}
            for step, saes in steps.items()
        }

    def load_saes(self, arms: list[Arm] | None = None) -> dict[str, SAE]:
        """The SAEs that 02_train left in build/, of the profile's arms or of those given. Raises DataError with the remedy if they are not
        there."""
        folder, found = self.build / "saes", {}
        for row in self.table if arms is None else self.rows_of(arms):
            path = folder / row["arm"] / row["sae"]
            if not path.exists():
                raise DataError(
                    f"{path} is missing. Run notebook 02_train with profile {self.profile.name} first, or `run.saes` here: it trains what is missing."
                )
            found[row["sae"]] = SAE.load(path, device=self.device)
        return found

    def rows(self, kind: str, section, code: tuple[str, ...], make) -> list[dict]:
        """Score rows that `make()` gives, kept in scratch under an id of the SAEs, a section of the profile and the code in `code`."""
        groups = [self.id_of("group", arm) for arm in self.profile.arms]
        return self.kept(kind, [self.table, groups, section.model_dump(), code_id(*code)], make)

    @once
    def held_out(self) -> Tensor:
        """Clean held-out activations [tokens, d]: every score of every arm is taken on these."""
        key = self.profile.text.model_dump()
        make = lambda: {"x": self.activations(self.ids("held_out"), label="held-out activations")}
        return self.scratch("held_out", key, (*SOURCE_CODE, "corpus", "tracing"), make)["x"]


def train_arm(profile: str, arm: str) -> None:
    """Train the group of one arm or ablation of a profile, or go on with it: a job of `masksae.jobs`."""
    run = Run(profile)
    run._group(next(item for item in run.arms if item.name == arm))
