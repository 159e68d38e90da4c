"""Parents that another token sets: who has which parent, probes that find planted ones, absorption that was planted."""

import pytest
import torch

from masksae import SAE, BatchTopK, SAEConfig
from masksae.errors import DataError
from masksae.metrics import absorption, contexts
from masksae.metrics.contexts import ALL, EXPLORATORY, PARENTS, context_absorption, context_probes, occurrences

BEFORE = {
    "his or her": ["his", " Her"],
    "a pronoun": [" He", " they"],
    "a negation": [" not", "'t", "n’t", " never"],
    "a comma": [",", ',"', "),"],
    "the end of a sentence": [".", '."', "?", "!)"],
    "a colon or semicolon": [":", ";", "):"],
    "a dash": [" -", " –", "--", "-"],
    "a closing parenthesis": [")", '")'],
    "a title": [" Mr", " President", "Dr"],
    "a modal verb": [" Would", " must"],
    "a form of have": [" has", "Had"],
    "a wh-word": [" who", "Which"],
    "that": [" that", "That"],
    "a subordinator": [" because", "If"],
    "a month or weekday": [" May", " Sunday"],
    "said": [" said", " told"],
    "more or less": [" more", " least"],
    "than": [" than"],
    "a possessive": ["'s", "’s"],
    "a number in letters": [" two", "Ten"],
    "an ordinal": [" first", " Next"],
    "a quantifier": [" many", "Another"],
    "an intensifier": [" very", " so"],
    "a word in -ly": [" only", "ly"],
    "a word in -ing": [" saying", "ing"],
    "a word in -ed": [" asked", "ed"],
    "the": [" the", "The"],
    "and": [" and"],
    "a": [" a", "A"],
    "in": [" in"],
    "to": [" To"],
    "of": [" of"],
    "a form of be": [" be", "were"],
    "a determiner": [" an", " the", " those"],
    "a preposition": [" of", " in", " To"],
    "a number": [" 7", "7", "2010"],
    "a capitalised word": [" Paris"],
}
"""Tokens after which a word has a parent."""
OTHERS = ["&", " green", "er", " bather", " 7th", " thE9", " president", " sunday"]
"""Tokens that give it none."""


def parents(*texts: str) -> list[set[str]]:
    """Parents at each ordinary word of a block, in the order of the words."""
    vocabulary = sorted(set(texts))
    _, labels = occurrences(torch.tensor([[vocabulary.index(text) for text in texts]]), vocabulary)
    return [{name for name, yes in zip(ALL, row) if yes} for row in labels.tolist()]


@pytest.fixture(scope="module")
def after():
    """Token -> parents of a word that follows it."""
    tokens = sorted({token for examples in BEFORE.values() for token in examples} | set(OTHERS))
    texts = [*tokens, "&", " cat"]
    blocks = torch.tensor([[len(tokens), len(tokens), i, len(tokens) + 1] for i in range(len(tokens))])
    where, labels = occurrences(blocks, texts)
    of_cat = labels[where[:, 1] == 3]
    return {token: {name for name, yes in zip(ALL, row) if yes} for token, row in zip(tokens, of_cat.tolist())}


@pytest.mark.parametrize("name", BEFORE)
def test_parents_by_the_token_before(name, after):
    assert all(name in after[token] for token in BEFORE[name])
    assert not any(name in after[token] for token in OTHERS)


def test_case_tells_names_from_words():
    assert parents("&", "&", " may", " cat")[-1] == {"a modal verb"}
    assert parents("&", "&", " president", " cat")[-1] == parents("&", "&", " sunday", " cat")[-1] == set()
    assert parents("&", "&", " Sunday", " cat")[-1] == {"a month or weekday", "a capitalised word"}


def test_parents_by_several_tokens():
    assert parents("&", " Mr", ".", " Cat") == [{"a title", "the end of a sentence"}]
    assert parents("&", " well", "-", "known", " cat")[-1] == {"a hyphen, two back"}
    assert parents("&", " not", " the", " cat")[-1] == {"a negation, two back", "the", "a determiner"}
    assert parents("&", " the", "&", " cat") == [{"the, two back"}]
    for amount in ([" $", "3"], [" ($", "4", "8", ".", "2"], ["£", "2", ",", "0", "0", "0"], ["€", "100"]):
        assert "an amount of money" in parents("&", *amount, " cat")[-1], amount
        assert "an amount of money" not in parents("&", *amount, "&", " cat")[-1], amount
    for unit in (["5", " million"], [" 21", "%"], ["4", " days"]):
        assert "a number with its unit" in parents("&", "&", *unit, " cat")[-1], unit
    assert "a number with its unit" not in parents("&", " the", " days", " cat")[-1]
    for year in ([" ", "2", "0", "1", "0"], ["-", "1", "9", "6", "1"], [" 1984"], ["(", "2007"]):
        assert "a year" in parents("&", *year, " cat")[-1], year
    for number in ([" ", "1", "2", "0", "1", "0"], [" ", "3", "0", "1", "0"], [" 1284"]):
        assert "a year" not in parents("&", *number, " cat")[-1], number


