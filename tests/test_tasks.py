"""Labelled texts on a tiny model: the right token, the same rows for all SAEs, means that add up, unusable sets left out by name."""

import random

import pytest
import torch
from test_stages import profile, project  # noqa: F401

from masksae import Run, tasks
from masksae.errors import DataError
from masksae.tracing import activations


def table(path, n=200, seed=0, flipped=False):
    """Texts whose last character tells the class."""
    rng = random.Random(seed)
    lines = ["prompt,target"]
    for i in range(n):
        words = " ".join(rng.choices("the one two three sat on mat ran past".split(), k=rng.randint(1, 6)))
        end = "s" if i % 2 else "t"
        lines.append(f"{words} {seed}{i}{end},{(i + flipped) % 2}")
    path.write_text("\n".join(lines))


@pytest.fixture
def run(project):  # noqa: F811
    table(project / "task.csv")
    table(project / "task_OOD.csv", seed=1)
    return Run(profile(project))


def test_the_activation_is_that_of_the_last_token(run):
    texts = ["the cat sat", "a", "seven dogs ran past it and nobody saw them"]
    x = tasks.last_token_activations(run, texts)
    for text, found in zip(texts, x):
        ids = [run.bos_id, *run.language_model.tokenizer(text, add_special_tokens=False)["input_ids"][-8:]]
        alone = activations(run.language_model.model, torch.tensor([ids]), block=1)[0, -1]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="no token"):
        tasks.last_token_activations(run, ["fine", ""])


def test_rows_of_both_kinds(run):
    saes = run.saes
    for kind, rows in (("probing", tasks.probing_scores(run)), ("ood", tasks.ood_scores(run))):
        assert [(row["sae"], row["mode"]) for row in rows] == [
            (name, mode) for name in saes for mode in ("as_trained", "matched")
        ]
        raw = {row[f"{kind}_raw_auc"] for row in rows}
        assert len(raw) == 1 and raw.pop() > 0.9  # the last character tells the class
        for row in rows:
            for k in (2, 5):
                assert row[f"{kind}_auc_{k}"] == row["tasks"][0]["auc"][str(k)]
                assert row[f"{kind}_gap_{k}"] == pytest.approx(row[f"{kind}_raw_auc"] - row[f"{kind}_auc_{k}"])
            assert row["excluded"] == {}


def test_a_shifted_set_that_raw_activations_cannot_tell_is_left_out(run, project):  # noqa: F811
    table(project / "task_OOD.csv", seed=2, flipped=True)
    run.saes
    with pytest.raises(DataError, match="No task of ood is told from raw activations"):
        tasks.ood_scores(run)


def test_training_rows_are_shared_by_a_task_and_its_shift(run, project):  # noqa: F811
    plain = tasks.task_activations(run, str(project / "task.csv"))
    shifted = tasks.task_activations(run, str(project / "task.csv"), str(project / "task_OOD.csv"))
    assert torch.equal(plain["y_train"], shifted["y_train"]) and len(shifted["x_test"]) == 200
    torch.testing.assert_close(
        plain["x_train"], shifted["x_train"], rtol=1e-5, atol=1e-6
    )  # other batches, other rounding
    assert len(plain["x_train"]) == 40 and plain["y_train"].sum() == 20 and plain["y_test"].float().mean() == 0.5


def test_a_task_with_three_classes_is_refused():
    with pytest.raises(DataError, match=r"found 3: \[0, 1, 2\]"):
        tasks.labels([0, 1, 2])
