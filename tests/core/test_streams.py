"""Streams as training meets them: one owner of the language model at a time, one position, and what the stream is made
of."""

import contextlib
import json
import threading
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_training import run, same, sparse_world, train_config
from tiny_project import tiny_model

import masksae
from masksae import ActivationStream, BatchTopK, SAEConfig, activations
from masksae.activations import between_pools, from_model
from masksae.errors import CheckpointError, ConfigError, DataError
from masksae.files import run_id

MODEL = dict(block=1, p=0.4, token_id=1, mask_seed=0, bos_id=None, batch_size=8, seed=0, pool_tokens=30, progress=False)
SAES = [SAEConfig(16, 32, BatchTopK(3), seed=s) for s in range(2)]


def small_config(steps=40, **changes):
    return masksae.TrainConfig(steps=steps, **(dict(lr=1e-3, warmup=2, threshold_start=5) | changes))


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("next-pool")]


class Watched:
    """Pools of 8 rows that say who loads them, how many at a time, and wait a little, as forwards do."""

    def __init__(self, pools=4):
        self.loaded, self.busy, self.most, self._sizes = [], 0, 0, [8] * pools

    def __call__(self, number):
        self.busy += 1
        self.most = max(self.most, self.busy)
        self.loaded.append(number)
        threading.Event().wait(0.01)
        self.busy -= 1
        generator = torch.Generator().manual_seed(number)
        return torch.randn(8, 16, generator=generator) + 1, torch.zeros(8, dtype=torch.bool)

    def stream(self, prefetch=True):
        return ActivationStream(self, self._sizes, batch_size=4, seed=0, prefetch=prefetch)


def test_arms_in_turn_on_one_model_that_works_in_threads(ids):
    """As on a GPU, on the CPU: what one arm collects ahead must not meet the next arm, nor the model's other users."""
    from masksae.tracing import activations

    model = SimpleNamespace(model=tiny_model("llama"))
    expected, before = {}, activations(model.model, ids, block=1)
    for repetition in range(4):
        for p in (0.0, 0.4):
            stream = from_model(model, ids, overlap=repetition > 0, **MODEL | {"p": p})
            saes = masksae.train(
                SAES, stream, small_config(12), device="cpu:0" if repetition else "cpu", progress=False
            )
            assert not workers()
            assert same(saes, expected.setdefault(p, saes))
        assert torch.equal(activations(model.model, ids, block=1), before)


def test_snapshots_and_jumps_run_one_load_at_a_time(tmp_path):
    config = small_config(14, snapshots=(5, 9), checkpoint_every=3)
    watched, plain = Watched(), Watched()
    found = run(config, SAES, watched.stream(), checkpoint_dir=tmp_path / "ahead", device="cpu:0")
    assert watched.most == 1 and not workers()
    assert same(found, run(config, SAES, plain.stream(prefetch=False), checkpoint_dir=tmp_path / "plain"))
    ahead, kept = (masksae.load_snapshots(tmp_path / name) for name in ("ahead", "plain"))
    assert all(same(ahead[n], kept[n]) for n in (5, 9))


def test_no_pool_is_made_past_the_last_step():
    for steps, pools in ((4, {0, 1}), (5, {0, 1, 2}), (8, {0, 1, 2, 3})):
        watched = Watched()
        run(small_config(steps, warmup=1, threshold_start=2), SAES, watched.stream())
        assert set(watched.loaded) == pools


def test_two_streams_never_load_at_once():
    watched = Watched()
    one, other = watched.stream(), watched.stream()
    for _ in zip(range(12), one, other):
        pass
    assert watched.most == 1


def test_no_other_thread_makes_a_pool_while_a_step_is_captured():
    watched = Watched()
    batches = iter(watched.stream())
    with between_pools():
        next(batches)  # its own pool; the next one waits
        threading.Event().wait(0.05)
        assert watched.loaded == [0]
    batches.close()
    assert watched.loaded == [0, 1]


def test_a_pool_is_finished_before_a_step_may_be_captured(monkeypatch):
    """What is done with a pool once it is loaded may take memory of the device, which no other thread may do then."""
    stream, free = Watched().stream(), []

    def asked():
        if got := activations._loading.acquire(blocking=False):
            activations._loading.release()
        free.append(got)

    def check(number, pool):
        other = threading.Thread(target=asked)
        other.start()
        other.join()

    monkeypatch.setattr(stream, "_check_read", check)
    next(iter(stream))
    assert free and not any(free)


