"""Damaged files: bits flipped, cut short, overwritten, JSON values changed. Whatever happens is one of our errors, or
harmless.

MASKSAE_FUZZ=300 tries so many of each kind; the fault table in docs/faults.md tells of such a run.
"""

import json
import os
import pickle
import random
import shutil

import pandas as pd
import pytest
import torch
import yaml
from fault_table import survived

from masksae import SAE, ActivationStream, BatchTopK, JumpReLU, SAEConfig, TrainConfig, load_profile, train
from masksae.data.tasks import probe_table
from masksae.data.texts import documents
from masksae.errors import CheckpointError, ConfigError, MasksaeError, SourceError
from masksae.export import load_sae
from masksae.files import PROFILES

TRIES = int(os.environ.get("MASKSAE_FUZZ", "30"))
JUNK = [None, -1, True, 0, 10**30, "x", [], {}, [None], [{}], float("nan"), float("inf")]
X = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
MEMBERS = [SAEConfig(8, 32, BatchTopK(2))]
RECIPE = TrainConfig(20, warmup=2, threshold_start=5, checkpoint_every=10, snapshots=(10,))


def mutate(value, draw):
    """One value somewhere inside replaced, or one key gone."""
    if isinstance(value, dict) and value:
        key = draw.choice(list(value))
        action = draw.random()
        if action < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: draw.choice(JUNK) if action < 0.5 else mutate(value[key], draw)}
    if isinstance(value, list) and value:
        return [mutate(value[0], draw), *value[1:]]
    return draw.choice(JUNK)


def damaged(data: bytes, draw, parse=None, dump=None) -> bytes:
    """The content of a file after an accident."""
    changed, place = bytearray(data), draw.randrange(len(data))
    kind = draw.choice(["flip", "flip", "cut", "zero", "insert", "empty", "mutate"])
    if kind == "flip":
        for _ in range(draw.choice([1, 8])):
            changed[draw.randrange(draw.choice([len(data), min(len(data), 500)]))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "zero":
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    elif kind == "insert":
        changed[place:place] = draw.randbytes(9)
    elif kind == "empty":
        changed.clear()
    elif parse:
        return dump(mutate(parse(data), draw)).encode()
    return bytes(changed)


def accident(folder, draw) -> None:
    """Damage one file of a folder."""
    file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"))
    form = (json.loads, json.dumps) if file.suffix == ".json" else (None, None)
    file.write_bytes(damaged(file.read_bytes(), draw, *form))


def random_sae(rule) -> SAE:
    sae = SAE(SAEConfig(8, 32, rule)).requires_grad_(False)
    sae.threshold.fill_(0.1 if rule.estimates_threshold else 0)
    return sae


def stream():
    return ActivationStream.from_array(X, batch_size=50, seed=0)


@pytest.mark.parametrize("rule", [BatchTopK(2), JumpReLU(4.0)], ids=["BatchTopK", "JumpReLU"])
@pytest.mark.parametrize("form", ["save", "to_saelens", "to_dictionary_learning"])
def test_a_damaged_sae_is_refused_or_the_same(form, rule, tmp_path):
    sae = random_sae(rule)
    getattr(sae, form)(tmp_path / "good")
    refused = 0
    for seed in range(TRIES):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        accident(tmp_path / "bad", random.Random(seed))
        try:
            found = load_sae(tmp_path / "bad")
        except (CheckpointError, ConfigError):
            refused += 1
        else:
            if form == "save":  # sealed: no changed bit is taken
                assert found.config == sae.config and all(
                    map(torch.equal, found.state_dict().values(), sae.state_dict().values())
                )
    assert refused > TRIES / 2
    words = {"save": "masksae", "to_saelens": "SAELens", "to_dictionary_learning": "dictionary_learning"}[form]
    outcome = f"{refused} refused in words, {TRIES - refused} " + ("read back the same" if form == "save" else "read")
    what = (
        f"an SAE's folder of {words} ({type(rule).__name__}): "
        "bits flipped, cut, zeroed, bytes inserted, emptied, JSON values swapped"
    )
    survived("damaged file", what, TRIES, outcome)


def test_a_damaged_checkpoint_is_refused_or_gives_the_same_bytes(tmp_path):
    def run(folder):
        return train(MEMBERS, stream(), RECIPE, checkpoint_dir=folder, progress=False)[0]

    whole = run(tmp_path / "good")
    refused = 0
    for seed in range(TRIES):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        accident(tmp_path / "bad" / ("checkpoint" if seed % 4 else "snapshots"), random.Random(seed))
        try:
            assert all(map(torch.equal, run(tmp_path / "bad").state_dict().values(), whole.state_dict().values()))
        except CheckpointError:
            refused += 1
    assert refused > TRIES / 4
    outcome = f"{refused} refused in words, {TRIES - refused} trained on to the same bytes"
    survived("damaged file", "a training checkpoint or snapshot, damaged likewise", TRIES, outcome)


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_a_damaged_profile_is_refused_in_words(name, tmp_path):
    text = (PROFILES / f"{name}.yaml").read_text().replace(f"name: {name}", "name: mine", 1)
    refused = 0
    for seed in range(TRIES):
        (tmp_path / "mine.yaml").write_bytes(
            damaged(text.encode(), random.Random(seed), yaml.safe_load, yaml.safe_dump)
        )
        try:
            assert load_profile(tmp_path / "mine.yaml").name == "mine"
        except ConfigError as error:
            assert "mine.yaml" in str(error)
            refused += 1
    outcome = f"{refused} refused naming file and key, {TRIES - refused} still a profile"
    survived("damaged file", f"the profile `{name}`, damaged likewise", TRIES, outcome)


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_hostile_pickle_is_not_run(how, tmp_path):
    random_sae(BatchTopK(2)).to_dictionary_learning(tmp_path / "sae")
    with open(tmp_path / "sae/ae.pt", "wb") as file:
        (pickle.dump if how == "pickle" else torch.save)({"W_enc": Hostile(tmp_path / "owned")}, file)
    with pytest.raises(CheckpointError, match="ae.pt cannot be read"):
        load_sae(tmp_path / "sae")
    assert not (tmp_path / "owned").exists()
    with open(tmp_path / "sae/ae.pt", "rb") as file:
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)  # the trap is a real one
    assert (tmp_path / "owned").exists()
    survived("damaged file", f"a hostile pickle as `ae.pt` ({how})", 1, "refused; its code did not run")


