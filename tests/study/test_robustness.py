"""One token replaced in held-out texts of a tiny model: what is compared, what may not change, and rows that add up."""

import pytest
import torch
from tiny_project import profile

from masksae import Run
from masksae.errors import ConfigError
from masksae.metrics.robustness import robustness
from masksae.study.scores import robustness as scores
from masksae.study.sections import Robustness
from masksae.tracing import activations


def test_activations_are_those_after_the_replaced_token(run):
    x = scores.replaced_activations(run)
    assert torch.equal(x["ids"], run.ids("held_out")[:18, :29]) and x["clean"].shape == (18, 15, 16)
    model, rows = run.language_model.model, torch.arange(18)
    assert set((x["positions"] - 1).tolist()) <= set(range(8, 28 - 15)) and len(x["positions"].unique()) > 2
    for kind in scores.KINDS:
        ids = x["ids"].clone()
        ids[rows, x["positions"]] = x[f"{kind}_token"]
        assert (ids != x["ids"]).sum(1).tolist() == [1] * 18
        for i, at in enumerate(x["positions"].tolist()):
            alone = activations(model, ids[i : i + 1], block=1)[0, at + 1 : at + 16]
            torch.testing.assert_close(x[kind][i], alone, rtol=1e-4, atol=1e-5)
    assert (x["mask_token"] == run.language_model.tokenizer.convert_tokens_to_ids("<mask>")).all()
    text = run.ids("train")[:, 1:]
    assert set(x["random_token"].tolist()) <= set(text.unique().tolist())


def test_the_gradient_finds_tokens_that_move_more(run):
    """More than a random token does; and of twenty candidates, tried one by one, never the one that moves least."""
    x = scores.replaced_activations(run)
    unit = (x["clean"] - x["clean"].mean((0, 1))).norm(dim=2)
    moved = {kind: ((x[kind] - x["clean"]).norm(dim=2) / unit).square().sum(1) for kind in ("random", "gradient")}
    assert moved["gradient"].mean() > moved["random"].mean()
    tokens, counts = run.ids("train")[:, 1:].unique(return_counts=True)
    common = tokens[counts.argsort(descending=True, stable=True)[:20]]
    ids = x["ids"].repeat_interleave(20, 0)
    at = x["positions"].repeat_interleave(20)
    ids[torch.arange(360), at] = common.repeat(18)
    window = torch.arange(360)[:, None], at[:, None] + torch.arange(1, 16)
    change = activations(run.language_model.model, ids, block=1)[window] - x["clean"].repeat_interleave(20, 0)
    every = (change.norm(dim=2) / unit.repeat_interleave(20, 0)).square().sum(1).view(18, 20)
    rank = (every > moved["gradient"][:, None] * (1 + 1e-4)).sum(1).float()
    assert rank.mean() < 5 and set(x["gradient_token"].tolist()) <= set(common.tolist())


def test_rows_are_means_over_texts(run):
    rows, x = run.scored(scores.robustness_scores), scores.replaced_activations(run)
    saes = run.saes
    assert {(row["sae"], row["mode"]) for row in rows} == {(n, m) for n in saes for m in ("as_trained", "matched")}
    for row in rows:
        for kind in scores.KINDS:
            clean, changed = x["clean"].flatten(0, 1), x[kind].flatten(0, 1)
            found = robustness(saes[row["sae"]], clean, changed, top=5, threshold=row["threshold"])
            for name in scores.SCORES:
                by_position = getattr(found, name).view(18, 15)
                start = f"robustness_{kind}"
                assert row[f"{start}_near_{name}"] == pytest.approx(by_position[:, :3].mean().item(), rel=1e-5)
                assert row[f"{start}_far_{name}"] == pytest.approx(by_position[:, 3:].mean().item(), rel=1e-5)
                items = [item[f"{start}_far_{name}"] for item in row["texts"]]
                assert sum(items) / len(items) == pytest.approx(row[f"{start}_far_{name}"], rel=1e-9)
        assert [item["text"] for item in row["texts"]] == [str(i) for i in range(18)]
    for kind in scores.KINDS:  # what happened to the activations is the same for all SAEs
        assert len({row[f"robustness_{kind}_near_x"] for row in rows}) == 1


def test_texts_come_in_batches_of_one_size():
    means = scores._means({"a": torch.arange(60.0).double(), "b": torch.ones(60).double()})
    assert means["a"] == 29.5 and [item["a"] for item in means["texts"]] == [1 + 3.0 * i for i in range(20)]


def test_the_same_bytes_twice(run, monkeypatch, tmp_path):
    once = scores.replaced_activations(run)
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "other"))
    again = scores.replaced_activations(Run(run.profile, out=tmp_path))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


def test_a_default_fits_blocks_of_any_length_that_can_be_compared(project):
    defaults = Robustness().model_dump()
    run = Run(profile(project, robustness=defaults))
    assert scores._texts(run).shape == (20, 32)  # BOS and 31 tokens of each of 20 blocks
    run = Run(profile(project, text={"block_length": 24}, robustness=defaults))
    with pytest.raises(ConfigError, match="a text has 23 tokens, .* Raise text.block_length to 25 or more"):
        scores.replaced_activations(run)
