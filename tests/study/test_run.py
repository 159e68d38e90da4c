"""The whole road on a tiny local model: text to scores, made once, resumed, kept apart by profile, refused early."""

import pytest
import torch
from tiny_project import profile

from masksae import SAE, Run
from masksae.errors import ConfigError, DataError
from masksae.files import read_json
from masksae.study import run
from masksae.study.scores import reconstruction


def test_from_text_to_scores(new_project):
    run = Run(profile(new_project))
    saes = run.saes
    assert [row["sae"] for row in run.table] == list(saes) and len(saes) == 6
    assert list(saes)[0] == "unmasked-plain-s0" and (run.build / "saes/masked/masked-matryoshka-s0").is_dir()
    rows = reconstruction.reconstruction_scores(run)
    assert len(rows) == 12
    for row in rows:
        assert row["ev_centred"] > 0 and row["ce_zero"] > 0
        if row["mode"] == "matched":
            assert row["l0"] == pytest.approx(row["k"], abs=0.01)
    assert rows[0]["ce_original"] == rows[-1]["ce_original"]
    unmasked, masked = ([r for r in rows if r["arm"] == arm] for arm in ("unmasked", "masked"))
    assert [r["seed"] for r in unmasked] == [r["seed"] for r in masked]
    assert any(a["ev_centred"] != b["ev_centred"] for a, b in zip(unmasked, masked))


def test_the_masked_arm_is_trained_on_what_the_model_makes_of_masked_text(project):
    run = Run(profile(project))
    arm = run.profile.arms[1]
    x, is_masked = run.stream(arm)._load(0)
    ids, where = run.corrupt(arm, run.ids("train"))
    assert 0.25 < is_masked.double().mean() < 0.35 and torch.equal(is_masked, where[:, 1:].flatten()[: len(x)])
    assert (ids[:, 0] == run.bos_id).all() and (ids[where] == run.replacement(arm)["token_id"]).all()
    expected = run.activations(ids[: len(x) // 31])
    torch.testing.assert_close(x.float(), expected, rtol=1e-2, atol=1e-2)


def test_what_is_finished_is_read_back_and_what_is_missing_is_made(new_project, monkeypatch):
    path = profile(new_project)
    before = {name: sae.W_dec.clone() for name, sae in Run(path).saes.items()}
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
        again = Run(path)
        assert all(torch.equal(again.saes[name].W_dec, w) for name, w in before.items())
        assert all(torch.equal(again.load_saes()[name].W_dec, w) for name, w in before.items())
    for group in again.groups(again.arms):
        left = {p.name for p in again.folder_of(group).iterdir()}
        assert left == {"saes", ".lock", "log.jsonl"}  # the checkpoint is gone once the SAEs are there
    monkeypatch.setenv("MASKSAE_CACHE", str(new_project / "other"))
    assert all(torch.equal(sae.W_dec, before[name]) for name, sae in Run(path).saes.items())


def test_scores_are_made_once(project, monkeypatch):
    run = Run(profile(project))
    run.saes
    rows = reconstruction.reconstruction_scores(run)
    monkeypatch.setattr(reconstruction, "_reconstruction_scores", lambda _: pytest.fail("scored again"))
    assert reconstruction.reconstruction_scores(Run(project / "tiny.yaml")) == rows


def test_an_arm_may_be_renamed(project):
    first = Run(profile(project))
    rows = first.saes and reconstruction.reconstruction_scores(first)
    arms = [{"name": "clean", "p": 0.0}, {"name": "corrupted", "p": 0.3}]
    second = Run(profile(project, "renamed", arms=arms))
    assert [name.split("-")[0] for name in second.saes] == 3 * ["clean"] + 3 * ["corrupted"]
    renamed = reconstruction.reconstruction_scores(second)
    assert [r["arm"] for r in renamed] == [{"unmasked": "clean", "masked": "corrupted"}[r["arm"]] for r in rows]
    assert [r["ev_centred"] for r in renamed] == [r["ev_centred"] for r in rows]


def test_profiles_do_not_touch_each_other(project):
    first, second = Run(profile(project)), Run(profile(project, "other", training={"lr": 1e-3}))
    first.saes, second.saes
    assert first.build != second.build and first.results != second.results and first.figures != second.figures
    a, b = (SAE.load(run.build / "saes/masked/masked-plain-s0") for run in (first, second))
    assert not torch.equal(a.W_dec, b.W_dec)


def test_results_travel_through_files(project):
    run = Run(profile(project))
    run.save_result("facts", {"x": 1})
    assert Run(project / "tiny.yaml").result("facts") == {"x": 1} == read_json(project / "results/tiny/facts.json")
    with pytest.raises(DataError, match=r"claims.json is missing. Run notebook 09_paper .* run 09_paper"):
        run.result("claims")
    with pytest.raises(DataError, match="Run notebook 02_train"):
        run.load_saes()


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"model": {"block": 3}}, ConfigError, "block 3 is outside LlamaForCausalLM, whose blocks are numbered 0 to 2"),
        ({"model": {"mask_token": "<msk>"}}, ConfigError, "'<msk>' is not a token of this model"),
        ({"model": {"source": "no/such"}}, ConfigError, "neither a known name"),
        ({"text": {"block_length": 900}}, DataError, "fills a block of 900 tokens"),
        ({"text": {"train_tokens": 10**6}}, DataError, "ran out"),
        ({"text": {"sources": ["nowhere.txt"]}}, ConfigError, "'nowhere.txt' is neither"),
        ({"training": {"warmup": 500}}, ConfigError, "warmup (500)"),
    ],
)
def test_refused_before_the_long_work(project, monkeypatch, changes, error, words):
    import masksae.training.group

    monkeypatch.setattr(masksae.training.group.Group, "run", lambda *_: pytest.fail("training began"))
    with pytest.raises(error) as caught:
        Run(profile(project, **changes)).saes
    assert words in str(caught.value)