def test_pools_that_are_made_ahead_for_a_gpu_share_one_stream(monkeypatch):
    """Made where the model was loaded before, and whole when they are handed over."""
    log: list = []

    class Stream:
        def __init__(self, device):
            log.append("new")

        def wait_stream(self, other):
            log.append(f"after {other}")

        def synchronize(self):
            log.append("whole")

    @contextlib.contextmanager
    def inside(stream):
        log.append("in")
        yield
        log.append("out")

    for name, fake in (("Stream", Stream), ("stream", inside), ("default_stream", lambda device: "the model")):
        monkeypatch.setattr(torch.cuda, name, fake)
    stream = Watched().stream()
    stream._device = torch.device("cuda")
    monkeypatch.setattr(stream, "_read", lambda number: log.append(number) or number)
    assert [stream._read_beside(number) for number in (1, 2)] == [1, 2]
    assert log == ["new", "after the model", *("in", 1, "out", "whole"), *("in", 2, "out", "whole")]


def test_an_sae_of_a_model_in_half_precision_explains_as_much():
    """Of the model's activations in single precision, to .002 on average over eight SAEs."""
    from masksae.tracing import activations

    ids = torch.randint(2, 128, (150, 33), generator=torch.Generator().manual_seed(0))
    x = activations(tiny_model("llama"), ids, block=1).reshape(-1, 16)
    saes, found = [SAEConfig(16, 64, BatchTopK(4), seed=seed) for seed in range(8)], []
    for dtype in (torch.float32, torch.bfloat16):
        model = SimpleNamespace(model=tiny_model("llama").to(dtype))
        stream = from_model(model, ids, **MODEL | {"p": 0.0, "batch_size": 128, "pool_tokens": 5000})
        trained = masksae.train(saes, stream, small_config(500, lr=3e-3), progress=False)
        found.append(sum(masksae.metrics.explained_variance(x, sae(x)) for sae in trained) / len(saes))
    assert 0.6 < found[0] < 0.999 and abs(found[1] - found[0]) < 0.002


def test_an_iterator_that_ends_leaves_no_thread():
    watched = Watched()
    batches = iter(watched.stream())
    next(batches)
    assert workers()
    batches.close()
    assert not workers()


def test_an_iterator_that_ends_inside_a_load_blocks_nothing():
    """What the ended one had begun waits for the lock that this load holds."""
    stream = Watched().stream()
    assert stream.d_model == 16  # its first pool is there
    begun = [iter(stream)]

    def load(number):
        other = threading.Thread(target=next, args=(begun[0],))
        other.start()
        other.join()
        assert workers()
        begun.clear()  # ends it here, as the collector may
        return torch.ones(8, 2), torch.zeros(8, dtype=torch.bool)

    next(iter(ActivationStream(load, [8], batch_size=4, seed=0)))
    for worker in workers():
        worker.join(5)
    assert not workers()


def test_a_failed_training_leaves_no_thread():
    watched = Watched()
    stream = watched.stream()

    class Stop(Exception):
        pass

    def stopping(step, record):
        if record["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        masksae.train(SAES, stream, small_config(14, log_every=1), log=stopping, progress=False)
    assert not workers()


def test_iterators_share_one_position():
    """Two iterators give every batch once between them, in the second epoch too; a jump is followed by those that
    live."""
    x = torch.arange(40.0)[:, None]
    make = lambda: ActivationStream.from_array(x, batch_size=10, seed=0)
    alone = [batch for batch, _ in islice(make(), 12)]
    stream = make()
    one, other = iter(stream), iter(stream)
    for turn, expected in enumerate(alone):
        assert torch.equal(next((one, other)[turn % 3 == 0])[0], expected)
    stream.load_state_dict({"pool": 1, "batch": 2})
    assert torch.equal(next(one)[0], alone[6])
    assert stream.state_dict() == {"pool": 1, "batch": 3}


def test_training_starts_at_the_beginning_whatever_was_read_before(tmp_path):
    x = sparse_world()[0]
    source = ActivationStream.from_array(x, batch_size=200, seed=0)
    first = run(source=source)
    assert same(run(source=source), first)
    list(islice(source, 35))

    class Stop(Exception):
        pass

    def stopping(sae, record):
        if record["step"] >= 7:
            raise Stop

    with pytest.raises(Stop):
        run(source=source, checkpoint_dir=tmp_path, log=stopping)
    assert not (tmp_path / "checkpoint").exists()
    assert same(run(source=source, checkpoint_dir=tmp_path), first)


def array(x=None, **changes):
    x = sparse_world()[0] if x is None else x
    return ActivationStream.from_array(x, **dict(batch_size=200, seed=0) | changes)


def changed(x, row):
    x = x.clone()
    x[row] += 1e-3
    return x


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: array(sparse_world(seed=1)[0]), "content"),
        (lambda: array(changed(sparse_world()[0], 4711)), "content"),
        (lambda: array(sparse_world(n=5999)[0]), "rows"),
        (lambda: array(sparse_world()[0].double()), "dtype"),
        (lambda: array(is_masked=torch.arange(6000) == 5), "is_masked"),
        (lambda: array(sinks=3.0), "sinks"),
        (lambda: array().with_targets(array(sparse_world(seed=1)[0])), "targets"),
    ],
)
def test_a_checkpoint_belongs_to_its_activations(tmp_path, other, words):
    first = run(train_config(20, threshold_start=10), source=array(), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=f"stream .*{words}.* Use another checkpoint_dir"):
        run(train_config(20, threshold_start=10), source=other(), checkpoint_dir=tmp_path)
    assert same(run(train_config(20, threshold_start=10), source=array(), checkpoint_dir=tmp_path), first)


