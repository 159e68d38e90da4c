"""The SAEs of a profile as the notebooks call them: `run = Run("laptop")`, then `run.saes`.

A pair is one draw of everything that is drawn: the SAE of each arm with the same seed has the same initial weights and
the same order of the tokens, and the masks of the masked arms are drawn from that seed too. Two pairs share nothing but
the text. So the SAEs of an arm without masks are trained together on one activation stream, those of a masked arm pair
by pair. Each such group is kept under an id of all that it is made of; what is finished is read back, what is missing
is trained.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from masksae import cache, jobs
from masksae.errors import DataError
from masksae.files import ANYTHING, atomic_dir, cache_dir, ensure_writable, read_json, run_id, write_json
from masksae.parallel import once
from masksae.saes.sae import SAE
from masksae.study.inputs import Scored
from masksae.study.profile import Arm, Grid
from masksae.study.sections import Section
from masksae.training import logs
from masksae.training.group import load_snapshots, train


@dataclass(frozen=True)
class Group:
    """SAEs that are trained on one activation stream."""

    arm: Arm
    pair: int | None
    """Whose masks they see; None: there are no masks."""
    members: tuple[tuple[str, Grid, int], ...]
    """(name, grid, seed) of each."""

    @property
    def name(self) -> str:
        return self.arm.name if self.pair is None else f"{self.arm.name}-s{self.pair}"


class Run(Scored):
    """One profile at work: its inputs, and the groups of SAEs trained on them."""

    @once
    def saes(self) -> dict[str, SAE]:
        """Trained SAEs by name, such as "masked-matryoshka20-s0", ablations too; trains the groups that are not
        finished."""
        missing = [group for group in self.groups(self.arms) if not (self.folder_of(group) / "saes").exists()]
        if missing and jobs.executor()[0] != "inline":
            self.blocks  # made once, before several jobs want them
            function = "masksae.study.run:train_group"
            jobs.run_jobs([jobs.Job(g.name, function, (self.source, g.arm.name, g.pair)) for g in missing])
        for arm in self.arms:
            for group in self.groups([arm]):
                self.train_group(group)
            self._show(arm)
        return self.load_saes(self.arms)

    @property
    def finished(self) -> bool:
        """Whether every group is trained."""
        return all((self.folder_of(group) / "saes").exists() for group in self.groups(self.arms))

    @property
    def kept_bytes(self) -> int:
        """What the run has in the user's cache already."""
        groups = self.groups(self.arms)
        folders = {self.folder_of(group) for group in groups}
        folders |= {self.stream_folder(group.arm, group.pair or 0) for group in groups}
        files = (file for folder in folders if folder.exists() for file in folder.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files)

    @property
    def arms(self) -> list[Arm]:
        """The arms and the ablations."""
        return [*self.profile.arms, *self.profile.ablations]

    def members(self, arm: Arm) -> list[tuple[str, Grid, int]]:
        """(name, grid, seed) of every SAE of an arm or of an ablation."""
        return [(f"{arm.name}-{grid.name}-s{seed}", grid, seed) for grid, seed in self.profile.members(arm)]

    def groups(self, arms: list[Arm]) -> list[Group]:
        """The groups of some arms, in the order of arms and pairs."""
        return [
            Group(arm, pair, tuple(member for member in self.members(arm) if pair in (None, member[2])))
            for arm in arms
            for pair in self.profile.pairs(arm)
        ]

    @property
    def table(self) -> list[dict]:
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
        return next(grid.n_latents for grid in self.profile.grids if grid.name == row["grid"])

    def id_of(self, group: Group) -> str:
        """Id of all that the SAEs of a group are made of."""
        arm, training = group.arm, self.profile.training
        saes = [grid.config(1, seed).to_dict() for _, grid, seed in group.members]  # the width is the model's
        rules = {type(grid.selection.config) for _, grid, _ in group.members}  # one from outside has its code outside
        how = [arm.tokens, arm.drop_masked, arm.denoise, training.model_dump(), training.config(10_000).identity()]
        code = [cache.code_id("study.run"), *sorted(map(cache.code_of, rules))]
        return run_id([self.stream_id(arm, group.pair or 0), how, saes, code])

    def ids_of(self, arms: list[Arm]) -> list[str]:
        """Ids of the groups of some arms."""
        return [self.id_of(group) for group in self.groups(arms)]

    def folder_of(self, group: Group) -> Path:
        """Where a group's SAEs, checkpoint and snapshots are kept."""
        return cache_dir("groups", self.id_of(group), group.name)

    def train_group(self, group: Group) -> None:
        """Train a group, or go on from its last checkpoint, unless it is finished."""
        folder = ensure_writable(self.folder_of(group))
        with FileLock(folder / ".lock"):  # a second run of the same group waits, and finds it done
            if (folder / "saes").exists():
                return
            saes = self._train(group, folder)
            with atomic_dir(folder / "saes") as tmp:
                for (name, _, _), sae in zip(group.members, saes):
                    sae.save(tmp / name)
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    def _train(self, group: Group, folder: Path) -> list[SAE]:
        arm, training = group.arm, self.profile.training
        drop, stream = arm.drop_masked or arm.denoise, self.stream(arm, group.pair or 0)
        configs = [grid.config(self.width, seed, drop) for _, grid, seed in group.members]
        config = training.config(training.epochs * stream.batches_per_epoch)
        told = f"{group.name}: {len(configs)} SAEs, {config.steps} steps of {training.batch_size} tokens"
        print(told, file=sys.stderr, flush=True)
        log = logs.chosen(folder, [name for name, _, _ in group.members])
        return train(configs, stream, config, checkpoint_dir=folder, device=self.device, log=log)

    def _show(self, arm: Arm) -> None:
        """Copy the finished SAEs of an arm to build/, and beside them the ids of what they are made of."""
        with atomic_dir(self.build / "saes" / arm.name, ANYTHING) as tmp:
            for group in self.groups([arm]):
                shutil.copytree(self.folder_of(group) / "saes", tmp, dirs_exist_ok=True)
        write_json(self._told(arm), self._made_of(arm))

    def _made_of(self, arm: Arm) -> dict[str, str]:
        """Name and id of each group of an arm, as the profile, its files and the code now say."""
        return {group.name: self.id_of(group) for group in self.groups([arm])}

    def _told(self, arm: Arm) -> Path:
        """Where that stands for the SAEs in build/."""
        return self.build / "saes" / f"{arm.name}.json"

    def load_saes(self, arms: list[Arm] | None = None) -> dict[str, SAE]:
        """Trained SAEs by name out of build/, those of the arms or of the arms given. Raises DataError if they are not
        there, or were made of something else than the profile, its files and the code now say."""
        saes = {}
        for arm in self.profile.arms if arms is None else arms:
            folder = self.build / "saes" / arm.name
            made_of = read_json(self._told(arm)) if self._told(arm).exists() else None
            if made_of != self._made_of(arm):
                other = "was made of another configuration, other files or by other code"
                raise DataError(
                    f"{folder} {'is missing' if made_of is None else other}. {self.remedy('02_train')} "
                    "Or `run.saes` here: it trains what is missing."
                )
            saes |= {name: SAE.load(folder / name, device=self.device) for name, _, _ in self.members(arm)}
        return saes

    def snapshots(self, arm: Arm) -> dict[int, dict[str, SAE]]:
        """SAEs of the first grid by step and name, the finished ones too; a group whose scratch was deleted is trained
        again."""
        first, by_step = self.profile.grids[0].name, {}
        finished = self.load_saes([arm])
        for group in self.groups([arm]):
            saes = [finished[name] for name, _, _ in group.members]
            last = saes[0].history[-1]["step"] + 1
            for step, members in (self._snapshots(group, last) | {last: saes}).items():
                named = {name: sae for (name, grid, _), sae in zip(group.members, members) if grid.name == first}
                by_step.setdefault(step, {}).update(named)
        return by_step

    def _snapshots(self, group: Group, last: int) -> dict[int, list[SAE]]:
        """The SAEs of a group by step, without the last."""
        folder = self.folder_of(group)
        kept = load_snapshots(folder, device=self.device) if folder.exists() else {}
        if sorted(kept) != sorted(n for n in self.profile.training.snapshots if n < last):
            shutil.rmtree(folder, ignore_errors=True)
            self.train_group(group)
            kept = load_snapshots(folder, device=self.device)
        return kept

    def rows(self, kind: str, section: Section, make) -> list[dict]:
        key = [self.table, self.ids_of(self.profile.arms), self.identity(section), cache.code_of(make)]
        return cache.kept_rows(kind, key, make)


def train_group(profile: str, arm: str, pair: int | None) -> None:
    """Train one group of a profile, or go on with it: a job of `masksae.jobs`."""
    run = Run(profile)
    run.train_group(next(g for g in run.groups(run.arms) if (g.arm.name, g.pair) == (arm, pair)))
