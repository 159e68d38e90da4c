"""The SAEs of a profile as the notebooks call them: `run = Run("laptop")`, then `run.saes`, or `run.scored(...)`.

A run is worked off in parts: one pair of one block of the profile, trained, then scored, before the next. A pair is one
draw of everything that is drawn: the SAEs of a pair have the same initial weights and the same order of the tokens, and
the masks of the masked arms are drawn from its number too. Two pairs share nothing but the text. SAEs of a part that
see the same activations are trained together as a group; an SAE trained alone is the same to the bit. So each is kept
under an id of its own, of all that it is made of: what is finished is read back, what is missing is trained.
"""

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from masksae import jobs, provenance
from masksae.files import ANYTHING, atomic_dir, cache_dir, ensure_writable, read_json, run_id, write_json
from masksae.parallel import once
from masksae.saes.sae import SAE
from masksae.study.inputs import Inputs
from masksae.study.profile import Group, Member, Part
from masksae.study.store import Entry, Notes, Subject
from masksae.training import logs
from masksae.training.group import load_snapshots, train


class Run(Inputs):
    """One profile at work: its inputs, and the SAEs trained on them, part by part."""

    @once
    def parts(self) -> list["RunPart"]:
        """What is trained and scored before the next begins, in the profile's order."""
        return [RunPart(self, part) for part in self.profile.parts]

    @property
    def saes(self) -> dict[str, SAE]:
        """Trained SAEs by name, such as "kept-topk20-s100"; trains those that are missing, and shows all of them in
        build/NAME/saes."""
        self.train(self.profile.groups)
        self.show()
        return {member.name: self.load(member) for member in self.profile.members}

    def train_missing(self) -> None:
        """Train every SAE that is not finished, and show all of them in build/NAME/saes. Of a profile that keeps the
        scores of its pairs, nothing: a pair is trained when a score of it is missing."""
        ensure_writable(self.build / "saes")
        if not self.profile.keep_pairs:
            self.train(self.profile.groups)
            self.show()

    def train(self, groups: list[Group]) -> None:
        """Train what is missing of some groups, as jobs where an executor for jobs is chosen."""
        groups = [group for group in groups if self.missing(group)]
        if groups and jobs.executor()[0] != "inline":
            self.blocks  # made once, before several jobs want them
            function = "masksae.study.run:train_group"
            jobs.run_jobs([jobs.Job(group.name, function, (self.source, group.name)) for group in groups])
        for group in groups:
            self.train_group(group)

    def missing(self, group: Group) -> list[Member]:
        """Those of a group's SAEs that are not trained."""
        return [member for member in group.members if not self.folder_of(member).exists()]

    def show(self) -> None:
        """Copy the trained SAEs to build/NAME/saes/ARM, and note beside them the ids of what they are made of."""
        for arm in dict.fromkeys(member.arm.name for member in self.profile.members):
            told = self.build / "saes" / f"{arm}.json"
            known = read_json(told) if told.exists() else {}
            ids = {m.name: self.id_of(m) for m in self.profile.members if m.arm.name == arm}
            for member in (member for member in self.profile.members if member.name in ids):
                shown = self.build / "saes" / arm / member.name
                if known.get(member.name) != ids[member.name] or not shown.exists():
                    with atomic_dir(shown, ANYTHING) as tmp:
                        shutil.copytree(self.folder_of(member) / "sae", tmp, dirs_exist_ok=True)
            if known != ids:
                write_json(told, ids)

    def scored(self, score: Callable[[Subject], list[dict]]) -> list[dict]:
        """Rows of a function of `masksae.study.scores`, part after part."""
        return [row for part in self.parts for row in score(part)]

    @property
    def table(self) -> list[dict]:
        """One row per SAE, without scores."""
        return [row for part in self.parts for row in part.table]

    def latents_of(self, row: dict) -> int:
        """Size of the dictionary of a row's SAE."""
        return next(grid.n_latents for grid in self.profile.saes if grid.name == row["grid"])

    @property
    def kept_bytes(self) -> int:
        """What the run has in the user's cache already."""
        folders = {self.folder_of(member) for member in self.profile.members}
        folders |= {self.stream_folder(member.arm, member.pair) for member in self.profile.members}
        files = (file for folder in folders if folder.exists() for file in folder.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files)

    def recipe(self, member: Member) -> list:
        """All that an SAE is made of, but the code; not what it is called."""
        training, arm, pair = self.profile.training, member.arm, member.pair
        sae = member.config(1).to_dict()  # of the model's width
        noise = [arm.noise, arm.mask_seed(pair), arm.fresh_masks] if arm.noise else []
        how = training.model_dump(exclude={"snapshots"}) | {"snapshots": self._snapshots(member)}
        how = [arm.tokens, arm.denoise, noise, how, training.config(10_000).identity()]
        return [self.stream_recipe(arm, pair), how, [arm.drop_masked, sae]]

    def code_of(self, member: Member) -> dict:
        """The code that makes an SAE; a rule or a penalty from outside has its own there."""
        config = member.config(1)
        return provenance.made_by("study.run", type(config.selection), *map(type, config.penalties))

    def id_of(self, member: Member) -> str:
        """Id of all that an SAE is made of."""
        return run_id([self.recipe(member), self.code_of(member)])

    def folder_of(self, member: Member) -> Path:
        """Where an SAE ("sae") and its "snapshots" are kept."""
        return cache_dir("saes", self.id_of(member))

    def load(self, member: Member) -> SAE:
        """A trained SAE; trains what is missing of its group."""
        self.train([self.group_of(member)])
        return SAE.load(self.folder_of(member) / "sae", device=self.device)

    def train_group(self, group: Group) -> None:
        """Train what is missing of a group, or go on from the last checkpoint."""
        missing = self.missing(group)
        folder = ensure_writable(cache_dir("training", run_id(sorted(map(self.id_of, missing))), group.name))
        with FileLock(folder / ".lock"):  # a second run of the same SAEs waits, and finds them done
            if self.missing(group):
                for i, (member, sae) in enumerate(zip(missing, self._train(group, missing, folder))):
                    with atomic_dir(self.folder_of(member), ANYTHING) as tmp:
                        sae.save(tmp / "sae")
                        for step in (folder / "snapshots").glob("step-*"):
                            shutil.copytree(step / f"sae-{i:04d}", tmp / "snapshots" / step.name / "sae-0000")
                for done in ("checkpoint", "snapshots"):  # its log stays
                    shutil.rmtree(folder / done, ignore_errors=True)

    def _train(self, group: Group, members: list[Member], folder: Path) -> list[SAE]:
        training, stream = self.profile.training, self.stream(group.arm, group.pair)
        config = training.config(training.epochs * stream.batches_per_epoch, group.snapshots)
        told = f"{group.name}: {len(members)} SAEs, {config.steps} steps of {training.batch_size} tokens"
        print(told, file=sys.stderr, flush=True)
        log = logs.chosen(folder, [member.name for member in members])
        saes = [member.config(self.width) for member in members]
        return train(saes, stream, config, checkpoint_dir=folder, device=self.device, log=log)

    @once
    def _groups(self) -> dict[str, Group]:
        return {member.name: group for group in self.profile.groups for member in group.members}

    def group_of(self, member: Member) -> Group:
        """The group that an SAE is trained in."""
        return self._groups[member.name]

    def _snapshots(self, member: Member) -> list[int]:
        return sorted(self.profile.training.snapshots) if self.group_of(member).snapshots else []

    def snapshots(self, member: Member) -> dict[int, SAE]:
        """An SAE by step, the finished one too; trains what is missing of its group."""
        sae, folder = self.load(member), self.folder_of(member)
        kept = load_snapshots(folder, device=self.device) if self._snapshots(member) else {}
        return {step: only for step, [only] in kept.items()} | {sae.history[-1]["step"] + 1: sae}

    def free(self, part: "RunPart") -> None:
        """Delete the activations of a part that no later part is trained on."""
        later = self.profile.parts[self.parts.index(part) + 1 :]
        needed = {self.stream_folder(member.arm, member.pair) for each in later for member in each.members}
        for folder in {self.stream_folder(member.arm, member.pair) for member in part.members} - needed:
            shutil.rmtree(folder, ignore_errors=True)