def test_damaged_scratch_is_said_to_be_made_again(tmp_path, monkeypatch):
    from masksae.files import read_json, read_safetensors, save_tensors, write_json

    write_json(tmp_path / "scores.json", [{"a": 1.5}])
    save_tensors({"x": X}, tmp_path / "x.safetensors")
    refused = 0
    for seed in range(TRIES):
        for good, read in (("scores.json", read_json), ("x.safetensors", read_safetensors)):
            bad = tmp_path / f"bad-{good}"
            bad.write_bytes(damaged((tmp_path / good).read_bytes(), random.Random(seed)))
            try:
                read(bad)
            except MasksaeError as error:
                assert ("made again" if read is read_safetensors else "move it away") in str(error)
                refused += 1
    what = "scratch files (scores, activations), damaged likewise"
    survived("damaged file", what, 2 * TRIES, f"{refused} refused with the remedy, the others read")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv"])
def test_a_damaged_text_or_table_is_refused_by_name_or_read(suffix, tmp_path):
    file, draw, refused = tmp_path / f"mine{suffix}", random.Random(0), 0
    table = pd.DataFrame({"text": [f"some text für {i}" for i in range(200)], "target": [0, 1] * 100})
    write = {
        ".txt": lambda: file.write_text("\n\n".join(table["text"] * 20)),
        ".jsonl": lambda: table.to_json(file, orient="records", lines=True, force_ascii=False),
        ".parquet": lambda: table.to_parquet(file),
        ".csv": lambda: table.to_csv(file, index=False),
    }
    write[suffix]()
    good = file.read_bytes()
    for _ in range(TRIES):
        file.write_bytes(damaged(good, draw))
        try:
            probe_table(f"{file}#prompt=text") if suffix == ".csv" else list(documents(str(file)))
        except SourceError as error:
            assert str(file) in str(error)
            refused += 1
    assert 0 < refused < TRIES
    outcome = f"{refused} refused naming the file, {TRIES - refused} read"
    survived("damaged file", f"a reader's own {suffix} file, damaged likewise", TRIES, outcome)
