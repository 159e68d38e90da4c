"""A profile is one YAML file that fixes every number of a run. It is checked here, before anything expensive starts.

Unknown keys, wrong types and impossible combinations raise ConfigError naming the key (and the nearest known one).
Values that cannot change a result (threads, device, progress bars) are not in a profile, so they are in no run id
either.
"""

import reprlib
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from masksae.errors import ConfigError, nearest
from masksae.files import PROFILES, shipped_profiles
from masksae.study.sections import (
    Absorption,
    Arm,
    Contexts,
    Decisions,
    Evaluation,
    Grid,
    Model,
    Perturbation,
    Probing,
    Section,
    Simulation,
    Text,
    Training,
)

ARMS = [Arm(name="unmasked", p=0.0), Arm(name="masked", p=0.3)]

RESERVED = ("api", "docs", "faults", "guide", "lib", "release", "site")
"""Folders of build/ and of build/site/ that are no profile's; a profile of that name would be written over."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


class Profile(Section):
    """Every number of a run; read one with `load_profile`. Needed are name, model, text and saes; the rest has
    defaults."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    description: str = ""
    model: Model
    text: Text
    arms: Annotated[list[Arm], Field(min_length=1)] = ARMS
    ablations: list[Arm] = []
    """Further arms, with SAEs of the first grid only; compared in notebooks 04 and 08."""
    training: Training = Training()
    architectures: Annotated[list[str], Field(min_length=1)] = ["all"]
    """Which of the grids under `saes` are trained, by architecture ("Matryoshka BatchTopK"); [all]: every one."""
    saes: Annotated[list[Grid], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    absorption: Absorption = Absorption()
    contexts: Contexts = Contexts()
    probing: Probing = Probing()
    perturbation: Perturbation = Perturbation()
    simulation: Simulation = Simulation()
    decisions: Decisions = Decisions()

    @property
    def shipped(self) -> bool:
        """Whether it comes with the package: then notebooks assert that its results are as promised."""
        return self.name in shipped_profiles()

    @property
    def grids(self) -> list[Grid]:
        """The SAEs that are trained: those of `saes` whose architecture is wanted."""
        return [grid for grid in self.saes if {"all", grid.architecture} & {*self.architectures}]

    def members(self, arm: Arm) -> list[tuple[Grid, int]]:
        """(grid, seed) of every SAE of an arm or of an ablation, which has those of the first grid."""
        grids = self.grids if arm in self.arms else self.grids[:1]
        return [(grid, seed) for grid in grids for seed in arm.seeds or grid.seeds]

    def pairs(self, arm: Arm) -> list[int | None]:
        """The draws of masks of an arm: one for each seed of its SAEs; [None] without masks."""
        return list(dict.fromkeys(seed for _, seed in self.members(arm))) if arm.p else [None]

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
        known = dict.fromkeys(grid.architecture for grid in self.saes)
        for name in self.architectures:
            if name not in known and name != "all":
                raise ValueError(f"architectures: no grid of saes is a {name!r}.{nearest(name, ['all', *known])}")
        for what, items in (("arms and ablations", [*self.arms, *self.ablations]), ("saes", self.saes)):
            names = [item.name for item in items]
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: names must differ, found {names}. Rename one.")
        if self.arms[0].p != 0:
            raise ValueError(
                f"arms: the first arm is the baseline of every comparison and needs p = 0, found {self.arms[0].p}."
            )
        for arm in self.arms:
            if arm.seeds is not None:
                raise ValueError(f"arms.{arm.name}.seeds: an arm has SAEs of every grid and seed. Leave this key out.")
        for arm in self.ablations:
            if missing := set(arm.seeds or ()) - set(self.grids[0].seeds):
                raise ValueError(
                    f"ablations.{arm.name}.seeds: {sorted(missing)} are not among the first grid's "
                    f"({self.grids[0].seeds}), so nothing pairs with them."
                )
        if self.text.train_tokens < self.training.batch_size:
            raise ValueError(
                f"text.train_tokens ({self.text.train_tokens}) is less than one training.batch_size "
                f"({self.training.batch_size}). Raise the first."
            )
        return self


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
    ('smollm2-135m', ['unmasked', 'masked'])
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
    if raw.get("name") != path.stem or (path.resolve().parent != PROFILES and (PROFILES / path.name).exists()):
        raise ConfigError(
            f"{path} holds a profile named {raw.get('name')!r}. Outputs are kept apart by name: "
            "call the file NAME.yaml and choose a NAME that no shipped profile has."
        )
    if raw["name"] in RESERVED:
        raise ConfigError(
            f"{path}: name: {raw['name']!r} is a folder of the project's own under build/, "
            f"as are {', '.join(RESERVED)}. Choose another."
        )
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join("  " + _explain(e) for e in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{problems}") from None


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