class RunPart(Subject):
    """One pair of one block of a run, to be scored."""

    def __init__(self, run: Run, part: Part):
        file = run.results / (f"pairs/{part.name}.json" if run.profile.keep_pairs else "made_of.json")
        entries = [self._entry(run, member) for member in part.members]
        super().__init__(run, part.name, entries, Notes(file, keeps_rows=run.profile.keep_pairs))
        self.run, self.part, self.members = run, part, part.members

    @staticmethod
    def _entry(run: Run, member: Member) -> Entry:
        grid = member.grid
        row = {"sae": member.name, "arm": member.arm.name, "p": member.arm.p, "grid": grid.name, "k": grid.l0}
        row |= {"seed": member.pair, "architecture": grid.architecture}
        recipe = [run.recipe(member), grid.l0, member.pair]
        return Entry(row, recipe, functools.partial(run.load, member), run.code_of(member))

    @property
    def groups(self) -> list[Group]:
        """The groups that hold the part's SAEs."""
        return list(dict.fromkeys(map(self.run.group_of, self.members)))

    def load_saes(self) -> dict[str, SAE]:
        """The part's SAEs by name; trains what is missing of their groups."""
        self.run.train(self.groups)
        return super().load_saes()

    @property
    def has_snapshots(self) -> bool:
        """Whether the part's SAEs are also kept before they are finished."""
        return self.part.block.snapshots and bool(self.run.profile.training.snapshots)

    def snapshots(self) -> dict[int, dict[str, SAE]]:
        """The part's SAEs by step and name, the finished ones too."""
        by_step: dict = {}
        for member in (member for member in self.members if member.name in self.names):
            for step, sae in self.run.snapshots(member).items():
                by_step.setdefault(step, {})[member.name] = sae
        return by_step


def train_group(profile: str, name: str) -> None:
    """Train one group of a profile, or go on with it: a job of `masksae.jobs`."""
    run = Run(profile)
    run.train_group(next(group for group in run.profile.groups if group.name == name))
