"""Plans: counts against PyTorch's own counter and published sizes, no network, refusals with the remedy."""

import re
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_project import profile, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from masksae import SAEConfig, TrainConfig, load_profile
from masksae.app import cli, measure, repro
from masksae.app.plan import GPUS, Plan, step_flop, text
from masksae.data.tasks import Shift
from masksae.errors import ConfigError, SourceError
from masksae.files import cache_dir, read_json
from masksae.saes.sae import SAE
from masksae.study import check, work
from masksae.study.run import Run
from masksae.study.scores import perturbation, probing, reconstruction
from masksae.study.sections import Block, Perturbation, Training
from masksae.training.group import Group
from masksae.training.step import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paper():
    return {name: Plan(load_profile(name)) for name in ("paper", "paper-gemma", "laptop", "gemma")}


@pytest.mark.parametrize(
    "name, parameters",
    [("paper", 162_322_944), ("paper-gemma", 2_614_341_888), ("laptop", 134_515_008), ("gemma", 268_098_176)],
)
def test_shapes_have_the_published_numbers_of_parameters(paper, name, parameters):
    assert sum(p.numel() for p in paper[name].model.parameters()) == parameters


@pytest.mark.parametrize("name", ["paper", "paper-gemma", "laptop", "gemma"])
def test_forward_flop_are_those_that_torch_counts(paper, name):
    plan = paper[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(plan.config, attn_implementation="eager")
        model(input_ids=torch.zeros(2, plan.length, dtype=torch.int64))
    head = 2 * plan.width * plan.config.vocab_size
    ours = plan.forward_flop(plan.config.num_hidden_layers - 1, 2 * plan.length) + 2 * plan.length * head
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.002)


@pytest.mark.parametrize("name", ["paper", "paper-gemma"])
def test_step_flop_are_those_that_torch_counts(paper, name):
    plan = paper[name]
    config, batch = plan.saes[0], 256
    with torch.device("meta"):
        trainer = Trainer(SAE(config), TrainConfig(steps=plan.steps()), "meta")
        x = torch.empty(batch, config.d_model)
    with FlopCounterMode(display=False) as counter:
        trainer.step(x, 2000)
    assert counter.get_total_flops() == pytest.approx(batch * step_flop(config), rel=1e-3)


def test_work_is_that_of_the_specification(paper):
    """Half a billion tokens: .065 EFLOP a forward to block 8 of Pythia and 1.0 EFLOP to block 12 of Gemma for each
    stream, that of the unmasked arm and those of the masked arm's three pairs; 31 MFLOP a token and SAE."""
    harvest, training, _ = paper["paper"].work
    assert harvest.flop / 4 == pytest.approx(0.065e18, rel=0.05)
    assert paper["paper-gemma"].work[0].flop / 4 == pytest.approx(1.0e18, rel=0.05)
    assert training.sae_flop / 24 / 5e8 == pytest.approx(10 * 768 * 4096, rel=0.01)


@pytest.mark.parametrize("name", ["laptop", "overnight"])
def test_steps_are_those_that_were_trained(name):
    """Of the committed results: the last step of every arm's SAEs, and where the snapshots lie."""
    plan = Plan(load_profile(name))
    planned = {member.arm.name: plan.recipe(g).steps for g in plan.groups for member in g.members}
    rows = read_json(ROOT / f"results/{name}/train.json")
    assert {row["arm"]: row["step"] + 1 for row in rows} == planned
    snapshots = {member.name: plan.recipe(g).snapshot_steps for g in plan.groups for member in g.members}
    found: dict = {}
    for row in read_json(ROOT / f"results/{name}/along.json"):
        found.setdefault(row["sae"], set()).add(row["step"])
    assert {sae: {*steps} - {7744, 4644} for sae, steps in found.items()} == {
        sae: {*steps} for sae, steps in snapshots.items() if steps
    }


def test_only_the_snapshots_that_a_block_takes_are_counted():
    """Of the 122 SAEs of overnight 36 have five: 2.85 GB and 6.0 PFLOP, not 6.92 GB and 6.8 PFLOP."""
    plan = Plan(load_profile("overnight"))
    assert plan.disk()["SAEs"] == pytest.approx((122 + 36 * 5) * 4 * 2 * 576 * 2048, rel=0.01)
    branches = 36 * 0.2 * sum(plan.profile.training.snapshots)
    steps = branches + 119 * 7744 + 3 * 5420
    assert plan.work[1].sae_flop == pytest.approx(512 * steps * 10 * 576 * 2048, rel=1e-3)
    none = plan.profile.model_copy(
        update={"blocks": [b.model_copy(update={"snapshots": False}) for b in plan.profile.blocks]}
    )
    most = max(len(part.members) for part in plan.parts)  # of a part without snapshots, fewer than 18 of one with them
    assert plan.scores() - Plan(none).scores() == pytest.approx((18 - most) * 4 * 2 * 576 * 2048, rel=0.01)


