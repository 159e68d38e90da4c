"""Somebody's own SAE: read in three forms, scored like a run's own, in a run's place."""

import html
import json
import re

import pytest
import torch
from tiny_project import profile

import masksae
from masksae import SAE, BatchTopK, JumpReLU, SAEConfig, TopK
from masksae.errors import ConfigError, MasksaeError
from masksae.study import own_sae
from masksae.study.report import own_sae as report
from masksae.study.report import remarks, saebench
from masksae.study.scores import reconstruction


def test_three_forms_are_told_apart(run, tmp_path):
    sae = run.saes["masked-matryoshka-s0"]
    for name, write in {"a": sae.to_saelens, "b": sae.to_dictionary_learning, "c": sae.save}.items():
        write(tmp_path / name)
        assert torch.equal(masksae.load_sae(tmp_path / name).W_dec, sae.W_dec)
    with pytest.raises(ConfigError, match="holds none of sae_weights.safetensors, ae.pt, .*sae.safetensors"):
        masksae.load_sae(tmp_path)


def test_a_guest_scores_what_the_run_scores(run, folder, tmp_path):
    rows = run.scored(reconstruction.reconstruction_scores)
    own = {row["mode"]: row for row in rows if row["sae"] == "unmasked-plain-s0"}
    visitor = own_sae.OwnSAE(run.source, folder, out=tmp_path / "out")
    found = {row["mode"]: row for row in own_sae.evaluate(visitor, ["reconstruction"])["reconstruction"]}
    for mode in ("as_trained", "matched"):
        for score in ("ev_centred", "l0", "ce_score", "dead_latents"):
            assert found[mode][score] == pytest.approx(own[mode][score], rel=1e-5), (mode, score)
    assert found["matched"]["k"] == 3 and json.loads((tmp_path / "out/reconstruction.json").read_text())
    [file, _] = saebench.write_scores(visitor, {"reconstruction": list(found.values())}, tmp_path / "saebench")
    assert json.loads(file.read_text())["eval_type_id"] == "core"
    other = own_sae.OwnSAE(run.source, folder, out=tmp_path / "out", l0=5.0)
    assert own_sae.evaluate(other, ["reconstruction"])["reconstruction"][1]["l0"] == pytest.approx(5.0, rel=0.05)


def test_a_guest_in_half_precision_scores_alike(run, folder, tmp_path):
    own = own_sae.evaluate(own_sae.OwnSAE(run.source, folder, out=tmp_path / "a"), ["reconstruction"])["reconstruction"]
    half = run.saes["unmasked-plain-s0"].bfloat16().to_saelens(tmp_path / "half")
    found = own_sae.evaluate(own_sae.OwnSAE(run.source, half, out=tmp_path / "b"), ["reconstruction"])["reconstruction"]
    for ours, theirs in zip(own, found, strict=True):
        for score in ("ev_centred", "l0", "ce_sae"):
            assert theirs[score] == pytest.approx(ours[score], rel=0.02), score


def test_an_sae_without_a_k_of_its_own_is_matched_at_the_l0_it_has(run, folder, tmp_path):
    record = json.loads((folder / "cfg.json").read_text())
    for key in ("masksae", "training_architecture"):  # as SAELens before 6 wrote it
        del record["metadata"][key]
    (folder / "cfg.json").write_text(json.dumps(record))
    visitor = own_sae.OwnSAE(run.source, folder, out=tmp_path / "out")
    rows = own_sae.evaluate(visitor, ["reconstruction"])["reconstruction"]
    assert rows[0]["l0"] == pytest.approx(rows[1]["l0"], rel=0.02) and rows[0]["k"] == pytest.approx(
        rows[0]["l0"], abs=0.1
    )


def untrained(project, name, rule):
    """The profile and a random SAE for it: what needs no training."""
    SAE(SAEConfig(16, 32, rule)).save(project / name)
    return profile(project), project / name


def test_an_l0_that_no_sae_has_is_refused_at_once(project, tmp_path):
    mine = untrained(project, "mine", BatchTopK(3))
    for l0 in (-3.0, 0.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ConfigError, match=r"l0 is .*, expected a number above 0, up to the 32 latents"):
            own_sae.OwnSAE(*mine, out=tmp_path / "out", l0=l0)
    topk = untrained(project, "topk", TopK(3))
    with pytest.raises(ConfigError, match="l0 is 5.0, and this SAE keeps its k = 3"):
        own_sae.OwnSAE(*topk, out=tmp_path / "out", l0=5.0)
    assert own_sae.OwnSAE(*topk, out=tmp_path / "out", l0=3.0).k == 3


def test_an_l0_out_of_reach_is_told_with_the_one_within(project, tmp_path, capsys):
    mine = untrained(project, "mine", BatchTopK(3))
    with pytest.raises(ConfigError, match="l0 is 31.9, and no threshold .* L0 31.9 .*the nearest is") as found:
        own_sae.evaluate(own_sae.OwnSAE(*mine, out=tmp_path / "out", l0=31.9), ["reconstruction"])
    most = float(str(found.value).split("nearest is ")[1].split(". ")[0])
    again = own_sae.OwnSAE(*mine, out=tmp_path / "out", l0=0.9 * most)
    again.check_reach()
    row = own_sae.evaluate(again, ["reconstruction"])["reconstruction"][1]
    assert 3 < most < 31 and row["l0"] == pytest.approx(0.9 * most, rel=0.01)
    assert capsys.readouterr().err.count("no threshold") == 0
    own_sae.OwnSAE(*untrained(project, "greedy", BatchTopK(30)), out=tmp_path / "out").check_reach()
    assert "no threshold of this SAE gives L0 30 on the clean text; the nearest is" in capsys.readouterr().err


