"""The paper's profiles, shrunk: the same road from a streamed, filtered data set to scores, on tiny models of the same
two architectures."""

import random

import pandas as pd
import pytest
import torch
import yaml
from tiny_project import byte_tokenizer, tiny_model

from masksae import Run, load_profile
from masksae.files import PROFILES
from masksae.study.profile import Profile
from masksae.study.scores import matched
from masksae.study.sections import Block

WORDS = "the cat sat on a mat while seven dogs ran past it and nobody saw them".split()


@pytest.fixture
def pile(tmp_path, monkeypatch):
    """Two Parquet shards in the Pile's form, in a folder that stands for the hub's repository; a cache of its own."""
    draw = random.Random(0)
    for shard in range(2):
        rows = [
            {"text": " ".join(draw.choices(WORDS, k=draw.randint(0, 120))), "meta": {"pile_set_name": name}}
            for _ in range(60)
            for name in ("Pile-CC", "ArXiv")
        ]
        (tmp_path / "pile").mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(tmp_path / f"pile/train-{shard:05d}-of-00002.parquet")
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pile"


def shrunk(name: str, folder, pile, **changes):
    """A profile of the paper with a tiny model and few tokens; everything else as it is."""
    values = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
    source = values["text"]["sources"][0].replace("hub:monology/pile-uncopyrighted", f"hub:{pile}")
    assert "where=meta.pile_set_name:Pile-CC" in source
    values["name"] = f"tiny-{name}"
    values["model"] |= {"source": str(folder / "model"), "block": 1, "mask_token": "<mask>", "bos_token": "<bos>"}
    values["text"] |= {
        "sources": [source],
        "train_tokens": 12_800,
        "held_out_tokens": 640,
        "held_out_share": 0.15,
        "block_length": 32,
    }
    values["training"] |= {
        "batch_size": 256,
        "warmup": 4,
        "threshold_start": 10,
        "threshold_ema": 0.8,
        "pool_tokens": 2000,
    }
    values["saes"] = [grid | {"n_latents": 256} for grid in values["saes"]]
    values["blocks"] = [block | {"pairs": [0]} for block in values["blocks"]]
    values["evaluation"]["ce_tokens"], values["contexts"]["tokens"] = 320, 320
    values |= changes
    (folder / f"tiny-{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"tiny-{name}.yaml"


@pytest.mark.parametrize(
    "name, kind, blocks", [("paper", "gpt_neox", {"blocks": [{"pairs": [0]}]}), ("paper-gemma", "gemma2", {})]
)
def test_a_tiny_paper(pile, tmp_path, name, kind, blocks):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    run = Run(shrunk(name, tmp_path, pile, **blocks))
    half = torch.bfloat16 if name == "paper-gemma" else torch.float32
    assert run.language_model.model.dtype == half
    text = run.ids("train")
    assert text.shape == (400, 32) and (text[:, 0] == run.bos_id).all()
    saes = run.saes
    grids = 16 if blocks else 4
    assert len(saes) == 2 * grids and {sae.config.n_latents for sae in saes.values()} == {256}
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for sae in saes.values() for p in sae.parameters())
    assert not list((tmp_path / "cache").rglob("pool-*"))  # activations are never stored
    for sae in saes.values():
        first, last = sae.history[0], sae.history[-1]
        assert last["step"] > 40 and last["explained_variance"] > first["explained_variance"]
    assert {name for part in run.parts for name in matched.thresholds(part)} == saes.keys()


def test_one_block_adds_the_other_architectures():
    for name in ("paper", "paper-gemma"):
        profile = load_profile(name)
        assert {member.grid.architecture for member in profile.members} == {"Matryoshka BatchTopK"}
        assert {member.grid.l0 for member in profile.members} == {20, 40, 80, 160}
        lines = (PROFILES / f"{name}.yaml").read_text().splitlines()
        [further] = [line.partition("# ")[2] for line in lines if line.strip().startswith("# - {name: architectures")]
        block = Block.model_validate(yaml.safe_load(further)[0])
        more = Profile.model_validate(profile.model_dump(mode="json") | {"blocks": [*profile.blocks, block]})
        kinds = {"Matryoshka BatchTopK", "BatchTopK", "TopK", "JumpReLU"}
        assert {member.grid.architecture for member in more.members} == kinds
        assert len(more.members) == 4 * len(profile.members)