def test_without_scratch_every_group_reads_for_itself(paper):
    """The second block that docs/scale.md names: the model reads the text eight times, not four; so does whoever has
    targets of his own read twice."""
    profile = paper["paper"].profile
    others = Block(name="others", saes=["topk20", "jumprelu20"], pairs=[100, 101, 102])
    two = Plan(profile.model_copy(update={"blocks": [*profile.blocks, others]}))
    assert (len(two.groups), two.streams) == (8, 8)
    assert two.work[0].flop == 2 * paper["paper"].work[0].flop
    kept = profile.arms[1].model_copy(update={"denoise": True, "tokens": 0.5})
    targets = Plan(profile.model_copy(update={"arms": [profile.arms[0], kept]}))
    assert targets.streams == 1 + 2 * 3 and targets.work[0].flop == paper["paper"].work[0].flop  # twice half the text


def test_a_plan_is_of_what_is_not_made_yet():
    profile = load_profile("overnight")
    whole, rest, nothing = Plan(profile), Plan(profile, profile.parts[-2:]), Plan(profile, [])
    assert len(rest.saes) == 8 and len(rest.groups) == 4 and rest.streams == 3 == rest.kept_streams + 1
    assert sum(rest.disk().values()) < sum(whole.disk().values()) / 2
    assert sum(nothing.disk().values()) < 3e9 and nothing.work[1].sae_flop == 0 and "fits" in text(nothing, "cpu")


def test_a_run_whose_rows_are_kept_needs_no_training_but_of_what_is_looked_into(project, monkeypatch, capsys):
    """As in a fresh clone with committed rows: no SAE is there, and those of the first pair are trained for notebook
    10."""
    monkeypatch.setattr(check, "SCORES", {"training": work.SCORES["training"]})
    tiny = profile(project, keep_pairs=True)
    run = Run(tiny)
    assert [part.name for part in check.missing(run)] == ["main-s0", "main-s1", "matryoshka-s0"]
    work.work_off(run, ("training",))
    shutil.rmtree(project / "cache/saes")
    planned = []
    with monkeypatch.context() as patch:
        patch.setattr("masksae.app.plan.Plan.check", lambda plan, *_: planned.append([p.name for p in plan.parts]))
        repro.check_fit(tiny)
    assert "trained for it" in capsys.readouterr().out and planned == [["main-s0"]]
    monkeypatch.setattr("masksae.app.plan.available_bytes", lambda _: 1e6)
    run.parts[1].notes.file.unlink()
    assert [part.name for part in check.missing(Run(tiny))] == ["main-s1"]
    with pytest.raises(ConfigError, match="0.0 GB are free"):
        repro.check_fit(tiny)
    profile(project, keep_pairs=True, training={"lr": 1e-3})
    assert len(check.missing(Run(tiny))) == 3  # rows of another profile


def size_of(*folders, pattern="*"):
    return sum(file.stat().st_size for folder in folders for file in cache_dir(folder).rglob(pattern) if file.is_file())


