"""Profiles: the shipped ones are good, and every mistake in one is an error that names the key, before anything else
happens."""

import copy

import pytest
import yaml

from masksae import load_profile
from masksae.errors import ConfigError
from masksae.files import PROFILES, read_json, repository
from masksae.study.profile import RESERVED, Profile
from masksae.study.report import preregistration

RESULTS = repository() / "results"
SMOKE = yaml.safe_load((PROFILES / "smoke.yaml").read_text())


def written(folder, edit=lambda profile: None, name="mine"):
    profile = copy.deepcopy(SMOKE) | {"name": name}
    edit(profile)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_good(name):
    profile = load_profile(name)
    assert profile.name == name and profile.arms[0].p == 0 and {grid.name for grid in profile.saes}
    assert load_profile(PROFILES / f"{name}.yaml") == profile


@pytest.mark.parametrize("name", SHIPPED)
def test_dead_latents_can_be_revived_in_every_shipped_profile(name):
    """Of every grid and arm: a latent counts as dead long before the last step, and every snapshot's recipe can be
    made."""
    profile = load_profile(name)
    text, training = profile.text, profile.training
    kept = text.train_tokens * (text.block_length - 1) // text.block_length
    revived = 0
    for member in profile.members:
        steps = training.epochs * int(member.arm.tokens * kept) // training.batch_size
        recipe = training.config(steps)
        for n in recipe.snapshot_steps:
            assert recipe.branch(n).threshold_start < n
        aux = member.config(64).aux
        assert (aux is not None) == ("topk" in member.grid.selection.rule)
        if aux is not None:
            assert aux.dead_after(steps * training.batch_size) <= steps * training.batch_size / 10
            revived += 1
    assert revived


def test_a_users_copy_is_read(tmp_path):
    profile = load_profile(written(tmp_path))
    assert profile.name == "mine" and profile.saes == load_profile("smoke").saes


def put(*keys, value):
    def edit(profile):
        for key in keys[:-1]:
            profile = profile[key]
        profile[keys[-1]] = value

    return edit


