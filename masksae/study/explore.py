"""Look at one parent of an SAE: what it fires on, which words its main latents miss, and who absorbed those; notebook
10.

Scores say how often a parent is absorbed; a `Story` names the words and the absorbers, by the very rule of the score.
"""

import html
from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.data.tokens import token_texts
from masksae.errors import ConfigError, nearest
from masksae.metrics.absorption import LetterResult, absorbed, first_letter
from masksae.metrics.contexts import context_absorption
from masksae.metrics.probes import first_letters
from masksae.parallel import once
from masksae.saes.sae import SAE, at_least_single
from masksae.study.inputs import Inputs
from masksae.study.report.tables import cells, to_html
from masksae.study.scores.absorption import context_probes, context_sample, letter_task

BEFORE, AFTER = 8, 4
"""Tokens shown around the one that fires."""
PLACES, ROWS = 5, 8
"""Places shown of a latent, and missed words of a parent."""


@dataclass(frozen=True)
class Story:
    """One parent of one SAE."""

    parent: str
    main: tuple[int, ...]
    """Main latents."""
    f1: float
    """Of the main latents on the test words."""
    tested: int
    """Test words with the parent."""
    missed: list[dict]
    """Fully absorbed test words: the word, its absorber, how much of the parent's direction that carries ("carried", in
    units of the activations) and which share of what the word needs, the absorber's decoder cosine with that direction
    and with the first main latent, and on which share of all words it fires."""
    main_cosine: float
    """Decoder cosine of the first main latent with the parent's direction."""

    def clearest(self, n: int) -> list[dict]:
        """Of `missed`, the `n` words on which the absorber carries most, those first. Not by its share: that is largest
        where there is hardly anything to carry."""
        return sorted(self.missed, key=lambda row: row["carried"], reverse=True)[:n]


@dataclass(frozen=True)
class Place:
    """A place in held-out text where a latent fires."""

    tokens: tuple[str, ...]
    """The token that fires most, and those around it."""
    strengths: tuple[float, ...]
    """Of each token, in shares of the strongest that the latent ever fires."""
    at: int
    """Which of them fires most."""


class Explorer:
    """Looks at SAEs of a run's model; what does not depend on the SAE is computed once."""

    def __init__(self, run: Inputs):
        self.run = run

    def letters(self, sae: SAE) -> dict[str, Story]:
        """The parents "starts with LETTER" by letter, on words in the prompts of the first-letter task; those that pass
        the probe gate."""
        return self._letters(sae)[0]

    def letter(self, sae: SAE, letter: str) -> Story:
        """One of `letters`. Raises ConfigError for one that does not pass the probe gate."""
        stories, excluded = self._letters(sae)
        return _passed(stories, letter.lower(), excluded)

    def _letters(self, sae: SAE) -> tuple[dict[str, Story], tuple[str, ...]]:
        words, x, probe = letter_task(self.run)
        metric = first_letter(sae, x, words, probe=probe, min_letters=1)
        stories, first, f = {}, first_letters(words), sae.latents(x)
        for found in metric.letters:
            [number] = first_letters([found.letter])
            sample = (x, f, words, first == number, probe.is_test, probe.weight[number])
            stories[found.letter] = _story(f"starts with {found.letter.upper()}", sae, found, *sample)
        return stories, metric.excluded

    def contexts(self, sae: SAE) -> dict[str, Story]:
        """The parents "follows PARENT" by parent, on words of held-out text; those that have a probe and pass its
        gate."""
        return self._stories_of_contexts(sae, [probe.name for probe in self._contexts[1]])[0]

    def context(self, sae: SAE, parent: str) -> Story:
        """One of `contexts`. Raises ConfigError for a parent without a probe, or one that does not pass its gate."""
        known = [probe.name for probe in self._contexts[1]]
        if parent not in known:
            raise ConfigError(f"There is no parent {parent!r} here.{nearest(parent, known)}")
        stories, excluded = self._stories_of_contexts(sae, [parent])
        return _passed(stories, parent, excluded)

    def _stories_of_contexts(self, sae: SAE, parents: list[str]) -> tuple[dict[str, Story], tuple[str, ...]]:
        x, probes, texts = self._contexts
        metric = context_absorption(sae, x, probes, among=parents, min_parents=1)
        stories, by_name = {}, {probe.name: probe for probe in probes}
        for found in metric.letters:
            probe = by_name[found.letter]
            names, mine = [texts[i] for i in probe.rows.tolist()], x[probe.rows]
            sample = (mine, sae.latents(mine), names, probe.positive, probe.is_test, probe.weight)
            stories[probe.name] = _story(f"follows {probe.name}", sae, found, *sample)
        return stories, metric.excluded

    def places(self, sae: SAE, latents: list[int], n: int) -> dict[int, list[Place]]:
        """By latent, the `n` places in held-out text where it fires most, at most one a block, the strongest first."""
        ids = self.run.ids("held_out")[:, len(self.run.start) :]
        fires = torch.cat(
            [sae.encode(part.to(sae.device))[:, latents].cpu() for part in self.run.held_out_all.split(4096)]
        ).view(*ids.shape, len(latents))
        best, where = fires.max(1)
        found: dict[int, list[Place]] = {latent: [] for latent in latents}
        for i, latent in enumerate(latents):
            for block in best[:, i].argsort(descending=True, stable=True)[:n].tolist():
                if best[block, i] > 0:
                    strength = fires[block, :, i] / best[:, i].max()
                    found[latent].append(_place(self._texts, ids[block], strength, int(where[block, i])))
        return found

    def top_contexts(self, sae: SAE, latent: int) -> str:
        """HTML of a latent's `places`, tokens shaded by how strongly it fires."""
        lines = [_line(place) for place in self.places(sae, [latent], PLACES)[latent]]
        return "".join(lines) or "<p>It fires nowhere in the held-out text.</p>"

    @once
    def _texts(self) -> list[str]:
        return token_texts(self.run.language_model.tokenizer)

    @once
    def _contexts(self):
        ids = self.run.ids("contexts")
        _, _, where = context_sample(self.run)
        shown = ["".join(self._texts[t] for t in ids[b, max(0, i - 3) : i + 1].tolist()) for b, i in where.tolist()]
        x, probes, _ = self.run.shared("contexts", lambda: context_probes(self.run))
        return x, probes, shown


