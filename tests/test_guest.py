"""Somebody's own SAE: read in three forms, scored like a run's own, in a run's place."""

import json

import pytest
import torch
from test_stages import profile, project  # noqa: F401

from masksae import SAE, Run, guest, scores
from masksae.errors import ConfigError


@pytest.fixture
def run(project):  # noqa: F811
    run = Run(profile(project))
    run.saes
    return run


@pytest.fixture
def folder(run):
    """A trained SAE of the run, in SAELens' form."""
    return run.load_saes()["unmasked-plain-s0"].to_saelens(run.build / "mine")


def test_three_forms_are_told_apart(run, tmp_path):
    sae = run.load_saes()["masked-matryoshka-s0"]
    for name, write in {"a": sae.to_saelens, "b": sae.to_dictionary_learning, "c": sae.save}.items():
        write(tmp_path / name)
        assert torch.equal(guest.load_sae(tmp_path / name).W_dec, sae.W_dec)
    with pytest.raises(ConfigError, match="holds none of sae_weights.safetensors, ae.pt, sae.safetensors"):
        guest.load_sae(tmp_path)


def test_a_guest_scores_what_the_run_scores(run, folder, tmp_path):
    own = {row["mode"]: row for row in scores.reconstruction_scores(run) if row["sae"] == "unmasked-plain-s0"}
    visitor = guest.Guest(run.source, folder, out=tmp_path / "out")
    found = {row["mode"]: row for row in guest.evaluate(visitor, ["reconstruction"])["reconstruction"]}
    for mode in ("as_trained", "matched"):
        for score in ("ev_centred", "l0", "ce_score", "dead_latents"):
            assert found[mode][score] == pytest.approx(own[mode][score], rel=1e-5), (mode, score)
    assert found["matched"]["k"] == 3 and json.loads((tmp_path / "out/reconstruction.json").read_text())
    [file, _] = guest.saebench(visitor, {"reconstruction": list(found.values())})
    assert json.loads(file.read_text())["eval_type_id"] == "core"
    other = guest.Guest(run.source, folder, out=tmp_path / "out", l0=5.0)
    assert guest.evaluate(other, ["reconstruction"])["reconstruction"][1]["l0"] == pytest.approx(5.0, rel=0.05)


def test_a_guest_in_half_precision_scores_alike(run, folder, tmp_path):
    own = guest.evaluate(guest.Guest(run.source, folder, out=tmp_path / "a"), ["reconstruction"])["reconstruction"]
    half = run.load_saes()["unmasked-plain-s0"].bfloat16().to_saelens(tmp_path / "half")
    found = guest.evaluate(guest.Guest(run.source, half, out=tmp_path / "b"), ["reconstruction"])["reconstruction"]
    for ours, theirs in zip(own, found, strict=True):
        for score in ("ev_centred", "l0", "ce_sae"):
            assert theirs[score] == pytest.approx(ours[score], rel=0.02), score


def test_an_sae_without_a_k_of_its_own_is_matched_at_the_l0_it_has(run, folder, tmp_path):
    record = json.loads((folder / "cfg.json").read_text())
    del record["metadata"]["masksae"]  # as SAELens would have written it
    (folder / "cfg.json").write_text(json.dumps(record))
    visitor = guest.Guest(run.source, folder, out=tmp_path / "out")
    rows = guest.evaluate(visitor, ["reconstruction"])["reconstruction"]
    assert rows[0]["l0"] == pytest.approx(rows[1]["l0"], rel=0.02) and rows[0]["k"] == pytest.approx(
        rows[0]["l0"], abs=0.1
    )


def test_what_cannot_be_scored_is_refused(run, folder, tmp_path):
    with pytest.raises(ConfigError, match="no metric 'absorbtion'.*Did you mean 'absorption'"):
        guest.evaluate(guest.Guest(run.source, folder, out=tmp_path), ["absorbtion"])
    from masksae import BatchTopK, SAEConfig

    SAE(SAEConfig(24, 32, BatchTopK(3))).save(tmp_path / "wide")
    with pytest.raises(ConfigError, match="reads width 24, .* has 16"):
        guest.Guest(run.source, tmp_path / "wide", out=tmp_path)