ENDPOINT = {"name": "mine", "claim": "C1", "direction": -1, "margin": 0.03, "items": "fixed"}
MISTAKES = {
    "unknown key": (put("text", "block_lenght", value=9), "text.block_lenght", "Did you mean 'block_length'"),
    "unknown section": (put("trainning", value={}), "trainning", "Did you mean 'training'"),
    "missing key": (lambda p: p["model"].pop("block"), "model.block", "missing"),
    "wrong type": (put("training", "lr", value="fast"), "training.lr", "'fast'"),
    "fraction of a pair": (put("blocks", 0, "pairs", value=[0.5]), "blocks.0.pairs.0", "0.5"),
    "pairs that share a draw": (put("blocks", 0, "pairs", value=[3, 3]), "blocks.main.pairs", "twice", "share a draw"),
    "an arm that is not there": (put("blocks", 0, "arms", value=["keep"]), "blocks.main.arms", "Did you mean 'kept'"),
    "a grid that is not there": (put("blocks", 0, "saes", value=["topk"]), "blocks.main.saes", "Did you mean 'topk20'"),
    "a masked SAE without a partner": (
        put("blocks", 0, "arms", value=["kept"]),
        "kept-topk20-s100 has no unmasked SAE",
        "Add the arm unmasked",
    ),
    "a pair without a partner": (
        put("blocks", -1, "pairs", value=[7]),
        "dropped-topk20-s7 is compared with unmasked-topk20",
        "no pair 7",
    ),
    "no block that decides": (put("blocks", 0, "skipped", value=True), "blocks.main.skipped", "first block decides"),
    "a frozen decoder decides": (
        put("saes", 0, "frozen_decoder", value=True),
        "saes.topk20.frozen_decoder",
        "Put another one first",
    ),
    "a score that is none": (
        put("decisions", "endpoints", value=[ENDPOINT | {"score": "mean_ful"}]),
        "decisions.endpoints.0.score",
        "'mean_ful'",
        "Did you mean 'mean_full'",
    ),
    "a number of latents that is not taken": (
        put("decisions", "endpoints", value=[ENDPOINT | {"score": "probing_auc_7"}]),
        "decisions.endpoints.mine.score",
        "'probing_auc_7'",
        "Name one of them, or 'probing_auc_'",
    ),
    "a grid against nothing": (
        put("saes", -1, "against", value="topk21"),
        "saes.frozen20.against",
        "Did you mean 'topk20'",
    ),
    "an unknown penalty": (
        put("saes", 3, "penalties", value=[{"penalty": "ortosae"}]),
        "saes.3.penalties.0",
        "'ortsae'",
    ),
    "a penalty's unknown key": (
        put("saes", 3, "penalties", value=[{"penalty": "ortsae", "evry": 8}]),
        "saes.3.penalties.0",
        "Did you mean 'every'",
    ),
    "a variant that is no profile": (
        put("variants", value=[{"name": "a", "changes": {"training": {"lr": -1}}}]),
        "variant a of mine cannot be used",
        "training.lr",
    ),
    "p above 1": (put("arms", 1, "p", value=1.5), "arms.1.p", "1.5"),
    "baseline is masked": (put("arms", 0, "p", value=0.1), "arms", "first arm"),
    "names twice": (put("arms", 1, "name", value="unmasked"), "arms", "names must differ"),
    "misspelt selection rule": (put("saes", 0, "selection", "rule", value="batchtopk"), "rule", "'batch_topk'"),
    "k above n_latents": (put("saes", 0, "selection", "k", value=2000), "saes.0", "n_latents = 1024"),
    "prefixes that do not sum to 1": (put("saes", 0, "prefixes", value=[0.5, 0.25]), "saes.0", "sum 0.75"),
    "a prefix without a latent": (put("saes", 0, "prefixes", value=[0.0001, 0.9999]), "saes.0", "empty group"),
    "no pair": (put("blocks", 0, "pairs", value=[]), "blocks.0.pairs", "at least 1"),
    "no text": (put("text", "sources", value=[]), "text.sources", "at least 1"),
    "less text than a batch": (put("text", "train_tokens", value=500), "text.train_tokens (500)", "batch_size (1024)"),
    "negative block": (put("model", "block", value=-1), "model.block", "-1"),
    "an integer key": (put(7, value=1), "7", "Keys should be strings"),
    "an integer key inside": (put("text", 7, value=1), "text", "Keys should be strings"),
    "an infinite number": (put("training", "lr", value=float("inf")), "training.lr", "finite"),
    "no number": (put("training", "lr", value=float("nan")), "training.lr", "finite"),
    "a huge pair": (put("blocks", 0, "pairs", value=[2**40]), "blocks.0.pairs.0", "less than 2147483648"),
    "a name with a slash": (put("name", value="a/b"), "mine.yaml", "NAME.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_key(tmp_path, mistake):
    edit, *words = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        load_profile(written(tmp_path, edit))
    for word in [*words, "mine.yaml"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "edit, words",
    [
        (put("blocks", 0, "arms", value=["unmasked", "dropped"]), ["blocks.", "topk20", "['kept']", "decisions.arm"]),
        (
            lambda p: p.update(arms=p["arms"][:1], blocks=[{"pairs": [0]}], decisions={}),
            ["'unmasked' alone", "Add a second"],
        ),
    ],
)
def test_claims_need_saes_of_two_arms_in_the_grid_that_decides(tmp_path, edit, words):
    """Asked in notebook 01, before anything is trained; the gate's profile has one arm and no claims."""
    profile = load_profile(written(tmp_path, edit))
    with pytest.raises(ConfigError) as caught:
        profile.treated_arm
    assert all(word in str(caught.value) for word in words)
    assert load_profile("smoke").treated_arm.name == "kept"


def test_several_mistakes_are_told_at_once(tmp_path):
    def edit(profile):
        profile["training"]["lr"] = -1
        profile["text"]["seeed"] = 1

    with pytest.raises(ConfigError) as caught:
        load_profile(written(tmp_path, edit))
    assert "training.lr" in str(caught.value) and "text.seeed" in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="no profile 'smok'. Did you mean 'smoke'"):
        load_profile("smok")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_profile(bad)
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_profile(bad)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"name: bad\nname: bad\n", "the key 'name' stands here twice"),
        (b"name: bad\ntext: {seed: 1, seed: 2}\n", "the key 'seed' stands here twice"),
        (b"name: " + 5000 * b"[" + 5000 * b"]", "nested too deep"),
        (b"name: \xff\xfe", "not valid YAML in UTF-8"),
        (b"name: bad\nmodel: 2001-99-99\n", "not valid YAML"),
    ],
)
def test_what_yaml_lets_through_or_dies_of(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="bad.yaml") as caught:
        load_profile(tmp_path / "bad.yaml")
    assert words in str(caught.value) and len(str(caught.value)) < 500


