"""Tiny tokenizers of the kinds that language models have, laid out as theirs are and trained on a page of text.

Each has a mask, "<mask>", that is flagged as special, and the added token "<|fim|>", which is not.
"""

import json
from functools import lru_cache

import transformers as tr
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from masksae.data.models import PAGE

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()<>|/[]$%-_"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEKKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RUNS = [AddedToken(" " * n, special=False, normalized=True) for n in range(8, 1, -1)]
"""Runs of blanks, as Phi and GPT-NeoX add them: text, and not markup."""


def _with_added(tokenizer, *more):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<mask>"]})
    tokenizer.add_tokens([AddedToken("<|fim|>", special=False, normalized=False), *more])
    return tokenizer


def _trained(pre_tokenizer, normalizer=None, alphabet=(), size=400) -> tuple[dict, list]:
    """Vocabulary and merges of a BPE of the page."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    if normalizer:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=[*alphabet], show_progress=False)
    made.train_from_iterator(PAGE.read_text(encoding="utf-8").splitlines(), trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@lru_cache
def _sentencepiece(*first: str) -> tuple[dict, list]:
    """Special tokens, bytes and pieces whose words begin with "▁", as sentencepiece's models are laid out."""
    split = pre_tokenizers.Split(Regex("▁?[^▁\n]+"), "isolated")
    vocabulary, merges = _trained(split, normalizers.Replace(" ", "▁"), ["▁", *LETTERS], 300)
    order = dict.fromkeys([*first, *BYTES, *sorted(vocabulary, key=vocabulary.get)])
    return {token: i for i, token in enumerate(order)}, merges


@lru_cache
def _byte_level(*first: str) -> tuple[dict, list]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet=alphabet)
    order = dict.fromkeys([*first, *sorted(vocabulary, key=vocabulary.get)])
    return {token: i for i, token in enumerate(order)}, merges


def llama2():
    return _with_added(tr.LlamaTokenizer(*_sentencepiece("<unk>", "<s>", "</s>")))


def mistral():
    """Mistral's of its first version, from a tokenizer.json of before transformers 5; puts a BOS itself."""
    options = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(models.BPE(*_sentencepiece("<unk>", "<s>", "</s>"), **options))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return _with_added(tr.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>"))


def tekken():
    """Mistral's from Nemo on: bytes, the control tokens in the vocabulary too, whole words taken before any merge."""
    vocabulary, merges = _byte_level("<unk>", "<s>", "</s>", "[INST]")
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(TEKKEN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["[INST]"])
    return _with_added(tr.PreTrainedTokenizerFast(tokenizer_object=made, **special))


def phi():
    return _with_added(tr.GPT2Tokenizer(*_byte_level("<|endoftext|>")), *RUNS)


def phi3():
    vocabulary, merges = _sentencepiece("<unk>", "<s>", "</s>")
    chat = [AddedToken(f"<|{name}|>", rstrip=True, special=True, normalized=False) for name in ("assistant", "user")]
    return _with_added(tr.LlamaTokenizer(vocabulary, merges, add_prefix_space=False, padding_side="left"), *chat)


def gemma():
    return _with_added(tr.GemmaTokenizer(*_sentencepiece("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")))


def gpt_neox():
    return _with_added(tr.GPTNeoXTokenizer(*_byte_level("<|endoftext|>", "<|padding|>")), *RUNS)


def unigram():
    """XGLM's kind: the likeliest pieces, special tokens among them at 0, the likeliest of all."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, initial_alphabet=LETTERS, special_tokens=["<s>", "<unk>", "<mask>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(PAGE.read_text(encoding="utf-8").splitlines(), trainer)
    return _with_added(tr.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>"))


def word_piece():
    """BERT's kind, which a decoder may have: all in lower case, the insides of words marked."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    alphabet = sorted({letter.lower() for letter in LETTERS})
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["[UNK]"], show_progress=False
    )
    made.train_from_iterator(PAGE.read_text(encoding="utf-8").splitlines(), trainer)
    return _with_added(tr.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]"))


def slow():
    """One of Python, without the library behind: bytes."""
    return _with_added(tr.ByT5Tokenizer(extra_ids=0))


KINDS = {
    make.__name__: make for make in (llama2, mistral, tekken, phi, phi3, gemma, gpt_neox, unigram, word_piece, slow)
}
