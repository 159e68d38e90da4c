"""The benchmark of a card, run dry: the whole script on the CPU, whose numbers say nothing."""

import json

import gpu
import pytest
import torch

from masksae.app.plan import GPUS
from masksae.training.group import STACKED


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "report.json"
    found = gpu.main(["--dry", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    return found


def test_every_table_is_filled(report):
    assert "dry run" in report["card"] and STACKED == {"cuda"}
    assert [(row["d"], row["members"], row["precision"]) for row in report["steps"]] == [
        (d, m, p) for d in (16, 24) for p in ("float32", "bfloat16") for m in (1, 2)
    ]
    assert len(report["graphs"]) == 10 and all({"graph", "stacked", "alone"} < row.keys() for row in report["graphs"])
    assert [row["dtype"] for row in report["harvest"]] == ["float32", "bfloat16"]
    assert set(report["pair"][0]) == {"forwards alone", "training alone", "in turn", "at once"}
    numbers = [v for name in gpu.PARTS for row in report[name] for v in row.values() if isinstance(v, float)]
    assert min(numbers) > 0 and "shares" not in report


def test_compiled_gradients_are_the_gradients_or_not_timed(report):
    x = torch.randn(32, 16)
    for rule, names in ((gpu.TopK(8), []), (gpu.JumpReLU(8.0), ["thresholds"])):
        assert gpu.lost(gpu.SAEConfig(16, 64, rule, aux=gpu.AuxK(dead_after_tokens=1)), x) == names
    assert [row["architecture"] for row in report["graphs"] if "compiled" not in row] == ["JumpReLU"]


def test_the_last_line_is_a_share_of_the_data_sheet(report, monkeypatch, capsys):
    """A step at a third of what the sheet allows has the share .333; forwards likewise."""
    h100 = GPUS[-1]
    plan = gpu.Plan(gpu.load_profile("gpu"))
    rate = 1e12 * h100.half / plan.forward_flop(plan.prefix, 1) / 2
    config = gpu.SAEConfig(576, 4096, gpu.TopK(20))
    sheet = 2048 * gpu.step_flop(config) / (1e12 * h100.single)
    sheet += gpu.step_traffic(config, 2048) / (1e12 * h100.bandwidth)
    rows = [{"d": 576, "n": 4096, "members": m, "precision": "float32", "ours": 3 * m * sheet} for m in (1, 8)]
    measured = {"steps": rows, "harvest": [{"dtype": "bfloat16", "tokens_per_second": rate}]}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    gpu.shares(measured, torch.device("cuda"))
    assert measured["shares"] == {"H100 SXM": {"activations": 0.5, "training": 0.333}}
    assert "H100 SXM" in (told := capsys.readouterr().out) and "activations 50.0%, training 33.3%" in told


def test_without_a_card_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--dry runs the script on the CPU" in capsys.readouterr().err
