"""Parents that another token sets: who has which parent, probes that find planted ones, absorption that was planted."""

import pytest
import torch

from masksae import SAE, BatchTopK, SAEConfig
from masksae.errors import DataError
from masksae.metrics import absorption, contexts
from masksae.metrics.contexts import PARENTS, context_absorption, context_probes, occurrences

TEXTS = [
    " the",
    " cat",
    " To",
    " be",
    " 7",
    "7",
    " Paris",
    "ing",
    ' "',
    " of",
    " an",
    " and",
    " in",
    " a",
    "The",
    " dog",
]
ID = {text: i for i, text in enumerate(TEXTS)}


def parents(*texts: str) -> list[set[str]]:
    """Parents at each ordinary word of a block."""
    _, labels = occurrences(torch.tensor([[ID[text] for text in texts]]), TEXTS)
    return [{name for name, yes in zip(PARENTS, row) if yes} for row in labels.tolist()]


def test_parents_by_the_token_before():
    assert parents("ing", " the", " cat") == [{"the", "a determiner"}]
    assert parents("ing", "The", " cat") == [{"the", "a determiner"}]
    assert parents("ing", " To", " cat") == [{"to", "a preposition"}]
    assert parents("ing", " of", " cat") == [{"of", "a preposition"}]
    assert parents("ing", " in", " cat") == [{"in", "a preposition"}]
    assert parents("ing", " an", " cat") == [{"a determiner"}]
    assert parents("ing", " a", " cat") == [{"a", "a determiner"}]
    assert parents("ing", "ing", " and", " cat") == [set(), {"and"}]  # " and" is an ordinary word itself
    assert parents("ing", " 7", " cat") == [{"a number"}] == parents("ing", "7", " cat")
    assert parents("ing", " be", " cat") == [{"a form of be"}]
    assert parents("ing", " Paris", " cat")[-1] == {"a capitalised word"}
    assert parents("ing", " the", " cat", " dog")[-1] == {"the, two back"}
    assert parents(' "', "ing", " cat", ' "', " dog") == [{"inside quotes"}, set()]


def test_only_words_with_two_tokens_before_them_count():
    where, _ = occurrences(torch.tensor([[ID[" cat"], ID[" dog"], ID[" cat"], ID["ing"], ID["7"], ID[" a"]]]), TEXTS)
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
    labels = torch.zeros(n, len(PARENTS), dtype=torch.bool)
    labels[:, 0] = torch.rand(n, generator=generator) < 0.33
    labels[:, 1] = torch.rand(n, generator=generator) < 0.33
    labels[:20, 2] = True  # too rare
    x = 2.0 * (directions[word] - directions[:WORDS].mean(0)) + 3.0 * labels[:, :1] * directions[PARENT]
    return x + 0.05 * torch.randn(n, d, generator=generator), labels, torch.arange(n) // 40, directions, word


def test_probes_find_what_is_there_and_no_more():
    x, labels, block, directions, _ = sample()
    probes = context_probes(x, labels, block, positives=2000)
    assert [p.name for p in probes] == ["the", "and"]  # the third occurs twenty times
    the, nothing = probes
    assert the.f1 > 0.99 and torch.nn.functional.cosine_similarity(the.weight, directions[PARENT], dim=0) > 0.95
    assert nothing.f1 < 0.6
    assert the.positive.sum() == 2000 and len(the.rows) == 4000 == len(set(the.rows.tolist()))
    tested = set(block[the.rows[the.is_test]].tolist())
    assert tested and not tested & set(block[the.rows[~the.is_test]].tolist())  # whole blocks


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
    assert clean.mean_full == 0 and clean.letters[0].main == (PARENT,) and "and" in clean.excluded
    found = context_absorption(planted(directions, True), x, probes, min_parents=1)
    [the] = found.letters
    tested = probes[0].rows[probes[0].is_test & probes[0].positive]
    assert the.main == (PARENT,) and the.words == len(tested)
    assert the.full == pytest.approx((word[tested] == 0).double().mean().item())
    assert found.mean_full == the.full > 0.01


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
    with pytest.raises(DataError, match=r"Only 1 parents.*2 are needed.*and 0\..*contexts.tokens"):
        context_absorption(planted(directions, False), x, probes, min_parents=2)


def test_the_word_list_has_no_overlap_that_would_make_a_parent_trivial():
    prepositions, determiners = (set(contexts.BEFORE[key].split()) for key in ("a preposition", "a determiner"))
    assert not prepositions & determiners and len(PARENTS) == 13 == len(set(PARENTS))


def test_sinks_are_rows_of_outlying_norm():
    x = torch.ones(100, 4)
    x[7] *= 3.5
    x[8] *= 2.5
    assert contexts.sinks(x).nonzero().tolist() == [[7]]


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
