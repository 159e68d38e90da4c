"""The SAEs of a profile as the notebooks call them: `run = Run("laptop")`, then `run.saes`, or `run.scored(...)`.

A run is worked off in parts: one pair of one block of the profile, trained, then scored, before the next. A pair is one
draw of everything that is drawn: the SAEs of a pair have the same initial weights and the same order of the tokens, and
the masks of the masked arms are drawn from its number too. Two pairs share nothing but the text. SAEs of a part that
see the same activations are trained together as a group. Each group is kept under an id of all that it is made of; what
is finished is read back, what is missing is trained.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from masksae import cache, jobs
from masksae.files import ANYTHING, atomic_dir, cache_dir, ensure_writable, read_json, run_id, write_json
from masksae.parallel import once
from masksae.saes.sae import SAE
from masksae.study.inputs import Beside, Inputs, Scored
from masksae.study.profile import Group, Member, Part
from masksae.study.sections import Section
from masksae.training import logs
from masksae.training.group import load_snapshots, train

MADE_OF = "made_of.json"
"""Result of a profile that does not keep its pairs: score -> part -> ids of recipe and code."""


class Run(Inputs):
    """One profile at work: its inputs, and the SAEs trained on them, part by part."""

    @once
    def parts(self) -> list["RunPart"]:
        """What is trained and scored before the next begins, in the profile's order."""
        return [RunPart(self, part) for part in self.profile.parts]

    @once
    def saes(self) -> dict[str, SAE]:
        """Trained SAEs by name, such as "kept-topk20-s100"; trains the groups that are not finished."""
        self.train_missing()
        return {name: sae for part in self.parts for name, sae in part.load_saes().items()}

    def train_missing(self) -> None:
        """Train every group that is not finished, as jobs where an executor for jobs is chosen. Of a profile that keeps
        the scores of its pairs, nothing: a pair is trained when a score of it is missing."""
        ensure_writable(self.build / "saes")
        if self.profile.keep_pairs:
            return
        missing = [group for group in self.profile.groups if not (self.folder_of(group) / "saes").exists()]
        if missing and jobs.executor()[0] != "inline":
            self.blocks  # made once, before several jobs want them
            function = "masksae.study.run:train_group"
            jobs.run_jobs([jobs.Job(group.name, function, (self.source, group.name)) for group in missing])
        for group in self.profile.groups:
            self.train_group(group)

    def scored(self, score: Callable[[Scored], list[dict]]) -> list[dict]:
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
    def finished(self) -> bool:
        """Whether every group is trained."""
        return all((self.folder_of(group) / "saes").exists() for group in self.profile.groups)

    @property
    def kept_bytes(self) -> int:
        """What the run has in the user's cache already."""
        folders = {self.folder_of(group) for group in self.profile.groups}
        folders |= {self.stream_folder(group.arm, group.pair) for group in self.profile.groups}
        files = (file for folder in folders if folder.exists() for file in folder.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files)

    def recipe(self, group: Group) -> list:
        """All that the SAEs of a group are made of, but the code."""
        training, arm = self.profile.training, group.arm
        saes = [
            [member.arm.drop_masked, member.config(1).to_dict()] for member in group.members
        ]  # of the model's width
        noise = [arm.noise, arm.mask_seed(group.pair), arm.fresh_masks] if arm.noise else []
        how = [arm.tokens, arm.denoise, noise, training.model_dump(), training.config(10_000).identity()]
        return [self.stream_recipe(arm, group.pair), how, saes]

    def id_of(self, group: Group) -> str:
        """Id of all that the SAEs of a group are made of."""
        rules = {type(member.grid.selection.config) for member in group.members}  # one from outside has its code there
        code = [cache.code_id("study.run"), *sorted(map(cache.code_of, rules))]
        return run_id([self.recipe(group), code])

    def folder_of(self, group: Group) -> Path:
        """Where a group's SAEs, checkpoint and snapshots are kept."""
        return cache_dir("groups", self.id_of(group), group.name)

    def train_group(self, group: Group) -> Path:
        """Train a group, or go on from its last checkpoint, unless it is finished; the folder of its SAEs."""
        folder = ensure_writable(self.folder_of(group))
        with FileLock(folder / ".lock"):  # a second run of the same group waits, and finds it done
            if not (folder / "saes").exists():
                saes = self._train(group, folder)
                with atomic_dir(folder / "saes") as tmp:
                    for member, sae in zip(group.members, saes):
                        sae.save(tmp / member.name)
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        self._show(group, folder / "saes")
        return folder / "saes"

    def _train(self, group: Group, folder: Path) -> list[SAE]:
        training, stream = self.profile.training, self.stream(group.arm, group.pair)
        config = training.config(training.epochs * stream.batches_per_epoch, group.snapshots)
        told = f"{group.name}: {len(group.members)} SAEs, {config.steps} steps of {training.batch_size} tokens"
        print(told, file=sys.stderr, flush=True)
        log = logs.chosen(folder, [member.name for member in group.members])
        saes = [member.config(self.width) for member in group.members]
        return train(saes, stream, config, checkpoint_dir=folder, device=self.device, log=log)

    def _show(self, group: Group, saes: Path) -> None:
        """Copy a group's SAEs to build/, and beside them the id of what they are made of."""
        for arm in dict.fromkeys(member.arm.name for member in group.members):
            told, made_of = self.build / "saes" / f"{arm}.json", self.id_of(group)
            names = [member.name for member in group.members if member.arm.name == arm]
            known = read_json(told) if told.exists() else {}
            if any(known.get(name) != made_of or not (self.build / "saes" / arm / name).exists() for name in names):
                for name in names:
                    with atomic_dir(self.build / "saes" / arm / name, ANYTHING) as tmp:
                        shutil.copytree(saes / name, tmp, dirs_exist_ok=True)
                write_json(told, known | dict.fromkeys(names, made_of))

    def group_of(self, member: Member) -> Group:
        """The group that an SAE is trained in."""
        return next(group for group in self.profile.groups if member in group.members)

    def snapshots(self, group: Group) -> dict[int, list[SAE]]:
        """The SAEs of a group by step, without the last; a group whose scratch was deleted is trained again."""
        wanted = sorted(self.profile.training.snapshots) if group.snapshots else []
        saes = self.train_group(group)
        last = SAE.load(saes / group.members[0].name).history[-1]["step"] + 1
        wanted = [n for n in wanted if n < last]
        kept = load_snapshots(saes.parent, device=self.device) if wanted else {}
        if sorted(kept) != wanted:
            shutil.rmtree(saes.parent)
            kept = load_snapshots(self.train_group(group).parent, device=self.device)
        return kept

    def free(self, part: "RunPart") -> None:
        """Delete the activations of a part that no later part is trained on."""
        later = self.profile.parts[self.parts.index(part) + 1 :]
        needed = {self.stream_folder(member.arm, member.pair) for each in later for member in each.members}
        for folder in {self.stream_folder(member.arm, member.pair) for member in part.members} - needed:
            shutil.rmtree(folder, ignore_errors=True)