def test_snapshots_belong_to_their_activations(tmp_path):
    config = train_config(40, snapshots=(30,), checkpoint_every=1000)
    run(config, source=array(), checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="step-00000030 is damaged, or belongs to another"):
        run(config, source=array(sparse_world(seed=1)[0]), checkpoint_dir=tmp_path)


def test_checkpoints_and_snapshots_of_before_are_gone_on_with(tmp_path):
    """Schema 2 did not know what the stream is made of."""
    config = train_config(40, snapshots=(30,), checkpoint_every=20)
    first = run(config, source=array(), checkpoint_dir=tmp_path)
    file = tmp_path / "checkpoint/state.json"
    record = json.loads(file.read_text())
    del record["sha256"], record["identity"]["stream"]
    file.write_text(json.dumps(record | {"schema": 2}))
    (tmp_path / "snapshots/step-00000030/identity.json").write_text(json.dumps(run_id(record["identity"])))
    assert same(run(config, source=array(), checkpoint_dir=tmp_path), first)


def test_checkpoints_of_own_pools_belong_to_the_first_of_them(tmp_path):
    run(small_config(9, warmup=1), SAES, Watched().stream(), checkpoint_dir=tmp_path)
    run(small_config(9, warmup=1), SAES, Watched().stream(False), checkpoint_dir=tmp_path)
    for watched, words in ((Watched(pools=5), "sizes"), (Watched(), "content")):
        if words == "content":
            load = watched.__call__
            changed_load = lambda number: (load(number)[0] + 1, load(number)[1])
            stream = ActivationStream(changed_load, [8] * 4, batch_size=4, seed=0)
        else:
            stream = watched.stream()
        with pytest.raises(CheckpointError, match=words):
            run(small_config(9, warmup=1), SAES, stream, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"p": 0.5}, r"stream \(p\)"),
        ({"block": 0}, r"stream \(block\)"),
        ({"token_id": 2}, r"stream \(token_id\)"),
        ({"mask_seed": 1}, r"stream \(mask_seed\)"),
        ({"replacements": torch.tensor([3, 4])}, r"stream \(token_id, replacements\)"),
        ({"share": 0.5}, r"stream \(share\)"),
        ({"pool_tokens": 60}, r"stream \(pool_tokens\)"),
    ],
)
def test_a_checkpoint_belongs_to_model_text_and_masks(tmp_path, ids, changes, words):
    model = SimpleNamespace(model=tiny_model("llama"))
    run(small_config(9), SAES, from_model(model, ids, **MODEL), checkpoint_dir=tmp_path)
    run(small_config(9), SAES, from_model(model, ids.clone(), **MODEL, sequences=2), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=words):
        run(small_config(9), SAES, from_model(model, ids, **MODEL | changes), checkpoint_dir=tmp_path)


