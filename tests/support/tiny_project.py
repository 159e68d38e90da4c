"""Tiny random models with a tokenizer, and a project around one of them: text, and a profile with every section."""

import random

import torch
import yaml

VOCABULARY = 128


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


def make_project(folder) -> None:
    """A tiny model, some text and an empty dvc.yaml."""
    tiny_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    words = "the cat sat on a mat while seven dogs ran past it and nobody saw them".split()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    (folder / "dvc.yaml").write_text("")


def profile(folder, name="tiny", **changes):
    values = {
        "name": name,
        "description": "a test",
        "model": {"source": str(folder / "model"), "block": 1, "mask_token": "<mask>", "bos_token": "<bos>"},
        "text": {
            "sources": [str(folder / "text.jsonl")],
            "block_length": 32,
            "train_tokens": 6400,
            "held_out_tokens": 640,
            "held_out_share": 0.15,
        },
        "arms": [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.3}],
        "training": {
            "epochs": 2,
            "batch_size": 256,
            "lr": 3e-3,
            "warmup": 4,
            "threshold_start": 10,
            "threshold_ema": 0.8,
            "pool_tokens": 2000,
        },
        "saes": [
            {"name": "plain", "selection": {"rule": "batch_topk", "k": 3}, "n_latents": 32},
            {
                "name": "matryoshka",
                "selection": {"rule": "batch_topk", "k": 4},
                "n_latents": 32,
                "prefixes": [0.25, 0.75],
            },
        ],
        "blocks": [
            {"name": "main", "saes": ["plain"], "pairs": [0, 1]},
            {"name": "matryoshka", "saes": ["matryoshka"], "pairs": [0]},
        ],
        "evaluation": {"ce_tokens": 320},
        "absorption": {"words": 50},
        "contexts": {"tokens": 320, "positives": 20},
        "probing": {
            "tasks": [str(folder / "task.csv")],
            "shifted": [str(folder / "task_OOD.csv")],
            "train": 40,
            "test": 40,
            "max_tokens": 8,
            "ks": [2, 5],
            "shifted_ks": [2, 5],
        },
        "perturbation": {
            "groups": {"ends": [str(folder / f"{name}.csv") for name in ("task", "task_OOD", "third")]},
            "train": 40,
            "test": 20,
            "max_tokens": 16,
            "ns": [2, 8],
            "ks": [2, 5],
        },
        "robustness": {"texts": 18, "tokens": 28, "candidates": 20},
        "simulation": {"seeds": 2, "qs": [1.0], "ks": [2], "ps": [0.3], "steps": 60},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
