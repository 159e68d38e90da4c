"""Text to ids and back, with a tokenizer of each kind: no added token comes out of a text, each token keeps its space,
and so words, parents and pages are the same whatever the tokenizer."""

import json
import random

import pytest
import torch
import transformers as tr
from tiny_project import profile
from tokenizer_kinds import KINDS, LETTERS

from masksae import SAE, BatchTopK, Run, SAEConfig
from masksae.data import models, tokens
from masksae.errors import DataError, SourceError
from masksae.metrics.absorption import single_token_words
from masksae.metrics.contexts import ALL, occurrences
from masksae.study.explore import Explorer
from masksae.study.figures.data import masked_text_html
from masksae.study.scores import absorption, robustness

PIECES = ("llama2", "mistral", "phi3", "gemma")
PAGE = models.PAGE.read_text(encoding="utf-8")
PLAIN = "".join(letter for letter in PAGE if letter in {*LETTERS, " "})


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def test_no_added_token_comes_out_of_a_text(tokenizer):
    """Flagged as special or not. Before, those that are not did, and where special ones are pieces all of them."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    assert {"<mask>", "<|fim|>"} <= {*added.values()}
    text = "".join(f"a {token} and{token}, {token}\n" for token in added.values())
    [ids] = tokens.tokenise(tokenizer, [text])
    assert {*ids} & {*added} <= {tokenizer.unk_token_id}
    spelt = "".join(tokens.token_texts(tokenizer, ids)).replace(" ", "")
    assert spelt.count("<|fim|>") == 3 == spelt.count("<mask>")


def test_other_text_has_the_tokens_that_it_had(tokenizer):
    texts = [PAGE, "a  b    c\t\td\n\n\ne é 世 \x00 \r\n", "", " "]
    assert tokens.tokenise(tokenizer, texts) == tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def test_runs_of_blanks_that_are_added_tokens_are_text():
    for kind in ("phi", "gpt_neox"):
        tokenizer = KINDS[kind]()
        [ids] = tokens.tokenise(tokenizer, ["x    y"])
        assert tokenizer.convert_ids_to_tokens(ids) == ["x", "    ", "y"]


def test_a_merge_does_not_lead_to_an_added_token():
    """As where a tokenizer.json lists merges for control tokens too."""
    tokenizer, spelt = KINDS["llama2"](), lambda ids: tokenizer.convert_ids_to_tokens(ids[0])
    assert "he" in spelt(tokenizer(["xhe"], add_special_tokens=False)["input_ids"])
    tokenizer.add_tokens(["he"])
    assert spelt(tokens.tokenise(tokenizer, ["xhe"])) == ["▁", "x", "h", "e"]


def test_a_tokenizer_that_cannot_spell_a_token_is_refused_by_its_word():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(parts.WordLevel({"<unk>": 0, "<mask>": 1, "word": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", extra_special_tokens=["<mask>"])
    assert tokens.tokenise(tokenizer, ["a word"]) == [[0, 2]]
    with pytest.raises(DataError, match=r"'<mask>'.* added token 1"):
        tokens.tokenise(tokenizer, ["word <mask> word"])


def test_texts_of_tokens_make_up_the_text(tokenizer):
    [ids] = tokens.tokenise(tokenizer, [PLAIN])
    texts = tokens.token_texts(tokenizer)
    found = "".join(texts[i] for i in ids)
    assert found.replace(" ", "").lower() == PLAIN.replace(" ", "").lower()
    if "[UNK]" not in tokenizer.get_vocab():  # WordPiece keeps no spaces
        assert found.strip() == PLAIN.strip()
    assert tokens.token_texts(tokenizer, ids[:5]) == [texts[i] for i in ids[:5]]


def test_words_and_what_stands_before_them(tokenizer):
    """Contexts are found with each kind; of Llama's kind none was, as its decoder strips the space of a lone token."""
    texts = tokens.token_texts(tokenizer)
    [ids] = tokens.tokenise(tokenizer, [PLAIN])
    where, labels = occurrences(torch.tensor([ids]), texts)
    words, of_words = single_token_words(texts, 3)
    if not tokenizer.is_fast:
        assert len(where) == len(words) == 0  # bytes
        return
    assert len(where) > 20
    for position, held in zip(where[:, 1].tolist(), labels.tolist()):
        assert texts[ids[position]][0] == " " and texts[ids[position]][1:] in words
        assert held[ALL.index("the")] == (texts[ids[position - 1]].strip().lower() == "the")
    assert labels[:, ALL.index("the")].any()
    assert [texts[i].removeprefix(" ") for i in of_words] == words and len({*of_words}) == len(words)


