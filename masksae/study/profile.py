"""A profile is one YAML file that fixes every number of a run. It is checked here, before anything expensive starts.

Unknown keys, wrong types and impossible combinations raise ConfigError naming the key (and the nearest known one).
Values that cannot change a result (threads, device, progress bars) are not in a profile, so they are in no run id
either.
"""

import reprlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from masksae.errors import ConfigError, nearest
from masksae.files import PROFILES, shipped_profiles
from masksae.saes.config import SAEConfig
from masksae.study.sections import (
    Absorption,
    Arm,
    Block,
    Contexts,
    Decisions,
    Evaluation,
    Grid,
    Model,
    Perturbation,
    Probing,
    Robustness,
    Section,
    Simulation,
    Text,
    Training,
    Variant,
)

ARMS = [Arm(name="unmasked", p=0.0), Arm(name="kept", p=0.3)]

RESERVED = ("api", "benchmarks", "docs", "faults", "figures", "guide", "lib", "release", "site")
"""Folders of build/ and of build/site/ that are no profile's; a profile of that name would be written over."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


@dataclass(frozen=True, eq=False)
class Member:
    """One SAE of a profile."""

    arm: Arm
    grid: Grid
    pair: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.grid.name}-s{self.pair}"

    def config(self, d_model: int) -> SAEConfig:
        """Of the SAE, for a model of that width."""
        return self.grid.config(d_model, self.pair, self.arm.drop_masked or self.arm.denoise)


@dataclass(frozen=True, eq=False)
class Part:
    """One pair of one block: what is trained and scored before the next begins."""

    block: Block
    pair: int
    members: tuple[Member, ...]
    """Those that no earlier part has."""

    @property
    def name(self) -> str:
        return f"{self.block.name}-s{self.pair}"


@dataclass(frozen=True, eq=False)
class Group:
    """SAEs that are trained together on one activation stream."""

    members: tuple[Member, ...]
    snapshots: bool

    @property
    def arm(self) -> Arm:
        """One that sees the group's activations."""
        return self.members[0].arm

    @property
    def pair(self) -> int:
        """One whose draw the group's activations are."""
        return self.members[0].pair

    @property
    def name(self) -> str:
        arms, grids, pairs = (dict.fromkeys(names) for names in zip(*(m.name.split("-") for m in self.members)))
        return "-".join("+".join(names) for names in (arms, list(grids)[:3], list(pairs)[:3]))


