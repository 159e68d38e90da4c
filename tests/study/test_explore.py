"""The explorer on a tiny run: stories of letters and contexts agree with the metric's rule, contexts show the tokens
that fire."""

from types import SimpleNamespace

import pytest
import torch
from tiny_project import profile

from masksae import Run
from masksae.errors import ConfigError, DataError
from masksae.metrics.absorption import absorbed
from masksae.metrics.contexts import ContextProbe
from masksae.study import explore
from masksae.study.figures import absorption, style


@pytest.fixture
def look(project):
    run = Run(profile(project))
    return explore.Explorer(run), run.saes["unmasked-plain-s0"]


def planted():
    """Ten words of parent E1 and ten without; latent 0 is for the parent and misses the first word, where latent 1
    stands in."""
    x = torch.zeros(20, 3)
    x[:, 0] = torch.tensor([3.0] * 10 + [0.0] * 10)
    x[:, 2] = 1.0
    x[0] = torch.tensor([3.0, 5.0, 1.0])
    return x, [f" word{i}" for i in range(20)], torch.arange(20) < 10, torch.arange(20) % 2 == 0


def test_a_story_names_the_missed_word_and_its_absorber():
    from masksae import SAE, BatchTopK, SAEConfig

    sae = SAE(SAEConfig(3, 3, BatchTopK(2)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
        sae.b_enc.zero_(), sae.b_dec.zero_(), sae.threshold.fill_(0.0)
    x, words, positive, is_test = planted()
    direction = torch.tensor([2.0, 0.0, 0.0])
    metric = SimpleNamespace(main=(0,), f1=0.9)
    story = explore._story("p", sae, metric, x, sae.latents(x), words, positive, is_test, direction)
    assert story.main == (0,) and story.tested == 5 and story.main_cosine == pytest.approx(1.0)
    [missed] = story.missed
    assert missed["word"] == "word0" and missed["absorber"] == 1
    assert missed["share"] == pytest.approx(5 * 0.6 / 3) and missed["fires on"] == pytest.approx(1 / 20)
    assert missed["cosine with parent"] == pytest.approx(0.6) == missed["cosine with main"]
    full, _ = absorbed(x, sae.encode(x), sae.W_dec, direction, story.main)
    assert (full & is_test & positive).sum() == 1
    page = explore.story_html(story)
    assert "word0" in page and "1 of 5 test words absorbed (20%)" in page
    figure = absorption.draw_absorbers(
        {"first letter": {"unmasked": story, "masked": story}, "context": {"unmasked": story}}
    )
    figure.canvas.draw()
    assert "1 words, 1 absorbers" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_where_nothing_is_absorbed_the_picture_says_so():
    story = explore.Story("p", (0,), 0.9, 5, [], 1.0)
    figure = absorption.draw_absorbers({"first letter": {"unmasked": story, "masked": story}})
    figure.canvas.draw()
    assert "0 words, 0 absorbers" in figure.axes[0].get_legend().get_texts()[1].get_text()


def test_top_contexts_frame_the_token_that_fires_most(look):
    explorer, sae = look
    fires = sae.encode(explorer.run.held_out)
    latent = int(fires.sum(0).argmax())
    page = explorer.top_contexts(sae, latent)
    assert page.count("outline") == explore.PLACES and "0.60" in page
    silent = int(fires.sum(0).argmin())
    if fires[:, silent].sum() == 0:
        assert "fires nowhere" in explorer.top_contexts(sae, silent)
    place = explore._place(["<b>", "x"], torch.tensor([0, 1]), torch.tensor([0.1, 0.9]), 1)
    assert "&lt;" in explore._line(place) and place.tokens == ("<b>", "x") and place.at == 1


def test_contexts_are_those_that_pass_the_probe_gate():
    from masksae import SAE, BatchTopK, SAEConfig

    sae = SAE(SAEConfig(3, 3, BatchTopK(2)))
    x, words, positive, is_test = planted()
    sample = (torch.arange(20), positive, is_test, torch.tensor([2.0, 0.0, 0.0]), torch.tensor(-1.0))
    looker = explore.Explorer(None)
    probes = [ContextProbe("the", *sample, 0.9), ContextProbe("of", *sample, 0.5)]
    looker.__dict__["_contexts"] = (x, probes, words)
    stories = looker.contexts(sae)
    assert list(stories) == ["the"] and stories["the"].tested == 5
    assert looker.context(sae, "the") == stories["the"]
    with pytest.raises(DataError, match="of 0.50"):
        looker.context(sae, "of")


def test_an_unknown_parent_is_named(look):
    explorer, sae = look
    explorer.__dict__["_contexts"] = (torch.zeros(1, 16), [], [])
    with pytest.raises(ConfigError, match="no parent 'teh'") as caught:
        explorer.context(sae, "teh")
    assert str(caught.value).count("Known:") == 1


def test_the_style_suits_light_and_dark_pages():
    import matplotlib

    style.style()
    assert matplotlib.rcParams["figure.facecolor"] == matplotlib.rcParams["axes.facecolor"] == "none"
    assert all(matplotlib.rcParams[key] == style.GREY for key in ("text.color", "xtick.color", "axes.labelcolor"))