def test_parents_between_marks():
    inside = [{"inside quotes"}, set()]
    assert parents("&", ' "', "&", " cat", ' "', " dog") == inside
    brackets = [
        "&",
        ")",
        " (",
        "&",
        " cat",
        "(",
        "&",
        " cat",
        ")",
        "&",
        " cat",
        ").",
        "&",
        " cat",
    ]  # the first closes none
    assert ["inside parentheses" in found for found in parents(*brackets)] == [True, True, True, False]


def test_a_rule_does_not_look_beyond_the_beginning_of_the_block():
    texts = [" dog", "&", " cat", "&", "&", " not"]
    assert parents(*texts) == [set(), set()]  # " not" is the last token: nothing follows it but by rolling over


def test_only_words_with_two_tokens_before_them_count():
    texts = [" cat", " dog", "ing", "7", " a"]
    where, _ = occurrences(torch.tensor([[0, 1, 0, 2, 3, 4]]), texts)
    assert where.tolist() == [[0, 2]]


WORDS, PARENT = 40, 40
"""Words, and which direction and latent is the parent's. So many words that the latent of a single one tells little of
the parent."""


def sample(n=8000, d=44, seed=0):
    """Activations at n words: each of 40 words adds a direction, the first parent another; parents for a third of the
    words."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    word = torch.randint(0, WORDS, (n,), generator=generator)
    labels = torch.zeros(n, len(ALL), dtype=torch.bool)
    labels[:, 0] = torch.rand(n, generator=generator) < 0.33
    labels[:, 1] = torch.rand(n, generator=generator) < 0.33
    labels[:20, 2] = True  # too rare
    x = 2.0 * (directions[word] - directions[:WORDS].mean(0)) + 3.0 * labels[:, :1] * directions[PARENT]
    return x + 0.05 * torch.randn(n, d, generator=generator), labels, torch.arange(n) // 40, directions, word


def test_probes_find_what_is_there_and_no_more():
    x, labels, block, directions, _ = sample()
    probes = context_probes(x, labels, block, positives=2000)
    assert [p.name for p in probes] == list(ALL[:2])  # the third occurs twenty times
    first, nothing = probes
    assert first.f1 > 0.99 and torch.nn.functional.cosine_similarity(first.weight, directions[PARENT], dim=0) > 0.95
    assert nothing.f1 < 0.6
    assert first.positive.sum() == 2000 and len(first.rows) == 4000 == len(set(first.rows.tolist()))
    tested = set(block[first.rows[first.is_test]].tolist())
    assert tested and not tested & set(block[first.rows[~first.is_test]].tolist())  # whole blocks


def planted(directions, absorbing: bool) -> SAE:
    """A latent for each word and one for the parent. Absorbing: after the parent, word 0 has another latent that
    carries the parent too, and the parent's keeps silent."""
    sae = SAE(SAEConfig(len(directions), WORDS + 2, BatchTopK(2)))
    parent, word, both = directions[PARENT], directions[0], directions[PARENT] + directions[0]
    with torch.no_grad():
        encoder, bias = torch.zeros(WORDS + 2, len(directions)), torch.full((WORDS + 2,), -0.5)
        encoder[: WORDS + 1] = directions[: WORDS + 1]
        if absorbing:
            encoder[PARENT], bias[PARENT] = parent - 2 * word, -1.0
            encoder[-1], bias[-1] = 2 * both, -7.0
        sae.W_enc.copy_(encoder.t())
        sae.b_enc.copy_(bias)
        sae.W_dec.copy_(torch.cat([directions[: WORDS + 1], torch.nn.functional.normalize(both, dim=0)[None]]))
        sae.b_dec.zero_()
        sae.threshold.fill_(0.0)
    return sae.requires_grad_(False)


def test_planted_absorption_is_measured():
    x, labels, block, directions, word = sample()
    probes = context_probes(x, labels, block, positives=2000)
    clean = context_absorption(planted(directions, False), x, probes, min_parents=1)
    assert clean.mean_full == 0 and clean.letters[0].main == (PARENT,) and clean.excluded == tuple(PARENTS)[1:]
    found = context_absorption(planted(directions, True), x, probes, min_parents=1)
    [first] = found.letters
    tested = probes[0].rows[probes[0].is_test & probes[0].positive]
    assert first.main == (PARENT,) and first.words == len(tested)
    assert first.full == pytest.approx((word[tested] == 0).double().mean().item())
    assert found.mean_full == first.full > 0.01


