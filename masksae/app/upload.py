"""The SAEs of a run for others, in SAELens' form with a model card made from the run's own results: as a repository for
the hub, one folder each, or as a release, one archive each."""

import shutil
import zipfile
from itertools import chain
from pathlib import Path

from masksae.data import releases
from masksae.errors import ConfigError, DataError, SourceError
from masksae.files import ANYTHING, atomic_dir, read_json, sha256, write_json
from masksae.study.report import labels
from masksae.study.report.tables import number, to_markdown
from masksae.study.run import Run, RunPart
from masksae.study.sections import Arm
from masksae.tracing import hook_point

SHOWN = ("l0", "ev_centred", "ce_score", "mean_full", "context_full")
"""Columns of the card, of the results that are there; at matched clean L0."""

HOW_TO_LOAD = {
    "hub": """from sae_lens import SAE
sae = SAE.load_from_disk("{sae}")  # after downloading this repository""",
    "release": """import masksae
sae = masksae.load_sae("release:{profile}/{sae}")  # or SAELens, from the folder in an archive""",
}


def build(run: Run) -> Path:
    """Write build/PROFILE/hub/ and return it; trains the SAEs that are missing."""
    target = run.build / "hub"
    with atomic_dir(target, ANYTHING) as tmp:
        for part in run.parts:
            _export(run, part, tmp)
        (tmp / "README.md").write_text(card(run), encoding="utf-8")
    return target