def test_a_mistake_is_quoted_in_a_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_profile(written(tmp_path, put("training", "lr", value="x" * 10_000)))
    assert "training.lr" in str(caught.value) and len(str(caught.value)) < 500


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = written(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_profile(path).name == "mine"


@pytest.mark.parametrize("name", RESERVED)
def test_folders_of_the_project_are_no_profiles_name(tmp_path, name):
    with pytest.raises(ConfigError, match=f"name: '{name}' is a folder of the project's own"):
        load_profile(written(tmp_path, name=name))


def test_sizes_that_are_left_out_follow_the_training_text(tmp_path):
    def edit(profile):
        profile["text"] = {"sources": ["mine.txt"], "train_tokens": 60_000}
        profile["contexts"] = {}

    profile = load_profile(written(tmp_path, edit))
    held_out, contexts = profile.text.held_out_tokens, profile.contexts.tokens
    assert (held_out, contexts) == (7_500, 20_000) and not profile.shipped
    share = profile.text.held_out_share
    text = max(60_000 / (1 - share), (held_out + contexts) / share)  # what fills both sides
    assert 60_000 + held_out + contexts < text < 100_000
    again = Profile.model_validate(profile.model_dump(mode="json"))
    assert again == profile
    assert load_profile("laptop").text.held_out_share == 0.05 and load_profile("laptop").shipped


def test_a_skipped_block_has_no_saes_and_what_was_decided_stays(tmp_path):
    whole = load_profile(written(tmp_path))
    less = load_profile(written(tmp_path, put("blocks", -1, "skipped", value=True)))
    assert {part.block.name for part in whole.parts} - {part.block.name for part in less.parts} == {"controls"}
    assert {member.arm.name for member in less.members} == {"unmasked", "kept"} and len(less.members) == 10
    assert preregistration.digest(less) == preregistration.digest(whole)
    assert "skipped" in str(less.model_dump()) and "skipped" not in str(whole.model_dump())


def test_shares_are_the_arms_that_change_nothing_but_p():
    assert load_profile("laptop").shares == {"kept": 0.3}
    assert load_profile("overnight").shares == {"p10": 0.1, "kept": 0.3, "p50": 0.5}


def test_nobody_writes_into_the_folders_of_another_profile(tmp_path):
    for ending in ("yaml", "yml"):
        with pytest.raises(ConfigError, match=f"laptop.{ending}.*no shipped profile has"):
            load_profile(written(tmp_path, name="laptop").rename(tmp_path / f"laptop.{ending}"))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(SMOKE))
    with pytest.raises(ConfigError, match="named 'smoke'"):
        load_profile(tmp_path / "other.yaml")


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/matched.json")), ids=lambda file: file.parent.name)
def test_what_was_searched_for_stands_in_the_profile(file):
    """`masksae match` finds the k and the noise of an arm on a pilot pair, which no block may use."""
    profile = load_profile(file.parent.name)
    for row in read_json(file):
        value, reached = row["trials"][-1]["at"], row["trials"][-1]["measured"]
        assert reached == pytest.approx(row["wanted"], rel=0.021)
        if row["what"] == "k":
            [grid] = [g for g in profile.saes if g.against == row["grid"] and g.clean_l0 == row["wanted"]]
            assert grid.selection.k == pytest.approx(value, abs=0.006)
        else:
            [arm] = [a for a in profile.arms if a.name == row["arm"]]
            assert arm.noise == pytest.approx(value, abs=0.0006)
        assert all(row["pilot"] not in block.pairs for block in profile.blocks)