def test_a_metric_that_fails_leaves_the_others(project, tmp_path, capsys):
    """Fifty words are too few for the first-letter task."""
    visitor = own_sae.OwnSAE(*untrained(project, "mine", BatchTopK(3)), out=tmp_path / "out")
    found = own_sae.evaluate(visitor, ["reconstruction", "absorption"])
    why = own_sae.failed(found)["absorption"]
    assert list(own_sae.failed(found)) == ["absorption"] and found["reconstruction"][0]["ev_centred"]
    assert json.loads((tmp_path / "out/absorption.json").read_text()) == [{"sae": visitor.name, "failed": why}]
    assert f"masksae: absorption cannot be taken: {why}" in capsys.readouterr().err
    page = report.write(visitor, found).read_text()
    assert "absorption: could not be taken" in page and html.escape(why) in page
    assert dict(report.rows(found))["absorption: could not be taken"] == {"failed": why}
    assert {path.parent.name for path in saebench.write_scores(visitor, found, tmp_path / "saebench")} == {"core"}
    with pytest.raises(MasksaeError, match=re.escape(why)):
        own_sae.evaluate(visitor, ["absorption"])


@pytest.mark.parametrize(
    "named, refused",
    [
        ({"model_name": "HuggingFaceTB/SmolLM2-135M", "hook_name": "blocks.1.hook_resid_post"}, True),
        ({"model_name": "owner/model", "hook_name": "blocks.1.hook_resid_post"}, False),
        ({"hook_name": "model.layers.1"}, False),
        ({"hook_name": "blocks.2.hook_resid_pre"}, False),
        ({"hook_name": "blocks.1.hook_mlp_out"}, True),
        ({"model_name": "model", "hook_name": "model.layers.2"}, True),
        ({}, False),
    ],
)
def test_an_sae_of_another_model_or_hook_point_is_refused(named, refused, project, tmp_path):
    """The profile reads the folder `model` after block 1."""
    SAE(SAEConfig(16, 32, TopK(3))).to_saelens(project / "mine", **named)
    taken = (profile(project), project / "mine")
    if refused:
        words = (
            f"{named.get('model_name', '')}.* at {named['hook_name']}, and the profile tiny reads .*/model at blocks.1"
        )
        with pytest.raises(ConfigError, match=words + ".* --anyway") as found:
            own_sae.OwnSAE(*taken, out=tmp_path / "out")
        assert named["hook_name"] in str(found.value)
    assert own_sae.OwnSAE(*taken, out=tmp_path / "out", anyway=refused).k == 3


def test_an_sae_that_hardly_fires_is_scored_as_trained(project, tmp_path, capsys):
    sae = SAE(SAEConfig(16, 32, JumpReLU(None))).requires_grad_(False)
    sae.thresholds.fill_(1e6)
    sae.save(project / "mute")
    visitor = own_sae.OwnSAE(profile(project), project / "mute", out=tmp_path / "out")
    [row] = own_sae.evaluate(visitor, ["reconstruction"])["reconstruction"]
    assert (row["mode"], row["l0"], row["k"]) == ("as_trained", 0.0, None) and row["dead_latents"] == 32
    assert "mute is silent: L0 0 on the clean text, and its scores are those as trained" in capsys.readouterr().err
    page = report.write(visitor, {"reconstruction": [row]}).read_text()
    assert "This SAE is silent" in page and saebench.write_scores(visitor, {"reconstruction": [row]}, tmp_path / "sb")


def test_weak_saes_are_told_in_a_sentence():
    good = {"sae": "a", "mode": "matched", "ev_centred": 0.5, "l0": 20.0, "k": 20}
    good |= {"ce_sae": 1.0, "ce_zero": 2.0, "kl_sae": 1.0, "kl_zero": 2.0}
    assert remarks.remarks([good]) == []
    weak, useless, short = remarks.remarks([good, good | {"sae": "b", "ev_centred": -0.1, "ce_sae": 3.0, "l0": 9.0}])
    assert weak.startswith("1 of 2 rows reconstruct no better than the mean") and "text.train_tokens" in weak
    assert "no better than zeros" in useless and "do not reach L0 = k" in short and short.endswith(": b (matched).")


def test_what_cannot_be_scored_is_refused(run, folder, tmp_path):
    with pytest.raises(ConfigError, match="no metric 'absorbtion'.*Did you mean 'absorption'"):
        own_sae.evaluate(own_sae.OwnSAE(run.source, folder, out=tmp_path), ["absorbtion"])
    SAE(SAEConfig(24, 32, BatchTopK(3))).save(tmp_path / "wide")
    with pytest.raises(ConfigError, match="reads width 24, .* has 16"):
        own_sae.OwnSAE(run.source, tmp_path / "wide", out=tmp_path)
