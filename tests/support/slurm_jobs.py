"""Jobs for the tests of `masksae.jobs`: importable by the processes that do them."""

import time
from pathlib import Path

import torch
from small_training import D, F, configs, train_config

import masksae
from masksae.activations import ActivationStream
from masksae.errors import DataError


def training(folder: str, pause: float = 0.0) -> None:
    """Train two small SAEs with checkpoints; each step takes at least `pause` seconds. Notes every start."""
    torch.set_num_threads(1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "starts", "a") as starts:
        starts.write("x")
    x = torch.randn(4000, D, generator=torch.Generator().manual_seed(0))
    stream = ActivationStream.from_array(x, batch_size=200, seed=0)
    config = train_config(steps=60, checkpoint_every=5)
    take = stream.batches

    def slow(views):
        for batch in take(views):
            time.sleep(pause)
            yield batch

    stream.batches = slow
    for i, sae in enumerate(masksae.train(configs(), stream, config, checkpoint_dir=folder / "group", progress=False)):
        assert sae.W_dec.shape == (F, D)
        sae.save(folder / f"sae-{i}")


def span(folder: str, name: str, seconds: float = 1.0) -> None:
    """Leave a file with the times of start and end."""
    start = time.time()
    time.sleep(seconds)
    (Path(folder) / name).write_text(f"{start} {time.time()}")


def failing(reason: str) -> None:
    """Fail as masksae does."""
    raise DataError(reason)


def device(folder: str, name: str) -> None:
    """Leave a file with the device that the job was given."""
    import os

    (Path(folder) / name).write_text(os.environ["MASKSAE_DEVICE"])