def test_an_empty_corpus(project):
    (project / "text.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="hold no document"):
        Run(profile(project)).saes


def test_read_only_output_folder(new_project, as_nobody):
    path = profile(new_project)
    new_project.chmod(0o555)
    name, message = as_nobody(lambda: Run(path))
    new_project.chmod(0o755)
    assert name == "OutputError" and "results" in message


def test_a_changed_arm_changes_only_what_depends_on_it(project):
    ablations = [{"name": "dropped", "p": 0.3, "drop_masked": True}]
    before = Run(profile(project, ablations=ablations))
    arms = [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.2}]
    after = Run(profile(project, "changed", ablations=ablations, arms=arms))
    same = [a.name for a, b in zip(before.arms, after.arms) if before.ids_of([a]) == after.ids_of([b])]
    assert same == ["unmasked", "dropped"]
    assert before.stream_id(before.arms[1]) != after.stream_id(after.arms[1])


def test_saes_of_another_configuration_are_not_taken_for_this_ones(project):
    run = Run(profile(project))
    run.saes
    run.load_saes()
    with pytest.raises(
        DataError,
        match="unmasked was made of another configuration, other files or by other code. Run notebook 02_train",
    ):
        Run(profile(project, training={"lr": 1e-3})).load_saes()
    text = project / "text.jsonl"
    text.write_text(text.read_text().replace("the", "thy"))
    with pytest.raises(DataError, match="was made of another configuration"):
        Run(profile(project)).load_saes()


def test_every_kind_of_replacement(project):
    ablations = [
        {"name": "rare", "p": 0.3, "token": "rare"},
        {"name": "random", "p": 0.3, "token": "random"},
        {"name": "letter", "p": 0.3, "token": "e"},
        {"name": "denoising", "p": 0.3, "denoise": True, "seeds": [0]},
    ]
    run = Run(profile(project, ablations=ablations))
    _, masked, rare, random, letter, denoising = run.arms
    text = run.ids("train")
    counts = text[:, 1:].flatten().bincount()
    token = run.replacement(rare)["token_id"]
    assert counts[token] == counts[counts > 0].min() and token != run.bos_id
    shown, where = run.corrupt(random, text)
    assert len(shown[where].unique()) > 10 and torch.equal(where, run.corrupt(masked, text)[1])
    assert run.replacement(letter)["token_id"] != run.replacement(masked)["token_id"]
    x, is_masked, clean = next(run.stream(denoising).batches([(0, True)]))[0]
    assert not is_masked.any() and not torch.equal(x, clean)
    [group] = run.groups([denoising])
    run.train_group(group)
    assert SAE.load(run.folder_of(group) / "saes/denoising-plain-s0").config.drop_masked
