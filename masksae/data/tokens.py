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
    literal, added = _literal(tokenizer)
    ids = literal(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    found = added.keys() & set(chain.from_iterable(ids))
    if found - {tokenizer.unk_token_id}:
        token = min(found - {tokenizer.unk_token_id})
        raise DataError(
            f"A text says {added[token]!r}, and this tokenizer can only read that as its added token {token}. Change "
            "the word in the text."
        )
    return ids


@lru_cache(maxsize=1)
def _literal(tokenizer) -> tuple:
    """A tokenizer like this one to which added tokens are words like others (all are flagged as special, which
    `split_special_tokens` asks for, and neither merges nor likely pieces lead to them), and those tokens by id: all but
    white space, of which "▁" is sentencepiece's."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip(" \t\r\n▁")}
    if not tokenizer.is_fast:
        return tokenizer, added  # splits a text at none of them then
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    told, words = json.loads(tokenizer.backend_tokenizer.to_str()), {*added.values()}
    for token in told["added_tokens"]:
        token["special"] |= token["content"] in words
    model = told["model"]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in words]
    elif isinstance(model["vocab"], list):  # Unigram's pieces with their log-probabilities
        model["vocab"] = [[piece, NEVER if piece in words else score] for piece, score in model["vocab"]]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told))), added


def token_texts(tokenizer, ids: Iterable[int] | None = None) -> list[str]:
    """Text of some tokens, of all ids if None, as it stands within a text: with its leading space, which decoders of
    Llama's kind strip from the first token, and WordPiece has between words only."""
    if ids is None:
        ids = range(max(tokenizer.get_vocab().values()) + 1)
    [before] = tokenise(tokenizer, ["a"])
    start = tokenizer.decode(before)
    texts = (tokenizer.decode([*before, token], clean_up_tokenization_spaces=False) for token in ids)
    return [text.removeprefix(start) for text in texts]
