"""What a run will be decided on, written down before its data: docs/preregistration.md, out of a profile.

`python tools/pages.py` writes the page. Once it is committed, whatever differs from it is exploratory, and notebook 09
says what does.
"""

import difflib
import re

import yaml

from masksae.files import repository, run_id
from masksae.metrics.contexts import EXPLORATORY, PARENTS
from masksae.study.profile import Profile
from masksae.study.report.claims import CLAIMS
from masksae.study.report.labels import words
from masksae.study.report.tables import to_markdown
from masksae.study.sections import Endpoint

PAGE = "docs/preregistration.md"

PROFILES = ("laptop", "overnight")
"""Those that it speaks of."""

ASIDE = ("decisions", "simulation", "perturbation", "description", "keep_pairs", "variants")
"""Keys of a profile that do not stand among what is trained and scored: told before it, or without a say in it."""

HEAD = """# What is decided, and how, before the data

Written by `python tools/pages.py` from the `decisions` of each profile, and committed before the first masked SAE of it
is trained; the order of commits shows that. Every result says by its digest which decisions it was made under
(`results/<profile>/claims.json`); notebook 09 prints what differs, and that is exploratory.

## The rules

* **A pair** is one draw of everything that is drawn: initial weights, order of the text, masks. Treated less unmasked,
  pair by pair.
* **One interval for each endpoint, and one p-value from the same statistic.** Items *fixed* (letters: there are no
  others; explained variance, which has none): Student's t over the pairs' means. Items *random* (parents, tasks,
  shifted sets, texts): two-way random effects of pairs and items with Satterthwaite's degrees of freedom
  (`masksae.study.stats.grand_mean`), which cover 93 % at least at 3 to 12 pairs (tests/study/test_stats.py).
* **Supported, contradicted**: the two-sided p-value, corrected by Holm over the primary endpoints that are measured,
  is below alpha, and the difference has the sign of the claim, or the other. Secondary endpoints have a correction of
  their own; C4 has one over all its cells. Where such a difference is also shown to be smaller than the margin, the
  verdict adds "within the margin": real, and too small to matter.
* **Equivalent**: neither, and two one-sided tests at alpha each show that the difference is smaller than the margin.
  These are not corrected for their number. "No difference" is said of nothing else.
* **Inconclusive**: none of these. The smallest difference that the same rule would have found with probability .8
  stands beside it.
* **Not measurable**: the gate fails. For C1 it asks for latents that tell what is to be absorbed, on unmasked SAEs
  alone; for every claim it asks that in both arms few latents are dead at the end of training.
* **A claim with a size in it** (C5, "slightly") is supported if the whole interval lies between no fall and the bound,
  and contradicted if it lies beyond; the size is stated in any case.
* **C4** asks for C1 to C3 in every other grid that is named, never in the first again.
* **Searched, not chosen**: the k at which a masked arm has the unmasked one's clean L0, and the noise that costs as
  much explained variance as masking, are found on pair 99, which is used for nothing else, by `masksae match` before
  any pair of that profile is trained (`results/<profile>/matched.json`; a test holds the profile to it). Until that
  file is there the profile below holds a guess of them.
* Scores decide as they are published, with the SAE's own threshold, unless it says otherwise below; the table shows
  every way to match sparsity, the published one first.
"""


KNOWN = """<!-- told afterwards: the digests are of what stands above and of the profiles below -->
## What was known at the freeze

Endpoints, margins and bounds were written on 25 November 2026 (commits 9a6e0f8 and 9c08f95; last changed for `laptop`
in 6a4feff and for `overnight` in c6026cb), before a masked SAE of these profiles was trained. They were not written
blindly. A pilot of unmasked and masked SAEs had been trained and scored: the same model and layer, the same texts,
first letters, and the same mask token, end-of-text (`<|endoftext|>`).

* **Explained variance.** In the run of version 0.2 (`git show 9a6e0f8:results/laptop/reconstruction.json`) it fell by
  0.034 as trained and by 0.051 at clean L0 20 (Matryoshka BatchTopK, five pairs), and by 0.031 and 0.047 (BatchTopK,
  three pairs). The maintainers also report five masked seeds on which it fell by 0.032. No file of their scores is in
  the history of this repository, so this number cannot be computed again.
* **Robustness.** On those five seeds the maintainers report a result with two sides: one where an ordinary token takes
  the place of another, one where the mask token does. No file of it is in the history either.
* **Absorption, probing and the gap** of version 0.2 had been seen too (`git show 9a6e0f8:docs/results.md`).
  First-letter absorption changed by −0.027 as trained (95 % interval −0.059 to +0.005) and by +0.060 at clean L0 20
  (+0.033 to +0.088; Matryoshka BatchTopK, five pairs).
* For `overnight` the results of `laptop` were known as well when its last numbers were set (the k and the noise found
  on pair 99, the weight of C2R). Endpoints, margins and bounds did not change after `laptop` was scored.

What came after the pilot:

* **The bound of C5.** "Slightly" was set to less than 0.02, below each of these falls. That C5 exceeds the bound is
  therefore no finding. Its result is the size of the fall, with its interval.
* **The side of R that decides.** The ordinary random token was made the primary endpoint, and no endpoint was made of
  the mask token. The other side is reported beside it, and decides nothing.
* **All other endpoints and margins**, the architecture that decides (TopK, after `masksae gate` on unmasked SAEs alone)
  and the context features that decide. Those that masked SAEs of the pilot had been scored on are named below as
  deciding nothing. The seeds of the pairs are new; model, texts and letters are not.
"""


