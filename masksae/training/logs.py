"""Where the records of training go while it runs: a file of JSON lines, and TensorBoard or Weights & Biases for a live
page.

`MASKSAE_LOG=tensorboard` (or `wandb`, or both with a comma) adds to the JSON lines; what a log does can change no
result.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from masksae.errors import ConfigError, nearest
from masksae.files import explained, write_text

Log = Callable[[int, dict], None]
"""Called with the number of an SAE in its group and a record of its history: numbers by name, `step` among them; None
is not defined."""


class JsonLines:
    """One object per line: {"sae": name, "step": ..., "loss": ..., ...}. A run that goes on drops the lines from its
    step on first."""

    def __init__(self, path, names: list[str]):
        self.path, self.names = Path(path), names
        self._file: TextIO | None = None

    def __call__(self, number: int, record: dict) -> None:
        with explained(self.path):
            if self._file is None:
                write_text(self.path, "".join(self._before(record["step"])))
                self._file = open(self.path, "a", encoding="utf-8")
            self._file.write(json.dumps({"sae": self.names[number], **record}) + "\n")
            self._file.flush()

    def _before(self, step: int) -> list[str]:
        """The whole lines of earlier steps."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        return kept


def tensorboard(folder, names: list[str]) -> Log:
    """Curves for `tensorboard --logdir FOLDER`, one run per SAE. Raises ConfigError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "MASKSAE_LOG asks for tensorboard, which is not installed. `pip install tensorboard`."
        ) from error
    writers = {}

    def log(number: int, record: dict) -> None:
        step = record["step"]
        if number not in writers:
            writers[number] = SummaryWriter(str(Path(folder) / names[number]), purge_step=step)
        for name, value in record.items():
            if name != "step" and value is not None:
                writers[number].add_scalar(name, value, step)
        writers[number].flush()

    return log


def wandb(folder, names: list[str]) -> Log:
    """Curves in the project "masksae" of Weights & Biases, `WANDB_PROJECT` names another. Raises ConfigError if it is
    not installed."""
    try:
        import wandb as client
    except ImportError as error:
        raise ConfigError("MASKSAE_LOG asks for wandb, which is not installed. `pip install wandb`.") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = client.init(
        project=os.environ.get("WANDB_PROJECT", "masksae"),
        name=folder.parent.name,
        dir=str(folder),
        id=f"{folder.parent.parent.name}-{folder.parent.name}",
        resume="allow",
    )

    def log(number: int, record: dict) -> None:
        run.log({f"{names[number]}/{k}": v for k, v in record.items() if k != "step"}, step=record["step"])

    return log


ADAPTERS = {"tensorboard": tensorboard, "wandb": wandb}


def chosen(folder, names: list[str]) -> Log:
    """JSON lines in `folder`/log.jsonl, and what MASKSAE_LOG names. Raises ConfigError before anything is trained."""
    wanted = [name.strip() for name in os.environ.get("MASKSAE_LOG", "").split(",") if name.strip()]
    for name in wanted:
        if name not in ADAPTERS:
            raise ConfigError(f"MASKSAE_LOG names {name!r}.{nearest(name, ADAPTERS)}")
    logs: list[Log] = [
        JsonLines(Path(folder) / "log.jsonl", names),
        *(ADAPTERS[name](Path(folder) / name, names) for name in wanted),
    ]

    def log_all(number: int, record: dict) -> None:
        for log in logs:
            log(number, record)

    return log_all