def test_planned_bytes_are_those_that_a_run_leaves(new_project, monkeypatch):
    """Within a tenth."""
    written = []

    def save(group, folder, original=Group.save):
        original(group, folder)
        written.append((folder / "state.safetensors").stat().st_size)

    monkeypatch.setattr(Group, "save", save)
    grid = {"n_latents": 256, "selection": {"rule": "batch_topk", "k": 4}}
    blocks = [{"name": "main", "saes": ["plain"], "pairs": [0]}]
    blocks += [{"name": "more", "saes": ["plain", "wide"], "pairs": [1], "snapshots": False}]
    arms = [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.3}, {"name": "less", "p": 0.3, "tokens": 0.6}]
    saes = [{"name": "plain"} | grid, {"name": "wide"} | grid | {"n_latents": 512}]
    training = {"snapshots": [10, 20]}
    for i, name in enumerate(("task", "task_OOD", "third")):
        rows = [
            f"{'qqqq' if y else 'zzzz'} {i}{j:02d} the cat {'sat on a mat' * (j % 2)},{y}"
            for y in (0, 1)
            for j in range(80)
        ]
        (new_project / f"{name}.csv").write_text("\n".join(["prompt,target", *rows]))
    run = Run(profile(new_project, blocks=blocks, saes=saes, arms=arms, training=training))
    plan = Plan(run.profile)
    saes = run.saes
    steps = {sae.split("-")[0]: trained.history[-1]["step"] + 1 for sae, trained in saes.items()}
    assert steps == {group.arm.name: plan.recipe(group).steps for group in plan.groups}
    first, masked = run.parts[0], run.profile.arms[1]
    for pair in (0, 1):
        reconstruction.corrupted_text(first, masked, pair)
    perturbation.class_group(first, "ends")
    [task], [shifted] = run.profile.probing.tasks, run.profile.probing.shifted
    probing.task_activations(first, task), probing.task_activations(first, task, Shift.parse(shifted))
    planned = plan.disk()
    found = {
        "tokens (twice while they are put together)": 2 * size_of("blocks", pattern="*.arrow"),
        "SAEs": size_of("saes", pattern="*.safetensors"),
        "checkpoint (twice while it is replaced)": 2 * max(written),
        "activations (half precision)": size_of("activations"),
        "held-out activations": len(first.held_out) * 64 + size_of("corrupted"),
        "labelled texts (at most)": size_of("tasks", "pools"),  # each is longer than perturbation.max_tokens
    }
    for name, size in found.items():
        assert size == pytest.approx(planned.pop(name), rel=0.1), name
    assert [*planned] == ["contexts and words (at most)"]  # single characters make none


def test_labelled_texts_of_the_papers_scale_are_not_kept(paper):
    """90,000 texts of 128 tokens: they were 35 GB for Pythia and 106 GB for Gemma, on the disk and in memory."""
    for name, tokens in (("paper", 35e9), ("paper-gemma", 106e9)):
        plan = paper[name]
        assert 4 * 128 * sum(plan.pools) * plan.width == pytest.approx(tokens, rel=0.02)
        assert plan.disk()["labelled texts (at most)"] < 2e9
        options = plan.profile.perturbation.model_dump() | {"train": 100, "test": 100}
        small = plan.profile.model_copy(update={"perturbation": Perturbation(**options)})
        assert Plan(small).work[2].flop < plan.work[2].flop - 2 * plan.forward_flop(plan.prefix, 128 * sum(plan.pools))


def test_a_larger_gpu_is_faster_and_ablations_cost(paper):
    for name in ("paper", "paper-gemma"):
        plan = paper[name]
        hours = {gpu.name: sum(plan.hours(work, gpu) for work in plan.work) for gpu in GPUS}
        assert hours["H100 SXM"] < hours["A100 80GB"] < hours["L4"] < 72
    laptop = load_profile("laptop")
    less = Plan(laptop.model_copy(update={"blocks": [Block(arms=["unmasked"], pairs=[100])]}))
    assert len(less.saes) < len(paper["laptop"].saes) and less.work[1].sae_flop < paper["laptop"].work[1].sae_flop
    assert less.streams == 1 and paper["laptop"].streams == 4  # of each pair its masks, kept and dropped alike