def page(profiles: list[Profile]) -> str:
    """docs/preregistration.md of some profiles."""
    parts = [f"<!-- {p.name} {digest(p)} -->\n{text(p)}<!-- end -->\n" for p in profiles]
    return "\n".join([HEAD, KNOWN, *parts])


def text(profile: Profile) -> str:
    """What is decided on a profile: endpoints, gate, and all that is trained and scored."""
    decisions = profile.decisions
    gate = [["unmasked SAEs", "bound"]]
    gate += [
        ["mean F1 of the main latents, first letters", f"at least {decisions.gate.letters_f1:g}"],
        ["mean F1 of the main latents, contexts", f"at least {decisions.gate.contexts_f1:g}"],
        ["share of absorption credited to dense latents", f"at most {decisions.gate.dense_absorbers:g}"],
        ["share of latents dead at the end of training", f"at most {decisions.gate.dead:g}"],
        ["the same, either arm of a comparison", f"at most {decisions.gate.dead_compared:g}"],
    ]
    cells = ", ".join(decisions.cells) or "every other one that has SAEs of both arms and is no rival's or control's"
    trained = profile.model_dump(
        mode="json", exclude={"blocks": {"__all__": {"skipped"}}, **dict.fromkeys(ASIDE, True)}
    )
    return f"""## Profile `{profile.name}`

Treated arm: {profile.treated_arm.name}. Scores: {decisions.mode.replace("_", " ")}.
Alpha {decisions.alpha:g}, corrected by Holm. Grids of C4: {cells}.

{_endpoints(decisions.endpoints)}
{to_markdown(gate)}
Parents that another token sets, of which those count that pass the probe's gate: {"; ".join(PARENTS)}. These decide
nothing, since masked SAEs had been scored on them before: {"; ".join(EXPLORATORY)}.

What is trained and scored:

```yaml
{yaml.safe_dump(trained, sort_keys=False, width=110, default_flow_style=None).strip()}
```
"""


def _endpoints(endpoints: list[Endpoint]) -> str:
    rows = [["endpoint", "claim", "score", "what supports it", "items", "margin"]]
    for e in endpoints:
        way = "it rises" if e.direction > 0 else "it falls"
        bound = f", by less than {e.slight:g}" if e.slight is not None else ""
        kind = "" if e.primary else " (secondary)"
        rows.append(
            [f"{e.name}{kind}", f"{e.claim} {CLAIMS[e.claim]}", _score(e), way + bound, e.items, f"{e.margin:g}"]
        )
    return to_markdown(rows)


def _score(endpoint: Endpoint) -> str:
    """The column and its name."""
    first = ", the profile's first number" if endpoint.score.endswith("_") else ""
    return f"`{endpoint.score}`: {words(endpoint.score)}{first}"


def digest(profile: Profile) -> str:
    """Of the rules and the text: the same where nothing that is decided, trained or scored differs."""
    return run_id(HEAD + text(profile))


def frozen(profile: Profile, page: str) -> str | None:
    """The rules and the text on a profile as docs/preregistration.md, whose content is `page`, has them; None if the
    profile is not there."""
    found = re.search(rf"<!-- {re.escape(profile.name)} [0-9a-f]+ -->\n(.*?)<!-- end -->", page, re.DOTALL)
    return page.partition("<!-- ")[0].rstrip("\n") + "\n" + found[1] if found else None


def status(profile: Profile) -> str:
    """Whether a run is decided as docs/preregistration.md of the project around has it, for a notebook: one line, or
    what differs, line by line."""
    path = repository() / PAGE
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, now = frozen(profile, page), HEAD + text(profile)
    if before is None:
        return f"Exploratory: {PAGE} holds nothing on profile {profile.name} (decisions {digest(profile)})."
    if before == now:
        return f"Decided as written down beforehand: {PAGE}, decisions {digest(profile)}."
    _, _, *changed = difflib.unified_diff(before.splitlines(), now.splitlines(), lineterm="", n=0)
    told = "\n".join(line for line in changed if not line.startswith("@@"))
    return f"Exploratory: decisions {digest(profile)} are not those of {PAGE}. Before (-) and now (+):\n{told}"
