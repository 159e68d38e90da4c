"""Look at one parent of an SAE: what it fires on, which words its main latents miss, and who absorbed those; notebook
10.

Scores say how often a parent is absorbed; a `Story` names the words and the absorbers, by the very rule of the score.
"""

import html
from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.errors import ConfigError, nearest
from masksae.metrics.absorption import AbsorptionResult, LetterResult, absorbed, first_letter
from masksae.metrics.contexts import context_absorption
from masksae.metrics.probes import first_letters
from masksae.parallel import once
from masksae.saes.sae import SAE, at_least_single
from masksae.study.inputs import Inputs
from masksae.study.report.tables import cells, to_html
from masksae.study.scores.absorption import context_probes, context_sample, letter_task, vocabulary

BEFORE, AFTER = 8, 4
"""Tokens shown around the one that fires."""


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
    """Fully absorbed test words: the word, its absorber, the share of the parent's direction that the absorber carries,
    the absorber's decoder cosine with that direction and with the first main latent, and on which share of all words it
    fires."""
    main_cosine: float
    """Decoder cosine of the first main latent with the parent's direction."""


class Explorer:
    """Looks at SAEs of a run's model; what does not depend on the SAE is computed once."""

    def __init__(self, run: Inputs):
        self.run = run

    def letter(self, sae: SAE, letter: str, threshold: float | None = None) -> Story:
        """The parent "starts with `letter`", on words in the prompts of the first-letter task."""
        words, x, probe = letter_task(self.run)
        [number] = first_letters([letter])
        metric = first_letter(sae, x, words, probe=probe, threshold=threshold, min_letters=1)
        sample = (x, words, first_letters(words) == number, probe.is_test, probe.weight[number])
        return _story(f"starts with {letter.upper()}", sae, _of(metric, letter.lower()), *sample, threshold=threshold)

    def context(self, sae: SAE, parent: str, threshold: float | None = None) -> Story:
        """The parent "follows `parent`", on words of held-out text. Raises ConfigError for a parent without a probe."""
        x, probes, texts = self._contexts
        probe = next((probe for probe in probes if probe.name == parent), None)
        if probe is None:
            raise ConfigError(f"There is no parent {parent!r} here.{nearest(parent, [probe.name for probe in probes])}")
        metric = context_absorption(sae, x, [probe], among=[parent], min_parents=1, threshold=threshold)
        names = [texts[i] for i in probe.rows.tolist()]
        sample = (x[probe.rows], names, probe.positive, probe.is_test, probe.weight)
        return _story(f"follows {parent}", sae, _of(metric, parent), *sample, threshold=threshold)

    def top_contexts(self, sae: SAE, latent: int, n: int = 5, threshold: float | None = None) -> str:
        """HTML: the places in held-out text where a latent fires most, at most one a block, tokens shaded by how
        strongly it fires."""
        ids = self.run.ids("held_out")[:, len(self.run.start) :]
        fires = torch.cat(
            [sae.encode(part.to(sae.device), threshold)[:, latent].cpu() for part in self.run.held_out.split(4096)]
        ).view(ids.shape)
        best, where = fires.max(1)
        lines = []
        for block in best.argsort(descending=True)[:n].tolist():
            if best[block] > 0:
                lines.append(_line(self._texts, ids[block], fires[block] / best.max(), int(where[block])))
        return "".join(lines) or "<p>It fires nowhere in the held-out text.</p>"

    @once
    def _texts(self) -> list[str]:
        return vocabulary(self.run.language_model.tokenizer)

    @once
    def _contexts(self):
        ids = self.run.ids("contexts")
        _, _, where = context_sample(self.run)
        shown = ["".join(self._texts[t] for t in ids[b, max(0, i - 3) : i + 1].tolist()) for b, i in where.tolist()]
        x, probes, _ = self.run.shared("contexts", lambda: context_probes(self.run))
        return x, probes, shown


def _of(result: AbsorptionResult, name: str) -> LetterResult:
    """One parent of a result. Raises ConfigError if it did not pass the probe gate."""
    passed = next((letter for letter in result.letters if letter.letter == name), None)
    if passed is None:
        raise ConfigError(f"{name!r} does not pass the probe gate here. Left out: {', '.join(result.excluded)}.")
    return passed


@torch.no_grad()
def _story(
    parent: str, sae: SAE, metric: LetterResult, x: Tensor, words: list[str], positive: Tensor, is_test: Tensor,
    direction: Tensor, *, threshold: float | None,
) -> Story:  # fmt: skip
    f, w_dec = sae.latents(x, threshold), at_least_single(sae.W_dec.cpu())
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
            "share": share,
            "cosine with parent": (rows[latent] @ direction).item(),
            "cosine with main": (rows[latent] @ main).item(),
            "fires on": (f[:, latent] > 0).double().mean().item(),
        }
        for word, latent, share in zip(mine.tolist(), by.tolist(), shares.tolist())
    ]
    tested = int((is_test & positive).sum())
    return Story(parent, metric.main, metric.f1, tested, missed, (main @ direction).item())


def _line(texts: list[str], ids: Tensor, strength: Tensor, at: int) -> str:
    """One context, the strongest token framed."""
    parts = []
    for i in range(max(0, at - BEFORE), min(len(ids), at + AFTER + 1)):
        text = html.escape(texts[int(ids[i])]).replace("\n", "↵")
        frame = "outline:1px solid #d55e00;" if i == at else ""
        parts.append(f'<span style="background:rgba(213,94,0,{0.6 * strength[i]:.2f});{frame}">{text}</span>')
    return f'<div style="white-space:pre-wrap;line-height:1.6">… {"".join(parts)} …</div>'


def side_by_side(columns: dict[str, str]) -> str:
    """HTML: pieces beside each other under their names."""
    cell = '<div style="flex:1;min-width:20em"><b>{}</b>{}</div>'
    inside = "".join(cell.format(html.escape(name), body) for name, body in columns.items())
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{inside}</div>'


def story_html(story: Story, rows: int = 8) -> str:
    """HTML: one line about the main latents, and the words they miss with who absorbed them."""
    share = len(story.missed) / max(1, story.tested)
    told = f"F1 {story.f1:.2f}, decoder cosine with the parent {story.main_cosine:.2f}"
    main = f"main latents {', '.join(map(str, story.main))} ({told})"
    missed = f"{len(story.missed)} of {story.tested} test words absorbed ({share:.0%})"
    head = f"<p>{html.escape(story.parent)}: {main}; {missed}</p>"
    if not story.missed:
        return head
    table = sorted(story.missed, key=lambda row: row["share"], reverse=True)[:rows]
    return head + to_html(cells(table, form=_two_digits))


def _two_digits(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