def test_another_model_or_text_is_noticed(ids):
    model = SimpleNamespace(model=tiny_model("llama"))
    ours = from_model(model, ids, **MODEL).identity()
    other = SimpleNamespace(model=tiny_model("llama", seed=1))
    assert from_model(other, ids, **MODEL).identity() | {"model": ours["model"]} == ours
    assert from_model(other, ids, **MODEL).identity() != ours
    text = ids.clone()
    text[-1, -1] = 2 + text[-1, -1] % 90
    assert from_model(model, text, **MODEL).identity() | {"blocks": ours["blocks"]} == ours
    assert from_model(model, text, **MODEL).identity() != ours


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"p": 0.0}, "p, token_id"),
        ({"block": 0}, "block"),
        ({"mask_seed": 3}, "mask_seed"),
        ({"pool_tokens": 60}, "pool_tokens"),
    ],
)
def test_scratch_is_read_back_for_what_it_was_made_of_only(tmp_path, ids, changes, words):
    model = SimpleNamespace(model=tiny_model("llama"))
    next(iter(from_model(model, ids, scratch=tmp_path, **MODEL)))
    with pytest.raises(DataError, match=f"{words}.*Give another folder"):
        from_model(model, ids, scratch=tmp_path, **MODEL | changes)
    same_pools = {"share": 0.5, "seed": 4, "batch_size": 4}
    assert from_model(model, ids, scratch=tmp_path, **MODEL | same_pools).batches_per_epoch == 13


def test_without_masks_their_options_do_not_matter(tmp_path, ids):
    model = SimpleNamespace(model=tiny_model("llama"))
    clean = MODEL | {"p": 0}
    next(iter(from_model(model, ids, scratch=tmp_path, **clean)))
    from_model(model, ids, scratch=tmp_path, **clean | {"token_id": 7, "mask_seed": 9, "p": 0.0})


def test_scratch_of_before_is_refused(tmp_path, ids):
    model = SimpleNamespace(model=tiny_model("llama"))
    next(iter(from_model(model, ids, scratch=tmp_path, **MODEL)))
    (tmp_path / "identity.json").unlink()
    with pytest.raises(DataError, match="do not say what they were made of.*Give another"):
        from_model(model, ids, scratch=tmp_path, **MODEL)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_truncated_pool_is_refused_with_the_remedy(tmp_path, ids, cut):
    model = SimpleNamespace(model=tiny_model("llama"))
    next(iter(from_model(model, ids, scratch=tmp_path, **MODEL)))
    [file] = tmp_path.glob("pool-*")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match="pool-00000.safetensors is damaged.*Delete it; it is made again"):
        next(iter(from_model(model, ids, scratch=tmp_path, **MODEL)))


def test_a_pool_of_something_else_is_refused_with_the_remedy(tmp_path, ids):
    from safetensors.torch import save_file

    model = SimpleNamespace(model=tiny_model("llama"))
    next(iter(from_model(model, ids, scratch=tmp_path, **MODEL)))
    [file] = tmp_path.glob("pool-*")
    save_file({"y": torch.zeros(3)}, file)
    with pytest.raises(DataError, match="pool-00000.safetensors is damaged.*Delete it; it is made again"):
        next(iter(from_model(model, ids, scratch=tmp_path, **MODEL)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_that_are_not_bool_are_refused(dtype):
    x, mask = torch.ones(8, 2), (torch.arange(8) < 3).to(dtype)
    with pytest.raises(DataError, match=rf"is_masked must be bool, found {dtype}.*is_masked != 0"):
        array(x, batch_size=2, is_masked=mask)
    with pytest.raises(DataError, match="is_masked must be bool"):
        next(iter(ActivationStream(lambda _: (x, mask), [8], batch_size=2, seed=0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_given_as_single(dtype):
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    stream = array(x, batch_size=8)
    batch, _ = next(iter(stream))
    assert batch.dtype == torch.float32 and torch.equal(batch.sort(0).values, x.float().sort(0).values)
    assert stream.identity()["dtype"] == str(dtype) and stream.d_model == 2


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.ones(8, 2, dtype=torch.int64), "floats, found torch.int64"),
        (torch.ones(8, 2, dtype=torch.bool), "floats, found torch.bool"),
        (torch.ones(8, 2, dtype=torch.complex64), "floats, found torch.complex64"),
        (np.full((8, 2), "a"), "array of floats"),
        ([["a"]], "array of floats"),
        (torch.full((8, 2), 1e300, dtype=torch.float64), "NaN or infinity"),
    ],
)
def test_what_is_no_array_of_floats_is_refused(x, words):
    with pytest.raises(DataError, match=words):
        next(iter(array(x, batch_size=2)))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True])
