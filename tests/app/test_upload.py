"""The folder for the hub: SAEs that come back as they were, a card whose numbers are the results', a push that fails
with its reason."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_project import profile

from masksae import Run, load_saelens
from masksae.app import cli, upload
from masksae.errors import ConfigError, SourceError
from masksae.study.sections import Arm
from masksae.tracing import hook_point


@pytest.fixture
def run(project):
    run = Run(profile(project))
    run.saes
    rows = [
        {"grid": "plain", "arm": arm, "mode": mode, "seed": s, "l0": 3.0, "ev_centred": 0.5 + s / 10, "ce_score": 0.25}
        for arm in ("unmasked", "masked")
        for mode in ("as_trained", "matched")
        for s in (0, 1)
    ]
    run.save_result("reconstruction", rows)
    return run


def test_the_folder_holds_every_sae_as_it_is(run):
    folder = upload.build(run)
    for name, sae in run.saes.items():
        assert torch.equal(load_saelens(folder / name).W_dec, sae.W_dec)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == len(run.table)


def test_bos_is_prepended_only_where_the_profile_does(run, project):
    for source, prepended in (run.source, True), (profile(project, "bare", model={"bos_token": None}), False):
        [*_, part] = Run(source).parts
        [folder, *_] = upload._export(Run(source), part, project / f"{prepended}")
        told = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert told["prepend_bos"] is prepended and load_saelens(folder).origin["prepend_bos"] is prepended


def test_the_hook_is_that_of_the_model_as_it_is_loaded(run):
    """Of a model that also sees pictures, blocks lie elsewhere than in its text model alone."""
    from test_families import FAMILIES, tiny

    with_pictures = tiny(FAMILIES["gemma3"])
    run.language_model = replace(run.language_model, model=with_pictures)
    [*_, folder] = sorted(path for path in upload.build(run).iterdir() if path.is_dir())
    told = json.loads((folder / "cfg.json").read_text())["metadata"]["transformers_hook"]
    assert told == hook_point(with_pictures, 1) and "language_model" in told


def test_the_card_says_what_the_run_was(run):
    text = upload.card(run)
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "saelens", "tags": ["saelens", "sparse-autoencoder", "masked-regularization"]}
    assert "* `masked`: 30% of the input tokens replaced by `<mask>`" in text and "* `unmasked`: no masking" in text
    assert "| plain | masked | 2 | 3.000 | 0.550 | 0.250 |" in text and "6,400 tokens an arm" in text
    assert "a test. Trained by" in text and "32 latents; the same for all arms" in text
    run.profile = run.profile.model_copy(update={"description": ""})
    assert "\n\nTrained by" in upload.card(run)
    (run.results / "reconstruction.json").unlink()
    assert "No scores were taken." in upload.card(run)


@pytest.mark.parametrize(
    "arm, told",
    [
        ({"p": 0.3, "token": "random"}, "30% of the input tokens replaced by random tokens drawn from the text"),
        ({"p": 0.125, "token": "rare"}, "12.5% of the input tokens replaced by the rarest token of the text"),
        ({"p": 0.0, "tokens": 0.7}, "no masking, 70% of the text"),
        ({"p": 0.0, "noise": 0.5}, "no masking, Gaussian noise of 0.5 on the activations"),
        (
            {"p": 0.3, "denoise": True, "fresh_masks": True},
            "30% of the input tokens replaced by `<mask>`, masks drawn anew in every epoch, those positions left out, "
            "trained to give the activation of the clean text (denoising)",
        ),
    ],
)
def test_the_card_says_what_an_arm_is(arm, told):
    assert upload._arm(Arm(name="a", **arm), "<mask>") == told


def test_pushing(run, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **options: pushed.append((name, options["private"]))
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **options: pushed.append(sorted(p.name for p in options["folder_path"].iterdir())) or "address",
    )
    assert upload.upload(run, "someone/saes") == "address"
    assert pushed[0] == ("someone/saes", True) and "README.md" in pushed[1] and "masked-plain-s0" in pushed[1]
    with pytest.raises(ConfigError, match="owner/name, found 'saes'"):
        upload.upload(run, "saes")

    def refused(*_, **__):
        raise OSError("no route\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refused)
    with pytest.raises(SourceError, match=r"hub is built, but could not be pushed to a/b: no route\. Check"):
        upload.upload(run, "a/b")


def test_the_command(run, capsys):
    assert cli.main(["share", run.source]) == 0
    assert "build/tiny/hub" in capsys.readouterr().out


def test_what_is_not_trained_is_trained_to_be_shared(new_project):
    run = Run(profile(new_project))
    folder = upload.build(run)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {member.name for member in run.profile.members}
