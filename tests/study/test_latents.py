"""The page of latents: its data are the stories and places, text of a reader's own is only ever text, and in a browser
it shows what the address asks for, without a network and without a message."""

import json
import re

import pytest
from browser import CHROMIUM, opened, said

from masksae.study.explore import Place, Story
from masksae.study.report import latents

WORD = "</script><b>s"


def story(parent, main, absorber, words):
    same = {"cosine with parent": 0.3, "cosine with main": 0.1, "fires on": 0.02}
    rows = [
        {"word": word, "absorber": absorber, "carried": i, "share": 0.9 - i / 100} | same
        for i, word in enumerate(words)
    ]
    return Story(parent, (main,), 0.75, 40, rows, 0.5)


@pytest.fixture(scope="module")
def text():
    s, t = story("starts with S", 3, 7, [WORD, *map(str, range(14))]), story("starts with T", 4, 7, ["tea"])
    letters = {"unmasked": {"s": s, "t": t}, "kept": {"s": story("starts with S", 5, 9, [])}}
    contexts = {name: {"the": story("follows the", 6, 8, ["a cat"])} for name in letters}
    places = {name: {latent: [Place((" of", WORD), (0.1, 1.0), 1)] for latent in (3, 5)} for name in letters}
    return latents.render({"first letter": letters, "what came before": contexts}, places, "A note <here>.")


def test_the_page_holds_what_it_was_given(text):
    data = json.loads(re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', text)[1])
    told = data["kinds"]["first letter"]["unmasked"]["s"]
    assert told["missed"] == 15 and told["tested"] == 40 and len(told["rows"]) == latents.MISSED
    assert told["rows"][0] == ["13", 7, 14, 0.3, 0.02]  # the one that carries most comes first
    assert data["places"]["kept"]["5"] == [[[" of", WORD], [0.1, 1.0], 1]]
    assert WORD not in text and text.count("</script>") == 2 and "http" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    "address, shown, absent",
    [
        (
            "",
            ["starts with S", "15 of 40 test words absorbed (38&nbsp;%); the first 10:", "Latent 5 fires most at:"],
            ["tea"],
        ),
        ("#first%20letter/t", ["starts with T", ">tea<", "does not pass its gate"], ["15 of 40"]),
        ("#what%20came%20before/the", ["follows the", ">a cat<", "Latent 6 fires nowhere"], ["tea"]),
        ("#nonsense/x", ["starts with S"], ["follows the"]),
    ],
)
def test_a_browser_shows_the_parent_of_the_address(text, address, shown, absent, tmp_path):
    (tmp_path / "latents.html").write_text(text, encoding="utf-8")
    found = opened(f"file://{tmp_path}/latents.html{address}")
    body = re.sub(r"(?s)<(script|noscript).*?</\1>", "", found.stdout)
    assert all(words in body for words in shown) and not any(words in body for words in absent)
    assert "A note &lt;here&gt;." in body and said(found.stderr) == []