class Profile(Section):
    """Every number of a run; read one with `load_profile`. Needed are name, model, text and saes; the rest has
    defaults."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    description: str = ""
    model: Model
    text: Text
    arms: Annotated[list[Arm], Field(min_length=1)] = ARMS
    training: Training = Training()
    saes: Annotated[list[Grid], Field(min_length=1)]
    blocks: Annotated[list[Block], Field(min_length=1)] = [Block()]
    """The first one decides the claims."""
    keep_pairs: bool = False
    """Write the scores of each pair into results/NAME/pairs as it is finished, and take them from there: for runs that
    are spread over machines."""
    variants: list[Variant] = []
    evaluation: Evaluation = Evaluation()
    absorption: Absorption = Absorption()
    contexts: Contexts = Contexts()
    probing: Probing = Probing()
    perturbation: Perturbation = Perturbation()
    robustness: Robustness = Robustness()
    simulation: Simulation = Simulation()
    decisions: Decisions = Decisions()

    @property
    def shipped(self) -> bool:
        """Whether it comes with the package: then notebooks assert that its results are as promised."""
        return self.name in shipped_profiles()

    @property
    def baseline_arm(self) -> Arm:
        """The unmasked arm."""
        return self.arms[0]

    @property
    def treated_arm(self) -> Arm:
        """The arm on which claims are decided. Raises ConfigError for a profile of one arm, and for one whose main grid
        has no SAEs of that arm or of the unmasked one."""
        name = self.decisions.arm or next((arm.name for arm in self.arms[1:]), None)
        if name is None:
            raise ConfigError(
                f"arms: {self.name} has {self.baseline_arm.name!r} alone, and nothing to compare with it. Add a second "
                "one, such as {name: kept, p: 0.3}."
            )
        there = {member.arm.name for member in self.members if member.grid.name == self.main_grid.name}
        if lacking := sorted({self.baseline_arm.name, name} - there):
            raise ConfigError(
                f"blocks.{self.blocks[0].name}: {self.main_grid.name} decides, and has no SAEs of {lacking}. "
                "Add them to the block, or name another arm in decisions.arm."
            )
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def main_grid(self) -> Grid:
        """The first one of the first block: the claims are decided on its SAEs."""
        return self._grids_of(self.blocks[0])[0]

    @property
    def shares(self) -> dict[str, float]:
        """p of the masked arms of the main grid that differ from the unmasked one in nothing else, the lowest first."""
        first = self.baseline_arm
        masked = [m.arm for m in self.members if m.grid.name == self.main_grid.name and m.arm.p]
        alike = [arm for arm in masked if arm.model_copy(update={"name": first.name, "p": first.p}) == first]
        return {arm.name: arm.p for arm in sorted(alike, key=lambda arm: arm.p)}

    @property
    def trained_grids(self) -> list[str]:
        """Names of all but those with a frozen decoder, which explain so little that beside them nothing else could be
        told apart in a picture."""
        return [grid.name for grid in self.saes if not grid.frozen_decoder]

    def _arms_of(self, block: Block) -> list[Arm]:
        return [arm for arm in self.arms if not block.arms or arm.name in block.arms]

    def _grids_of(self, block: Block) -> list[Grid]:
        return [grid for grid in self.saes if not block.saes or grid.name in block.saes]

    @cached_property
    def parts(self) -> list[Part]:
        """What is worked off one after the other; every SAE is in one of them."""
        seen, parts = set(), []
        for block in self.blocks:
            for pair in block.pairs if not block.skipped else []:
                grids = self._grids_of(block)
                members = [Member(arm, grid, pair) for arm in self._arms_of(block) for grid in grids]
                new = tuple(member for member in members if member.name not in seen)
                seen |= {member.name for member in new}
                parts += [Part(block, pair, new)] if new else []
        return parts

    @property
    def members(self) -> list[Member]:
        """Every SAE, in the order of the parts."""
        return [member for part in self.parts for member in part.members]

    @cached_property
    def groups(self) -> list[Group]:
        """Every SAE in one group: those of a part that see the same activations. Where activations are not kept in
        scratch, all of a block that see the same, for the model runs but once then."""
        by_key: dict[tuple, tuple[Block, list[Member]]] = {}
        for part in self.parts:
            together = part.name if self.training.epochs > 1 else part.block.name
            for member in part.members:
                key = (together, *member.arm.sees(member.pair))
                by_key.setdefault(key, (part.block, []))[1].append(member)
        return [Group(tuple(members), block.snapshots) for block, members in by_key.values()]

    def model_copy(self, **options) -> "Profile":
        """As pydantic's, without what was worked out of the values before."""
        copy = super().model_copy(**options)
        for name in ("parts", "groups"):
            copy.__dict__.pop(name, None)
        return copy

    def baseline(self, arm: str, grid: str) -> tuple[str, str] | None:
        """(arm, grid) whose SAEs those of an arm and a grid are compared with: the unmasked ones of the grid, or of the
        grid that it is `against`; None for the main baseline itself."""
        cells = {(member.arm.name, member.grid.name) for member in self.members}
        against = next(g.against for g in self.saes if g.name == grid)
        for other in (grid, against):
            if (cell := (self.baseline_arm.name, other)) in cells - {(arm, grid)}:
                return cell
        return None

    def changed(self, variant: Variant) -> "Profile":
        """This profile with the changes of one of its variants. Raises ConfigError for changes that make no profile."""
        values = self.model_dump(mode="json", exclude_unset=True) | {"variants": []}
        for name, change in variant.changes.items():
            both = isinstance(change, dict) and isinstance(values.get(name), dict)
            values[name] = values[name] | change if both else change
        return _validated(values, f"variant {variant.name} of {self.name}")

    @model_validator(mode="after")
    def _sized(self):
        """Sizes that are left out follow the training text; from here on they are numbers."""
        held_out, contexts, share = self.text.sized(self.contexts.tokens)
        text = self.text.model_copy(update={"held_out_tokens": held_out, "held_out_share": share})
        object.__setattr__(self, "text", text)  # still being made; frozen from here on
        object.__setattr__(self, "contexts", self.contexts.model_copy(update={"tokens": contexts}))
        return self

    @model_validator(mode="after")
    def _possible(self):
        for what, items in (
            ("arms", self.arms),
            ("saes", self.saes),
            ("blocks", self.blocks),
            ("variants", self.variants),
        ):
            names = [item.name for item in items]
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: names must differ, found {names}. Rename one.")
        if self.baseline_arm.drawn:
            raise ValueError(
                f"arms: the first arm is the baseline of every comparison and needs p = 0, found {self.arms[0].p}."
            )
        grids = [grid.name for grid in self.saes]
        for block in self.blocks:
            self._check_block(block, grids)
        if self.blocks[0].skipped:
            raise ValueError(
                f"blocks.{self.blocks[0].name}.skipped: the first block decides. Skip others, from the end."
            )
        if self.main_grid.frozen_decoder:
            raise ValueError(f"saes.{self.main_grid.name}.frozen_decoder: this grid decides. Put another one first.")
        for grid in self.saes:
            if grid.against is not None and grid.against not in grids:
                raise ValueError(
                    f"saes.{grid.name}.against: there is no grid {grid.against!r}.{nearest(grid.against, grids)}"
                )
        self._check_partners()
        for variant in self.variants:
            self.changed(variant)
        if self.text.train_tokens < self.training.batch_size:
            raise ValueError(
                f"text.train_tokens ({self.text.train_tokens}) is less than one training.batch_size "
                f"({self.training.batch_size}). Raise the first."
            )
        return self

    @model_validator(mode="after")
    def _decided(self):
        """Decisions speak of arms, grids and numbers of latents that there are."""
        for key, names, known in (
            ("arm", [self.decisions.arm] if self.decisions.arm else [], [arm.name for arm in self.arms[1:]]),
            ("cells", self.decisions.cells, [grid.name for grid in self.saes if grid is not self.main_grid]),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"decisions.{key}: found {name!r}.{nearest(name, known)}")
        shifted, ablated = self.probing.shifted_ks, self.perturbation.ns
        taken = {"probing_auc": self.probing.ks, "tpp": ablated, "scr": ablated}
        taken |= {"ood_auc": shifted, "ood_gap": shifted}
        for endpoint in self.decisions.endpoints:
            start, _, number = endpoint.score.rpartition("_")
            if number and number not in map(str, taken.get(start, [number])):
                raise ValueError(
                    f"decisions.endpoints.{endpoint.name}.score: found {endpoint.score!r}, which this profile does not "
                    f"take: it has {taken[start]} latents. Name one of them, or {start + '_'!r} for the first."
                )
        return self

    def _check_block(self, block: Block, grids: list[str]) -> None:
        where = f"blocks.{block.name}"
        for key, known in (("arms", [arm.name for arm in self.arms]), ("saes", grids)):
            for name in getattr(block, key):
                if name not in known:
                    raise ValueError(f"{where}.{key}: found {name!r}.{nearest(name, known)}")
        if len(set(block.pairs)) < len(block.pairs):
            raise ValueError(
                f"{where}.pairs: {block.pairs} holds a pair twice; two pairs of one number share a draw and are one. "
                "Leave one out."
            )

    def _check_partners(self) -> None:
        """Every SAE has one that it is compared with: of the same pair."""
        names = {member.name for member in self.members}
        for member in self.members:
            cell = self.baseline(member.arm.name, member.grid.name)
            if cell is None and member.arm is not self.baseline_arm:
                raise ValueError(
                    f"blocks: {member.name} has no unmasked SAE to be compared with. Add the arm "
                    f"{self.baseline_arm.name} to its block, or name a grid in saes.{member.grid.name}.against."
                )
            if cell is not None and f"{cell[0]}-{cell[1]}-s{member.pair}" not in names:
                raise ValueError(
                    f"blocks: {member.name} is compared with {cell[0]}-{cell[1]}, which has no pair {member.pair}. Add "
                    "it to their block, or leave it out here."
                )


