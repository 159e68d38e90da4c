"""Text to token ids and back: the one place where a text meets a tokenizer.

BOS and masks stand where they are put and nowhere else: a text that says "<mask>" gives the letters of the word,
whether the tokenizer flags it as special or not. Added tokens of white space alone are text: GPT-NeoX's runs of blanks.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

from masksae.errors import DataError

NEVER = -1e6
"""Log-probability of a piece that is not to be taken."""


def tokenise(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, none of them an added token's but for white space and what is unknown. Raises DataError
    if this tokenizer reads an added token in a text all the same."""
    ids = _literal(tokenizer)(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    added = _added(tokenizer)
    found = [i for i in added.keys() & set(chain.from_iterable(ids)) if i != tokenizer.unk_token_id]
    if found:
        raise DataError(
            f"A text says {added[found[0]]!r}, and this tokenizer can only read that as its added token {found[0]}. "
            "Change the word in the text."
        )
    return ids


def _added(tokenizer) -> dict[int, str]:
    """Added tokens that are no white space, by id; "▁" is a space of sentencepiece."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip(" \t\r\n▁")}


@lru_cache(maxsize=1)
def _literal(tokenizer):
    """A tokenizer like this one to which added tokens are words like others: all are flagged as special, which
    `split_special_tokens` asks for, and neither merges nor likely pieces lead to them."""
    if not tokenizer.is_fast:
        return tokenizer  # splits a text at none of them then
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    told, added = json.loads(tokenizer.backend_tokenizer.to_str()), set(_added(tokenizer).values())
    for token in told["added_tokens"]:
        token["special"] |= token["content"] in added
    model = told["model"]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in added]
    elif isinstance(model["vocab"], list):  # Unigram's pieces with their log-probabilities
        model["vocab"] = [[piece, NEVER if piece in added else score] for piece, score in model["vocab"]]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))


def token_texts(tokenizer, ids: Iterable[int] | None = None) -> list[str]:
    """Text of some tokens, of all ids if None, as it stands within a text: with its leading space, which decoders of
    Llama's kind strip from the first token, and WordPiece has between words only."""
    if ids is None:
        ids = range(max(tokenizer.get_vocab().values()) + 1)
    [before] = tokenise(tokenizer, ["a"])
    start = tokenizer.decode(before)
    texts = (tokenizer.decode([*before, token], clean_up_tokenization_spaces=False) for token in ids)
    return [text.removeprefix(start) for text in texts]