def test_a_plan_needs_no_network(monkeypatch, capsys, tmp_path):
    def closed(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", closed)
    example = re.search(r"```yaml\n(name: mine.*?)```", (ROOT / "docs/own.md").read_text(), re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(example)
    example = Plan(load_profile(tmp_path / "mine.yaml"))  # of docs/own.md
    assert sum(p.numel() for p in example.model.parameters()) == 70_426_624
    assert cli.main(["plan", "paper"]) == 0
    told = capsys.readouterr().out
    assert "24 SAEs in 4 groups on 4 streams of activations" in told and "memory of a GPU" in told
    assert max(map(len, told.split("\n\nHere")[0].split("\n\nTime")[1].splitlines())) <= 80


def test_an_unknown_shape_is_named(monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    paper = load_profile("paper")
    plan = Plan(paper.model_copy(update={"model": paper.model.model_copy(update={"source": "hub:nobody/nothing"})}))
    with pytest.raises(
        SourceError, match="shape of hub:nobody/nothing is not known here.*hub:google/gemma-2-2b.*config.json"
    ):
        plan.work
    assert "asking the hub for the shape of nobody/nothing" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_refused_as_when_it_is_loaded(kind, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    smoke = load_profile("smoke")
    model = smoke.model.model_copy(update={"source": str(tmp_path)})
    with pytest.raises(SourceError, match=rf"it is an encoder-decoder \({kind}\). Use a decoder-only model"):
        Plan(smoke.model_copy(update={"model": model})).work


def test_a_gguf_files_shape_is_read_from_its_header(tmp_path):
    import gguf

    file = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    file.add_block_count(3)
    file.add_context_length(64)
    file.add_embedding_length(16)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_vocab_size(128)
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
        write()
    smoke = load_profile("smoke")
    model = smoke.model.model_copy(update={"source": str(tmp_path / "tiny.gguf")})
    plan = Plan(smoke.model_copy(update={"model": model}))
    assert plan.width == 16 and plan.config.num_hidden_layers == 3


def test_what_cannot_fit_is_refused_with_the_remedy(paper, monkeypatch):
    plan = paper["paper-gemma"]
    needed = sum(plan.memory("cuda").values())
    monkeypatch.setattr("masksae.app.plan.available_bytes", lambda _: 8e9)
    with pytest.raises(
        ConfigError,
        match=r"paper-gemma needs .* GB on cuda \(language model 5.2, .*\), 8.0 GB are free. Use a larger device",
    ):
        plan.check("cuda")
    monkeypatch.setattr("masksae.app.plan.available_bytes", lambda _: needed + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(5e9))
    with pytest.raises(ConfigError, match=r"GB of disk in .*, 5.0 GB are free. Point MASKSAE_CACHE"):
        plan.check("cuda")
    plan.check("cuda", kept=1e11)
    assert "does not fit" in text(plan, "cpu") or sum(plan.memory("cpu").values()) < 24e9


def test_make_repro_refuses_before_it_starts(new_project, monkeypatch):
    tiny = profile(new_project)
    monkeypatch.setattr("masksae.app.plan.available_bytes", lambda _: 1e6)
    monkeypatch.setattr(repro, "dvc", lambda *_: pytest.fail("started"))
    with pytest.raises(ConfigError, match="0.0 GB are free"):
        repro.reproduce(tiny)


def test_a_local_models_shape_is_read_from_its_folder(project):
    plan = Plan(load_profile(profile(project)))
    assert plan.width == 16 and sum(p.numel() for p in plan.model.parameters()) == sum(
        p.numel() for p in tiny_model("llama").parameters()
    )


def test_a_fraction_is_measured_here(project, monkeypatch):
    plan = Plan(load_profile(profile(project)))
    hours = measure.hours_here(plan, "cpu")
    assert set(hours) == {"activations", "training"} and all(0 < value < 1 for value in hours.values())
    assert "here, measured" in text(plan, "cpu", measured=hours)
    assert sum(measure._kinds(plan).values()) == len(plan.saes) and len(measure._kinds(plan)) == 2
    assert measure.step_seconds(plan, SAEConfig(16, 32, plan.saes[0].selection), 1, "cpu") > 0
    monkeypatch.setattr(measure, "STACKED", {"cpu"})
    assert measure.step_seconds(plan, SAEConfig(16, 32, plan.saes[0].selection), 2, "cpu") > 0
    plan.profile = plan.profile.model_copy(update={"training": Training(batch_size=64)})  # every number left out
    assert measure.step_seconds(plan, SAEConfig(16, 32, plan.saes[0].selection), 1, "cpu") > 0


def test_scratch_that_is_freed_is_not_counted(paper):
    """Of pairs that are kept, only the streams that a part or a later one is trained on lie there at a time."""
    overnight = load_profile("overnight")
    kept, all_of_them = Plan(overnight), Plan(overnight.model_copy(update={"keep_pairs": False}))
    assert kept.streams > all_of_them.kept_streams > 20 > 8 >= kept.kept_streams >= 5
    assert paper["laptop"].kept_streams == paper["laptop"].streams == 4


def test_the_profile_of_a_gpu_is_what_it_says():
    profile = load_profile("gpu")
    plan = Plan(profile)
    assert plan.steps() * profile.training.batch_size == pytest.approx(5e8, rel=0.02)
    widths = [sae.n_latents for sae in plan.saes]
    assert (widths.count(4096), widths.count(16384)) == (40, 4) and profile.keep_pairs
    assert profile.training.pool_tokens >= profile.text.train_tokens  # one pool, which stays on the card
    h100 = GPUS[-1]
    assert 1 < sum(plan.hours(work, h100) for work in plan.work) < 8
    assert sum(plan.memory().values()) < 24e9 and sum(plan.disk().values()) < 50e9
