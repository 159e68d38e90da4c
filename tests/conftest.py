"""Shared by the tests: tiny random models of the three architectures, and a scratch cache that is not the user's."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

with contextlib.suppress(
    ImportError
):  # of the peers; it cannot be imported after nnsight, which changes builtins that it hashes
    import beartype  # noqa: F401

VOCABULARY = 128

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the cores have a worker each


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.stem != "test_smoke")


def tiny_model(kind: str, layers: int = 3, width: int = 16, seed: int = 0):
    """A random model of an architecture, in eval mode, with no trained weight in it."""
    import transformers as tr

    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    config = {
        "llama": lambda: tr.LlamaConfig(**shape, num_key_value_heads=1),
        "gpt_neox": lambda: tr.GPTNeoXConfig(**shape),
        "gemma2": lambda: tr.Gemma2Config(**shape, num_key_value_heads=1, head_dim=width // 2, sliding_window=4),
    }[kind]()
    torch.manual_seed(seed)
    return tr.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def byte_tokenizer():
    """A real tokenizer with one token per ASCII character, and two special ones: BOS 0, mask 1."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(c) < 127 or c in "ĠĊ"]
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<mask>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(parts.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", additional_special_tokens=["<mask>"])


@pytest.fixture(params=["llama", "gpt_neox", "gemma2"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def language_model():
    """What `from_model` reads of a `LanguageModel`."""
    return SimpleNamespace(model=tiny_model("llama"))


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def as_nobody(tmp_path):
    """Run a function in a forked child without root's rights, and return what it raised (type name, message) or None."""
    import os
    import pickle

    for folder in tmp_path.parents[:3]:  # pytest's own folders, which are closed to others
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o055)

    def run(function):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                function()
                outcome = None
            except BaseException as error:
                outcome = (type(error).__name__, str(error))
            os.write(write, pickle.dumps(outcome))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            outcome = pickle.loads(pipe.read())
        os.waitpid(child, 0)
        return outcome

    return run