def release(run: Run, register: Path = releases.REGISTER) -> Path:
    """Write build/PROFILE/release/ and return it: an archive of each SAE of the profile's first block, which are those
    of its main question, their card and their checksums. `register` learns their names and sha256, so that
    `masksae.load_sae("release:PROFILE/SAE")` finds them where the release lies. Trains the SAEs that are missing."""
    target, sums = run.build / "release", {}
    with atomic_dir(target, ANYTHING) as tmp:
        first = (part for part in run.parts if part.part.block is run.profile.blocks[0])
        for folder in chain.from_iterable(_export(run, part, tmp) for part in first):
            name = f"{run.profile.name}/{folder.name}"
            sums[name] = sha256(_archive(folder, tmp / releases.archive_name(name)))
        (tmp / "README.md").write_text(card(run, "release"), encoding="utf-8")
        lines = [f"{value}  {releases.archive_name(name)}\n" for name, value in sums.items()]
        (tmp / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    known = read_json(register)
    others = {name: value for name, value in known["sha256"].items() if not name.startswith(f"{run.profile.name}/")}
    write_json(register, known | {"sha256": others | sums})
    return target


def _export(run: Run, part: RunPart, target: Path) -> list[Path]:
    """The folders of a part's SAEs, written into `target`."""
    model, saes = run.profile.model, part.load_saes()
    hook, name = hook_point(run.language_model.model, model.block), model.source.removeprefix("hub:")
    return [
        saes[row["sae"]].to_saelens(
            target / row["sae"], model_name=name, hook_name=model.hook_name, prepend_bos=model.bos_token is not None,
            context_size=run.profile.text.block_length, dataset_path=", ".join(run.profile.text.sources),
            transformers_hook=hook, mask_probability=row["p"], seed=row["seed"],
        )
        for row in part.table
    ]  # fmt: skip


def _archive(folder: Path, target: Path) -> Path:
    """Move the files of a folder into an archive; the same files give the same bytes."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.iterdir()):
            info = zipfile.ZipInfo(file.name)  # of 1980, whenever it is made
            info.external_attr, info.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, file.read_bytes())
    shutil.rmtree(folder)
    return target


def upload(run: Run, repository: str) -> str:
    """Build and push to the hub as `repository` ("owner/name", private until made public there); its address. Raises
    ConfigError, SourceError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if repository.count("/") != 1:
        raise ConfigError(f"The repository must be owner/name, found {repository!r}.")
    folder, api = build(run), HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"SAEs of the profile {run.profile.name}"
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise SourceError(
            f"{folder} is built, but could not be pushed to {repository}: {str(error).strip().splitlines()[0]}. "
            "Check the name, the network and HF_TOKEN, or upload the folder by hand."
        ) from error


def card(run: Run, form: str = "hub") -> str:
    """The model card: where the SAEs come from, how to load them out of a `form` of HOW_TO_LOAD, what they score."""
    load = HOW_TO_LOAD[form].format(profile=run.profile.name, sae=run.table[0]["sae"])
    profile, model, training = run.profile, run.profile.model, run.profile.training
    arms = [f"* `{arm.name}`: {_arm(arm, model.mask_token)}" for arm in profile.arms]
    latents = " or ".join(f"{n:,}" for n in dict.fromkeys(grid.n_latents for grid in profile.saes))
    described = f"{profile.description.rstrip('.')}. " if profile.description else ""
    sinks = f", tokens of more than {model.sinks:g} times the median norm too" if model.sinks else ""
    base = f"base_model: {model.source.removeprefix('hub:')}\n" if model.source.startswith("hub:") else ""
    return f"""---
library_name: saelens
tags: [saelens, sparse-autoencoder, masked-regularization]
{base}---

# SAEs with and without masked regularisation: {profile.name}

{described}Trained by [masksae](https://arxiv.org/abs/2604.06495)'s open companion.

* Model: `{model.source}`, {model.place} (blocks counted from 0), \
blocks of {profile.text.block_length} tokens, BOS left out{sinks}
* Text: {", ".join(f"`{source}`" for source in profile.text.sources)}, \
{profile.text.train_tokens:,} tokens an arm, {training.epochs} epoch(s)
* Recipe: Adam {training.lr:g}, batches of {training.batch_size:,} tokens, \
{latents} latents; the same for all arms
{chr(10).join(arms)}

Names are ARM-GRID-sSEED. \
Arms of a grid differ in nothing but what is said of them here. \
All scores are taken
on clean text. Compare arms at matched L0: masking moves the inference threshold.

```python
{load}
```

{_scores(run)}

Weights are derived from the language model: its licence and terms apply.
"""


STANDS_IN = {"random": "random tokens drawn from the text", "rare": "the rarest token of the text"}
"""What replaces masked tokens, by what a profile calls it that is no token's text."""


def _arm(arm: Arm, mask_token: str) -> str:
    """What an arm does, whatever its name: what is replaced, what is trained on, and how much of the text."""
    token = STANDS_IN.get(arm.token, f"`{arm.token or mask_token}`")
    masks = f"{100 * arm.p:.4g}% of the input tokens replaced by {token}" if arm.p else "no masking"
    told = {
        masks: True,
        "masks drawn anew in every epoch": arm.p and arm.fresh_masks,
        "those positions left out": arm.p and (arm.drop_masked or arm.denoise),
        "trained to give the activation of the clean text (denoising)": arm.denoise,
        f"Gaussian noise of {arm.noise:g} on the activations": arm.noise,
        f"{100 * arm.tokens:.4g}% of the text": arm.tokens < 1,
    }
    return ", ".join(words for words, holds in told.items() if holds)


def _scores(run: Run) -> str:
    """A table of the scores that the run has, mean over seeds."""
    values: dict[tuple, dict[str, list[float]]] = {}
    for key in SHOWN:
        try:
            rows = run.result(labels.score(key).result)
        except DataError:
            continue
        for row in rows:
            if row["mode"] == "matched":
                values.setdefault((row["grid"], row["arm"]), {}).setdefault(key, []).append(row[key])
    if not values:
        return "No scores were taken."
    keys = list(next(iter(values.values())))
    table = [["SAEs", "arm", "seeds", *map(labels.words, keys)]]
    for (grid, arm), cell in values.items():
        means = [number(sum(cell[key]) / len(cell[key])) if key in cell else "" for key in keys]
        table.append([grid, arm, str(len(cell[keys[0]])), *means])
    return "Means over seeds, at matched clean L0:\n\n" + to_markdown(table)