class RunPart(Beside):
    """One pair of one block of a run, to be scored."""

    def __init__(self, run: Run, part: Part):
        super().__init__(run)
        self.run, self.part, self.members, self.name = run, part, part.members, part.name

    @once
    def groups(self) -> list[Group]:
        """The groups that hold the part's SAEs."""
        return list(dict.fromkeys(map(self.run.group_of, self.members)))

    @property
    def table(self) -> list[dict]:
        return [
            {
                "sae": member.name,
                "arm": member.arm.name,
                "p": member.arm.p,
                "grid": member.grid.name,
                "k": member.grid.l0,
                "seed": member.pair,
                "architecture": member.grid.architecture,
            }
            for member in self.members
        ]

    def load_saes(self) -> dict[str, SAE]:
        """The part's SAEs by name; trains the groups that are not finished."""
        folders = {member.name: group for group in self.groups for member in group.members}
        trained = {group: self.run.train_group(group) for group in self.groups}
        names = [member.name for member in self.members]
        return {name: SAE.load(trained[folders[name]] / name, device=self.device) for name in names}

    @property
    def has_snapshots(self) -> bool:
        """Whether the part's SAEs are also kept before they are finished."""
        return self.part.block.snapshots and bool(self.profile.training.snapshots)

    def snapshots(self) -> dict[int, dict[str, SAE]]:
        """The part's SAEs by step and name, the finished ones too."""
        finished, by_step = self.load_saes(), {}
        for group in self.groups:
            names = [member.name for member in group.members]
            for step, saes in self.run.snapshots(group).items():
                by_step.setdefault(step, {}).update((n, sae) for n, sae in zip(names, saes) if n in finished)
        for name, sae in finished.items():
            by_step.setdefault(sae.history[-1]["step"] + 1, {})[name] = sae
        return by_step

    def rows(self, kind: str, section: Section, make: Callable[[], list[dict]], *further: Section) -> list[dict]:
        key = self.made_of(section, make, *further)
        ids = dict(zip(("recipe", "code"), map(run_id, key)))
        if not self.profile.keep_pairs:
            rows = cache.kept_rows(kind, key, make)
            if self.noted(kind) != ids:
                known = _kept(self.run.results / MADE_OF)
                write_json(self.run.results / MADE_OF, known | {kind: known.get(kind, {}) | {self.name: ids}})
            return rows
        found = _kept(self.file).get(kind)
        if found is None or found["recipe"] != ids["recipe"]:
            found = ids | {"rows": cache.kept_rows(kind, key, make)}
            # read again: what `make` takes of other kinds is there by now
            write_json(self.file, _kept(self.file) | {kind: found}, compact=True)
        return found["rows"]

    def made_of(self, section: Section, make: Callable, *further: Section) -> list[list]:
        """All that rows of a score are made of: the recipe, out of the profile; and the code."""
        recipe = [self.table, [self.run.recipe(group) for group in self.groups], self.identity(section, *further)]
        return [recipe, [[self.run.id_of(group) for group in self.groups], cache.code_of(make)]]

    def noted(self, kind: str) -> dict[str, str] | None:
        """Ids of recipe and code of the rows that are among the results; None if there are none."""
        if not self.profile.keep_pairs:
            return _kept(self.run.results / MADE_OF).get(kind, {}).get(self.name)
        found = _kept(self.file).get(kind)
        return found and {key: found[key] for key in ("recipe", "code")}

    @property
    def file(self) -> Path:
        """Where the rows of a part are kept, for a profile that keeps them."""
        return self.results / "pairs" / f"{self.name}.json"


def _kept(file: Path) -> dict[str, dict]:
    """What a file holds; of a pair: kind -> recipe, code, rows."""
    return read_json(file) if file.exists() else {}


def train_group(profile: str, name: str) -> None:
    """Train one group of a profile, or go on with it: a job of `masksae.jobs`."""
    run = Run(profile)
    run.train_group(next(group for group in run.profile.groups if group.name == name))
