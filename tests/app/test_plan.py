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
from masksae.app.plan import GPUS, MEASURED, Plan, peers, step_flop
from masksae.app.plan_text import text
from masksae.errors import ConfigError, SourceError
from masksae.saes.sae import SAE
from masksae.study.sections import Block, Training
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
        trainer = Trainer(SAE(config), TrainConfig(steps=plan.steps), "meta")
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
    assert peers(paper["paper"])["SAELens"]["activations"] == 24 / 4 * harvest.flop


def test_a_larger_gpu_is_faster_and_ablations_cost(paper):
    for name in ("paper", "paper-gemma"):
        plan = paper[name]
        hours = {gpu.name: sum(plan.hours(work, gpu) for work in plan.work) for gpu in GPUS}
        assert hours["H100 SXM"] < hours["A100 80GB"] < hours["L4"] < 72
    laptop = load_profile("laptop")
    less = Plan(laptop.model_copy(update={"blocks": [Block(arms=["unmasked"], pairs=[100])]}))
    assert len(less.saes) < len(paper["laptop"].saes) and less.work[1].sae_flop < paper["laptop"].work[1].sae_flop
    assert less.streams == 1 and paper["laptop"].streams == 4  # of each pair its masks, kept and dropped alike
    assert paper["laptop"].steps == 6 * (400_000 // 128 * 127 // 512)  # what the trainer counts


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
    assert (
        "24 SAEs in 4 groups on 4 streams of activations" in told
        and "SAELens + SAEBench" in told
        and "memory of a GPU" in told
    )
    assert max(map(len, told.split("\n\nSpace")[0].split("\n\nTime")[1].splitlines())) <= 80


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


def test_make_repro_refuses_before_it_starts(project, monkeypatch):
    tiny = profile(project)
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


def test_hours_take_the_shares_that_were_measured_and_say_so(paper, monkeypatch):
    plan, h100 = paper["paper"], GPUS[-1]
    harvest, training, _ = plan.work
    assumed = [plan.hours(work, h100) for work in (harvest, training)]
    assert "at 40% of its data sheet (not measured)" in text(plan, "cpu")
    monkeypatch.setitem(MEASURED, "H100 SXM", {"activations": 0.8})
    assert plan.hours(harvest, h100) == pytest.approx(assumed[0] / 2) and plan.hours(training, h100) == assumed[1]
    assert "(but as measured on H100 SXM: activations 80%)" in text(plan, "cpu")


def test_the_profile_of_a_gpu_is_what_it_says():
    profile = load_profile("gpu")
    plan = Plan(profile)
    assert plan.steps * profile.training.batch_size == pytest.approx(5e8, rel=0.02)
    widths = [sae.n_latents for sae in plan.saes]
    assert (widths.count(4096), widths.count(16384)) == (40, 4) and profile.keep_pairs
    assert profile.training.pool_tokens >= profile.text.train_tokens  # one pool, which stays on the card
    h100 = GPUS[-1]
    assert 1 < sum(plan.hours(work, h100) for work in plan.work) < 8
    assert sum(plan.memory().values()) < 24e9 and sum(plan.disk().values()) < 50e9