def profile_path(name_or_path) -> Path:
    """The YAML file of a shipped profile (by name) or of the reader's own (by path). Raises ConfigError."""
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else PROFILES / f"{text}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"There is no profile {text!r}.{nearest(text, shipped_profiles())} Or give the path of a .yaml file."
        )
    return path


def load_profile(name_or_path) -> Profile:
    """Read and check a profile, by shipped name ("smoke") or by path of a YAML file. Raises ConfigError naming the key.

    The file is called after the profile, and nobody's file after a shipped profile: outputs go into folders of that
    name.

    >>> profile = load_profile("smoke")
    >>> profile.model.source, [arm.name for arm in profile.arms]
    ('smollm2-135m', ['unmasked', 'kept', 'dropped', 'noise', 'fresh'])
    """
    path = profile_path(name_or_path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # no YAML, no UTF-8; a number or date that cannot be
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deep to be a profile.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, found {type(raw).__name__}.")
    if raw.get("name") != path.stem or (path.resolve().parent != PROFILES and path.stem in shipped_profiles()):
        raise ConfigError(
            f"{path} holds a profile named {raw.get('name')!r}. Outputs are kept apart by name: "
            "call the file NAME.yaml or NAME.yml and choose a NAME that no shipped profile has."
        )
    if raw["name"] in RESERVED:
        raise ConfigError(
            f"{path}: name: {raw['name']!r} is a folder of the project's own under build/, "
            f"as are {', '.join(RESERVED)}. Choose another."
        )
    return _validated(raw, path)


def _validated(raw: dict, what) -> Profile:
    """A profile out of plain values. Raises ConfigError with a line for each key that cannot be used."""
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join("  " + _explain(e) for e in error.errors())
        raise ConfigError(f"{what} cannot be used:\n{problems}") from None


class _Loader(yaml.SafeLoader):
    """YAML without keys that stand twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (written := (key.tag, str(key.value))) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here twice; remove one", key.start_mark
                )
            seen.add(written)
        return super().construct_mapping(node, deep)


def _explain(error: dict) -> str:
    """One line for one pydantic error: where, what was found, what was expected, the nearest known key."""
    where = ".".join(str(part) for part in error["loc"]) or "the profile"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key.{nearest(error['loc'][-1], _keys_at(error['loc'][:-1]))}"
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: found {_brief.repr(error['input'])}.{nearest(error['input'], expected)}"
    if error["type"] == "missing":
        return f"{where}: missing. Add this key."
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: {error['msg']}, found {_brief.repr(error['input'])}"


def _keys_at(loc) -> list[str]:
    """Known keys of the section at a location inside the profile."""
    section = Profile
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        inner = getattr(annotation, "__args__", None)
        section = inner[0] if inner else annotation
    return list(section.model_fields)
