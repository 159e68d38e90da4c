"""A page to look at latents without a terminal: every letter and context, the SAEs of all arms side by side, the words
they miss and who absorbed them, where each latent fires. It stands alone: one file, its script and data inside."""

import json
from itertools import chain
from pathlib import Path

from masksae.files import write_text
from masksae.saes.sae import SAE
from masksae.study.explore import Explorer, Place, Story
from masksae.study.report.page import page

TEMPLATE = Path(__file__).with_name("latents.html")
MISSED, PLACES = 10, 4
"""Shown of each: missed words of a parent, those first on which the absorber carries most; places of a latent."""
COLUMNS = ("word", "absorber", "carried", "cosine with parent", "fires on")
"""Of a missed word, in the order in which the script takes them."""


def write(look: Explorer, saes: dict[str, SAE], file: Path, note: str) -> Path:
    """Write the page about SAEs, by their names (arms); `note` says what they are. Returns `file`."""
    kinds = {
        "first letter": {name: look.letters(sae) for name, sae in saes.items()},
        "what came before": {name: look.contexts(sae) for name, sae in saes.items()},
    }
    places = {name: look.places(sae, _latents(kinds, name), PLACES) for name, sae in saes.items()}
    write_text(file, render(kinds, places, note))
    return file


def render(kinds: dict[str, dict[str, dict[str, Story]]], places: dict[str, dict[int, list[Place]]], note: str) -> str:
    """The page, of stories by kind, SAE and parent, and of places by SAE and latent."""
    data = {
        "saes": list(places),
        "kinds": {
            kind: {name: {parent: _story(story) for parent, story in told.items()} for name, told in by_sae.items()}
            for kind, by_sae in kinds.items()
        },
        "places": {
            name: {latent: list(map(_place, some)) for latent, some in of.items()} for name, of in places.items()
        },
        "note": note,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # ends no script
    return page("Latents, side by side", TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text))


def _latents(kinds: dict[str, dict[str, dict[str, Story]]], sae: str) -> list[int]:
    """All that the page names of an SAE."""
    stories = chain.from_iterable(by_sae[sae].values() for by_sae in kinds.values())
    named = ((*story.main, *(row["absorber"] for row in story.clearest(MISSED))) for story in stories)
    return sorted(set(chain.from_iterable(named)))


def _story(story: Story) -> dict:
    rows = [
        [round(row[key], 3) if isinstance(row[key], float) else row[key] for key in COLUMNS]
        for row in story.clearest(MISSED)
    ]
    return {
        "parent": story.parent,
        "main": story.main,
        "f1": round(story.f1, 3),
        "cosine": round(story.main_cosine, 3),
        "missed": len(story.missed),
        "tested": story.tested,
        "rows": rows,
    }


def _place(place: Place) -> list:
    return [place.tokens, [round(strength, 2) for strength in place.strengths], place.at]