def _passed(stories: dict[str, Story], name: str, excluded: tuple[str, ...]) -> Story:
    if name not in stories:
        raise ConfigError(f"{name!r} does not pass the probe gate here. Left out: {', '.join(excluded)}.")
    return stories[name]


@torch.no_grad()
def _story(
    parent: str, sae: SAE, metric: LetterResult, x: Tensor, f: Tensor, words: list[str], positive: Tensor,
    is_test: Tensor, direction: Tensor,
) -> Story:  # fmt: skip
    w_dec = at_least_single(sae.W_dec.cpu())
    rows, direction = torch.nn.functional.normalize(w_dec, dim=1), direction / direction.norm()
    mine = (is_test & positive).nonzero().squeeze(1)
    full, _ = absorbed(x[mine], f[mine], w_dec, direction, metric.main)
    mine = mine[full]
    carried, by = (f[mine] * (w_dec @ direction)).max(1)
    shares, main = carried / (x[mine] @ direction), rows[metric.main[0]]
    missed = [
        {
            "word": words[word].strip(),
            "absorber": latent,
            "carried": amount,
            "share": share,
            "cosine with parent": (rows[latent] @ direction).item(),
            "cosine with main": (rows[latent] @ main).item(),
            "fires on": (f[:, latent] > 0).double().mean().item(),
        }
        for word, latent, amount, share in zip(mine.tolist(), by.tolist(), carried.tolist(), shares.tolist())
    ]
    tested = int((is_test & positive).sum())
    return Story(parent, metric.main, metric.f1, tested, missed, (main @ direction).item())


def _place(texts: list[str], ids: Tensor, strength: Tensor, at: int) -> Place:
    first, last = max(0, at - BEFORE), min(len(ids), at + AFTER + 1)
    tokens = tuple(texts[i] for i in ids[first:last].tolist())
    return Place(tokens, tuple(strength[first:last].tolist()), at - first)


def _line(place: Place) -> str:
    """One place, the strongest token framed."""
    parts = []
    for i, (token, strength) in enumerate(zip(place.tokens, place.strengths)):
        text = html.escape(token).replace("\n", "↵")
        frame = "outline:1px solid #d55e00;" if i == place.at else ""
        parts.append(f'<span style="background:rgba(213,94,0,{0.6 * strength:.2f});{frame}">{text}</span>')
    return f'<div style="white-space:pre-wrap;line-height:1.6">… {"".join(parts)} …</div>'


def side_by_side(columns: dict[str, str]) -> str:
    """HTML: pieces beside each other under their names."""
    cell = '<div style="flex:1;min-width:20em"><b>{}</b>{}</div>'
    inside = "".join(cell.format(html.escape(name), body) for name, body in columns.items())
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{inside}</div>'


def story_html(story: Story) -> str:
    """HTML: one line about the main latents, and the words they miss with who absorbed them."""
    share = len(story.missed) / max(1, story.tested)
    told = f"F1 {story.f1:.2f}, decoder cosine with the parent {story.main_cosine:.2f}"
    main = f"main latents {', '.join(map(str, story.main))} ({told})"
    missed = f"{len(story.missed)} of {story.tested} test words absorbed ({share:.0%})"
    head = f"<p>{html.escape(story.parent)}: {main}; {missed}</p>"
    if not story.missed:
        return head
    return head + to_html(cells(story.clearest(ROWS), form=_two_digits))


def _two_digits(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