def test_kinds_with_the_same_pieces_have_the_same_words():
    found = {kind: tokens.token_texts(KINDS[kind]()) for kind in PIECES}
    words = {kind: single_token_words(texts, 2)[0] for kind, texts in found.items()}
    places = {kind: [text for text in texts if text.startswith(" ")] for kind, texts in found.items()}
    assert len({*map(tuple, words.values())}) == 1 == len({*map(tuple, places.values())})
    assert " the" in places["llama2"] and " light" not in words["llama2"]


def project(folder, tokenizer, monkeypatch, **model):
    """A project around a tiny model with this tokenizer, whose text speaks of masks; its mask is the added token that
    is not flagged as special."""
    monkeypatch.setenv("MASKSAE_CACHE", str(folder / "cache"))
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = tr.LlamaConfig(**{"vocab_size": len(tokenizer) + 3} | shape | model)
    tr.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words, rng = sorted({*PAGE.split()}), random.Random(0)
    texts = [" ".join(rng.choices(words, k=40)) + " the <mask> and <|fim|> in" for _ in range(100)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {"mask_token": "<|fim|>", "bos_token": tokenizer.bos_token}
    return Run(profile(folder, model=options, absorption={"words": 20, "min_word_letters": 2}))


def test_a_study_with_each_kind(tokenizer, tmp_path, monkeypatch):
    """Text, masks, words, parents, places and replaced tokens, from a saved folder on."""
    run = project(tmp_path, tokenizer, monkeypatch)
    loaded = run.language_model.tokenizer
    mask, ids = loaded.convert_tokens_to_ids("<|fim|>"), run.ids("train")
    corrupted, is_masked = run.corrupt(run.profile.arms[1], ids[:1])
    assert not (ids == mask).any() and torch.equal(corrupted == mask, is_masked) and is_masked.any()
    shown = masked_text_html(loaded, corrupted[0], is_masked[0])
    assert shown.count("&lt;|fim|&gt;</span>") == shown.count("background") == int(is_masked.sum())
    assert robustness.examples(run, 1)[0]["mask"].strip("' ") == "<|fim|>"
    [place] = Explorer(run).places(SAE(SAEConfig(16, 32, BatchTopK(4))), [1], n=1)[1]
    assert (
        "".join(place.tokens).replace(" ", "").lower()
        in "".join(tokens.token_texts(loaded, run.ids("held_out").flatten().tolist())).replace(" ", "").lower()
    )
    if loaded.is_fast:
        x, labels, _ = absorption.context_sample(run)
        assert len(x) == len(labels) > 10
        words, at_words = absorption.word_activations(run)
        assert at_words.shape == (20, 16) and all(word.isalpha() for word in words)


def test_added_tokens_without_an_embedding_do_no_harm(tmp_path, monkeypatch):
    """As Gemma's for images, which its models of text have no row for: they come out of no text, and are no words."""
    tokenizer = KINDS["gemma"]()
    tokenizer.add_tokens(["covid", "picture"])
    run = project(tmp_path, tokenizer, monkeypatch, vocab_size=len(tokenizer) - 2)
    assert "covid" not in absorption.chosen_words(run)[0] and run.ids("train").max() < len(tokenizer) - 2


def test_a_tokenizer_of_another_model_is_refused_before_long_work(tmp_path, monkeypatch):
    run = project(tmp_path, KINDS["llama2"](), monkeypatch, vocab_size=300)
    with pytest.raises(SourceError, match=r"tokenizer of .* up to 558, the model has 300 embeddings"):
        _ = run.language_model