def test_seeds_that_cannot_be_are_refused(ids, seed):
    with pytest.raises(ConfigError, match="seed must be an integer from 0"):
        array(batch_size=2, seed=seed)
    with pytest.raises(ConfigError, match="seed must be an integer from 0"):
        array(batch_size=2).batches([(seed, False)])
    model = SimpleNamespace(model=tiny_model("llama"))
    with pytest.raises(ConfigError, match="seed must be an integer from 0"):
        from_model(model, ids, **MODEL | {"mask_seed": seed})


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"p": float("nan")}, ConfigError, "p is the probability"),
        ({"token_id": 128}, ConfigError, "token_id 128 is outside the vocabulary of 128"),
        ({"block": 3}, ConfigError, "block 3 is outside"),
        ({"block": "model.layers.9"}, ConfigError, "no module 'model.layers.9'"),
        ({"blocks": torch.zeros(0, 9, dtype=torch.int64)}, DataError, "0 activations do not fill"),
        ({"share": 0.0}, ConfigError, "share"),
        ({"share": 1.5}, ConfigError, "share"),
        ({"sinks": 1}, ConfigError, "sinks is in medians of the norm .* above 1, found 1"),
        ({"sinks": float("nan")}, ConfigError, "sinks is in medians"),
        ({"pool_tokens": 0}, ConfigError, "pool_tokens"),
        ({"sequences": 0}, ConfigError, "sequences"),
        ({"batch_size": 2.5}, ConfigError, "batch_size"),
        ({"blocks": torch.zeros(12, 1, dtype=torch.int64), "bos_id": 0}, DataError, "nothing but the BOS"),
        ({"blocks": torch.zeros(12, dtype=torch.int64)}, DataError, r"blocks must have shape"),
        ({"blocks": torch.zeros(12, 9)}, DataError, "ids must be an int64 tensor"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_model_runs(ids, changes, error, words):
    model = SimpleNamespace(model=tiny_model("llama"))
    options = MODEL | {"blocks": ids} | changes
    with pytest.raises(error, match=words):
        from_model(model, **options)


@pytest.mark.parametrize(
    "later, words",
    [
        ((torch.ones(7, 2), torch.zeros(7, dtype=torch.bool)), r"pool 1 .*\(8, 2\).*found \(7, 2\)"),
        ((torch.ones(8, 3), torch.zeros(8, dtype=torch.bool)), r"pool 1 .*\(8, 2\).*found \(8, 3\)"),
        ((torch.ones(8, 2), torch.zeros(7, dtype=torch.bool)), r"one entry per activation \(8\), found shape \(7,\)"),
        ((torch.ones(8, 2).int(), torch.zeros(8, dtype=torch.bool)), "floats, found torch.int32"),
    ],
)
def test_pools_keep_their_shape(later, words):
    first = torch.ones(8, 2), torch.zeros(8, dtype=torch.bool)
    stream = ActivationStream(lambda number: later if number else first, [8, 8], batch_size=4, seed=0)
    with pytest.raises(DataError, match=words):
        list(islice(stream, 4))


def test_the_width_of_a_model_is_known_before_it_runs(ids):
    model = SimpleNamespace(model=tiny_model("llama"))
    stream = from_model(model, ids, **MODEL)
    stream._load = None
    assert stream.d_model == 16
    with pytest.raises(ConfigError, match="width 17, the stream gives 16"):
        masksae.train([SAEConfig(17, 32, BatchTopK(3))], stream, small_config(), progress=False)


def test_a_large_array_stays_where_it_is_and_its_batches_move(monkeypatch):
    from masksae import activations

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    moved = array(x, batch_size=8).to("meta")
    next(iter(moved))
    assert moved._held[1][0].is_meta and not next(iter(moved.to("cpu")))[0].is_meta
    monkeypatch.setattr(activations, "LARGEST_MOVED", 4 * x.numel() - 1)
    stream = array(x, batch_size=8).to("meta")
    [(batch, is_masked)] = next(stream.batches([(0, True)]))
    assert batch.is_meta and is_masked.is_meta and batch.shape == (8, 4)
    assert stream._held[1][0].data_ptr() == x.data_ptr()  # no copy of it was made
    assert stream.scale() > 0


def test_memory_maps_are_read_without_a_word(tmp_path, recwarn):
    np.save(tmp_path / "x.npy", sparse_world(n=1000)[0].numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    batch, _ = next(iter(array(x, batch_size=10)))
    assert batch.shape == (10, 16) and not len(recwarn)
