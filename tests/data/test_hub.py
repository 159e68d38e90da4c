"""Through the real clients of the hub from a fake one that fails: streaming loses and repeats no token, and names a
shard in trouble; of a folder with an SAE nothing is fetched but that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from masksae import SAE, BatchTopK, SAEConfig

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ["502", "time-out", "cut", "short", "garbage"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each scenario of `fake_hub.main` ended with: a hash of the tokens, or an error."""
    command = [sys.executable, ROOT / "tests/support/fake_hub.py", tmp_path_factory.mktemp("hub")]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {item["name"]: item for item in found}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_lose_and_repeat_nothing(outcomes, fault):
    whole = outcomes["undisturbed"]
    assert len(whole["outcome"]) == 64
    assert outcomes[fault]["outcome"] == whole["outcome"]
    assert outcomes[fault]["requests"] > whole["requests"]  # the fault was met


def test_a_shard_that_stays_cut_short_ends_the_run_with_its_name(outcomes):
    message = outcomes["truncated"]["outcome"]
    assert (
        "train/01.jsonl.zst, row 0 cannot be read after 5 attempts" in message
        and "kept; the next run goes on" in message
    )


def test_the_next_run_goes_on_after_the_last_part(outcomes):
    assert outcomes["mended"]["outcome"] == outcomes["undisturbed"]["outcome"]
    assert outcomes["truncated"]["parts"] > 3


def test_a_shard_that_is_gone_is_named_at_once(outcomes):
    assert "train/00.jsonl.zst, row 0 is missing or out of reach" in outcomes["gone"]["outcome"]
    assert outcomes["gone"]["requests"] == 1


def test_shards_that_are_missing_or_changed_between_runs_are_named(outcomes):
    assert "shards 1 missing: " in outcomes["missing"]["outcome"] and "01.jsonl.zst" in outcomes["missing"]["outcome"]
    assert "shards 1 changed: " in outcomes["changed"]["outcome"] and "01.jsonl.zst" in outcomes["changed"]["outcome"]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """What came of each address of `fake_hub.saes`: SAEs in four forms, with files beside them that nobody needs."""
    scratch = tmp_path_factory.mktemp("saes")
    files, sae = scratch / "files", SAE(SAEConfig(8, 32, BatchTopK(2))).requires_grad_(False)
    sae.threshold.fill_(0.25)
    sae.to_saelens(files / "lens", model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    (files / "layers.3").mkdir()
    (files / "layers.3/cfg.json").write_text(json.dumps({"d_in": 8, "num_latents": 32, "k": 2}))
    (files / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-14m"}))
    tensors = {"encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc}
    save_file(tensors | {"W_dec": sae.W_dec.data, "b_dec": sae.b_dec}, files / "layers.3/sae.safetensors")
    scope = files / "gemma-scope-2b-pt-res/layer_1"
    scope.mkdir(parents=True)
    arrays = {name: getattr(sae, name).numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    np.savez(scope / "params.npz", threshold=np.full(32, 0.25, np.float32), **arrays)
    for folder in (files / "lens", files / "layers.3", scope):
        (folder / "optimizer.pt").write_bytes(bytes(1000))
    command = [sys.executable, ROOT / "tests/support/fake_hub.py", scratch, "saes"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return sae.W_dec.sum().item(), [json.loads(line) for line in result.stdout.splitlines()]


def test_an_sae_of_the_hub_is_fetched_alone_and_once(fetched):
    total, [lens, layer, same_commit, scope, again, *_] = fetched
    for item, rule in ((lens, "BatchTopK"), (layer, "TopK"), (same_commit, "TopK"), (scope, "JumpReLU")):
        assert item["outcome"]["config"]["selection"]["rule"] == rule, item
        assert item["outcome"]["sum"] == pytest.approx(total, abs=1e-3)
    assert {*lens["asked"]} == {"config.json", "lens/cfg.json", "lens/sae_weights.safetensors"}
    assert {*layer["asked"]} == {"layers.3/cfg.json", "layers.3/sae.safetensors"}
    assert [*scope["asked"]] == ["gemma-scope-2b-pt-res/layer_1/params.npz"] and not again["asked"]
    assert lens["outcome"]["origin"] == {
        "model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "prepend_bos": True,
    }  # fmt: skip
    assert layer["outcome"]["origin"] == {"model_name": "EleutherAI/pythia-14m", "hook_name": "layers.3"}
    assert scope["outcome"]["origin"]["hook_name"] == "blocks.1.hook_resid_post"


def test_what_the_hub_does_not_have_is_named(fetched):
    nothing, root, other, short, revision = (item["outcome"] for item in fetched[1][-5:])
    assert "SourceError: hub:someone/pile/nothing has none of sae_weights.safetensors" in nothing
    assert "SourceError" in root and "Name the folder of one SAE" in root
    assert "hub:someone/else/lens cannot be fetched (RepositoryNotFoundError" in other and "HF_TOKEN" in other
    assert "ConfigError: hub:someone names no repository. Expected hub:owner/name" in short
    assert "hub:someone/pile/lens@nowhere cannot be fetched" in revision


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_machine_that_is_offline_on_purpose_is_told_at_once(variable):
    code = (
        "from masksae.data import hub\nhub.time.sleep = None\n"
        "for look in (lambda: hub.shards('owner/name'), lambda: hub.unchanged([dict(url='hf://datasets/owner/name/a', "
        "form='json', size=1, version='')])):\n"
        "    try: look()\n    except hub.SourceError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {variable: "1"}
    )
    told = result.stdout.splitlines()
    assert len(told) == 2 and all("HF_HUB_OFFLINE" in line and "Unset it" in line for line in told), result
    assert "owner/name" in told[0] and result.stderr == ""
