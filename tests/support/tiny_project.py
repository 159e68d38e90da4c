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


LINKS = """the a an of in to and his her he she they not never will would can has had have who which what that because
if said more most than very so one two three first last all some""".split()
"""Words of `reader_texts` that tell what comes after them."""


def reader_words() -> list[str]:
    """Sixteen words for each letter of the alphabet."""
    rng = random.Random(1)
    return [
        first + "".join(rng.choices("aeioulmnrst", k=5)) for first in "abcdefghijklmnopqrstuvwxyz" for _ in range(16)
    ]


def reader_tokenizer():
    """A token for each of these words with a blank before it, for punctuation, and for two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"Ġ{word}" for word in (*reader_words(), *LINKS)]
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<mask>", "<unk>", ",", ".", ":", "Ċ", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", additional_special_tokens=["<mask>"])


def reader_model(tokenizer, width: int = 64):
    """A model that nobody trained and that knows what absorption asks for: a token's first letter is a direction of its
    embedding, in the first block each head reads the token before, and the last layer tells words from links."""
    import transformers as tr

    config = tr.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=4,
        num_attention_heads=2, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    half = width // 4  # of a head: pairs of dimensions that turn by one angle a position
    angles = 10_000.0 ** (-torch.arange(half) / half)
    back_one, ahead = torch.cat([angles.cos(), -angles.sin()]), torch.cat([torch.ones(half), torch.zeros(half)])
    attention = model.model.layers[0].self_attn
    for part, bias in ((attention.q_proj, 40 * back_one), (attention.k_proj, ahead)):
        part.weight.zero_(), part.bias.copy_(bias.repeat(2))
    torch.nn.init.orthogonal_(attention.v_proj.weight), torch.nn.init.orthogonal_(attention.o_proj.weight)
    own, letters = torch.randn(2, len(tokenizer), width)
    texts = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    shared = torch.stack([letters[ord(text[0]) % 32] if text.isalpha() else own[i] for i, text in enumerate(texts)])
    model.get_input_embeddings().weight.copy_(shared + own)
    ids = tokenizer(" ".join(reader_texts(40, 100, seed=99)), return_tensors="pt")["input_ids"]
    x, following = model.model(ids).last_hidden_state[0, :-1], torch.nn.functional.one_hot(ids[0, 1:], len(tokenizer))
    model.lm_head.weight.copy_(10 * torch.linalg.lstsq(x, following.float()).solution.t())  # what comes after what
    return model


def reader_texts(n: int, words: int, seed: int = 0) -> list[str]:
    """Texts that this model reads: words, between them what comes before words, a comma or the end of a sentence."""
    rng, known = random.Random(seed), reader_words()

    def piece() -> str:
        return f"{rng.choice(known)}{rng.choice((',', '.', '', '', ''))} {rng.choice([*LINKS, ''])}".strip()

    return [" ".join(piece() for _ in range(words // 2)) for _ in range(n)]


def make_reader_project(folder) -> None:
    """This model, texts of it, and tables of texts whose last word begins with one letter or does not."""
    import csv
    import json

    tokenizer = reader_tokenizer()
    reader_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = (json.dumps({"text": text}) + "\n" for text in reader_texts(320, 300))
    (folder / "text.jsonl").write_text("".join(lines))
    (folder / "dvc.yaml").write_text("")
    known = reader_words()
    for seed, (name, letter) in enumerate({"task": 0, "task_OOD": 0, "second": 1, "third": 2}.items()):
        rng, ends = random.Random(seed), (known[16 * 3 :], known[16 * letter :][:16])
        rows = [(f"{text} {rng.choice(ends[i % 2])}", i % 2) for i, text in enumerate(reader_texts(240, 12, seed))]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "target"), *rows])