def test_the_two_sets_are_scored_apart():
    x, labels, block, directions, word = sample()
    labels[:, len(PARENTS)] = labels[:, 0]  # an exploratory parent that holds at the same words
    probes = context_probes(x, labels, block, positives=2000)
    assert [p.name for p in probes if p.f1 > 0.6] == [ALL[0], "the"]
    sae = planted(directions, True)
    decides = context_absorption(sae, x, probes, min_parents=1)
    shown = context_absorption(sae, x, probes, among=EXPLORATORY, min_parents=1)
    assert [r.letter for r in decides.letters] == [ALL[0]] and decides.excluded == tuple(PARENTS)[1:]
    assert [r.letter for r in shown.letters] == ["the"] and shown.excluded == tuple(EXPLORATORY)[1:]
    with pytest.raises(DataError, match=r"Only 1 parents .*2 are needed"):
        context_absorption(sae, x, probes, min_parents=2)  # the other set does not count


def test_an_occurrence_of_several_probes_is_encoded_once(monkeypatch):
    x, labels, block, directions, _ = sample()
    labels[:, 1] = labels[:, 0]  # the same occurrences, of which others are drawn
    probes, sae = context_probes(x, labels, block, positives=2000), planted(directions, True)
    encoded = []
    latents = sae.latents
    monkeypatch.setattr(sae, "latents", lambda part, threshold: encoded.append(len(part)) or latents(part, threshold))
    found = contexts.probe_latents(sae, x, probes)
    used = torch.cat([probe.rows for probe in probes])
    assert sum(encoded) == len(used.unique()) < len(used)
    for probe in probes:
        assert torch.allclose(torch.from_numpy(found[probe.name].toarray()), latents(x[probe.rows], None), atol=1e-5)
    one_by_one = context_absorption(sae, x, probes, min_parents=1)
    assert context_absorption(sae, x, probes, min_parents=1, latents=found) == one_by_one


def test_an_sae_in_half_precision_on_activations_in_double():
    x, labels, block, directions, _ = sample()
    probes, sae = context_probes(x, labels, block, positives=2000), planted(directions, True)
    in_double = context_probes(x.double(), labels, block, positives=2000)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(probes, in_double))
    exact = context_absorption(sae, x, probes, min_parents=1)
    found = context_absorption(sae.bfloat16(), x.double(), in_double, min_parents=1)
    assert found.mean_full == pytest.approx(exact.mean_full, abs=0.005) and found.letters[0].main == (PARENT,)


def test_too_few_parents_is_an_error_that_names_them():
    x, labels, block, directions, _ = sample()
    probes = context_probes(x, labels, block, positives=2000)
    with pytest.raises(DataError, match=r"Only 1 parents.*2 are needed.*a pronoun 0\..*contexts.tokens"):
        context_absorption(planted(directions, False), x, probes, min_parents=2)


def test_what_was_explored_does_not_decide(after):
    """A parent of the new set is no old one under another name: no two hold after the same of the examples."""
    assert len(PARENTS) >= 16 and len(EXPLORATORY) == 13 and not set(PARENTS) & set(EXPLORATORY)
    held = {name: frozenset(token for token, found in after.items() if name in found) for name in BEFORE}
    assert len(set(held.values())) == len(held)


def test_lists_of_words_have_no_overlap_that_would_make_a_parent_trivial():
    assert not set(contexts.PREPOSITIONS.split()) & set(contexts.DETERMINERS.split())


def test_occurrences_that_do_not_count_leave_the_means():
    x, labels, block, directions, word = sample()
    probes, sae = context_probes(x, labels, block, positives=2000), planted(directions, True)
    everything, rest = (context_absorption(sae, x, probes, min_parents=1, counted=c) for c in (None, word != 0))
    assert rest.mean_full == 0 < everything.mean_full and rest.letters[0].main == everything.letters[0].main
    tested = probes[0].rows[probes[0].is_test]
    assert rest.words_left_out == int((word[tested] == 0).sum()) and everything.words_left_out == 0
    assert everything.mean_specific == everything.mean_full and everything.main_f1 == everything.letters[0].f1


def test_units_of_the_standard_deviation_are_torchs():
    f = torch.relu(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    found = contexts.in_deviations(absorption.as_sparse(f)).toarray()
    torch.testing.assert_close(torch.from_numpy(found).float(), f / f.std(0))
