"""SAEs from and for other libraries: read in the forms of SAELens and dictionary_learning (`saes/formats.py`), written
in them, and as what SAEBench evaluates."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from masksae.data.releases import PREFIX, unpack
from masksae.errors import CheckpointError, ConfigError, readable
from masksae.saes.formats import Read, read_dictionary_learning, read_saelens
from masksae.saes.sae import SAE


@dataclass
class AdapterConfig:
    """What SAEBench asks of an SAE's `cfg`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str
    device: str = "cpu"
    hook_head_index: int | None = None
    context_size: int = 128
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None
    model_from_pretrained_kwargs: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class SAEBenchAdapter(nn.Module):
    """An SAE as SAEBench's evaluations take it: parameters as attributes, `cfg`, and a `to` that keeps `device` and
    `dtype` true."""

    def __init__(self, sae: SAE, cfg: AdapterConfig):
        super().__init__()
        self.sae, self.cfg = sae, cfg
        self.device, self.dtype = sae.device, sae.dtype

    def __getattr__(self, name: str):
        if name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            return getattr(super().__getattr__("sae"), name)
        return super().__getattr__(name)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def decode(self, f: Tensor) -> Tensor:
        return self.sae.decode(f)

    def forward(self, x: Tensor) -> Tensor:
        return self.sae(x)

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)
        self.device, self.dtype = self.sae.device, self.sae.dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether all decoder rows have norm 1, as SAEBench's metrics assume."""
        tolerance = 1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5
        return bool((self.W_dec.norm(dim=1) - 1).abs().max() < tolerance)


def saebench_adapter(sae: SAE, *, model_name: str, layer: int, hook_name: str | None = None) -> SAEBenchAdapter:
    """`sae` for SAEBench: `run_eval(config, [(name, adapter)], ...)`. `model_name` and `hook_name` are
    TransformerLens's."""
    cfg = AdapterConfig(
        model_name, sae.config.d_model, sae.config.n_latents, layer, hook_name or f"blocks.{layer}.hook_resid_post",
        architecture=sae.config.architecture.lower().replace(" ", "_"),
        dtype=str(sae.dtype).removeprefix("torch."), device=str(sae.device),
    )  # fmt: skip
    return SAEBenchAdapter(sae, cfg)


def load_saelens(folder, *, device=None) -> SAE:
    """Read a SAELens folder: standard, topk, jumprelu or gated, without run-time normalisation. Raises ConfigError,
    CheckpointError.

    Decoder rows are made unit where that does not change what is selected; a bias that the encoder's input lacks, or
    has against our convention, is folded into `b_enc`.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_saelens(sae.to_saelens(f"{folder}/sae"))
    >>> torch.equal(again.W_dec, sae.W_dec)
    True
    """
    return _loaded(Path(folder), read_saelens).to(device)


def load_dictionary_learning(folder, *, device=None) -> SAE:
    """Read a dictionary_learning folder (`ae.pt`, `config.json`) of one of its six classes; decoder rows are made unit.
    Loads weights only: a file that would run code is refused. Raises ConfigError, CheckpointError.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_dictionary_learning(sae.to_dictionary_learning(f"{folder}/sae"))
    >>> torch.equal(again.W_dec, sae.W_dec)
    True
    """
    return _loaded(Path(folder), read_dictionary_learning).to(device)


def load_sae(folder) -> SAE:
    """Read an SAE in the form of SAELens, dictionary_learning or masksae, told by its files. "release:PROFILE/SAE" is
    one that was published with this version: downloaded on first use, checked, kept in the cache. Raises ConfigError,
    CheckpointError; SourceError for a release that cannot be had.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_sae(SAE(SAEConfig(4, 16, TopK(2))).to_saelens(f"{folder}/sae")).config.n_latents
    16
    """
    if str(folder).startswith(PREFIX):
        with tempfile.TemporaryDirectory() as place:
            return load_sae(unpack(str(folder).removeprefix(PREFIX), place))
    folder = Path(folder)
    readers = {"sae_weights.safetensors": load_saelens, "ae.pt": load_dictionary_learning, "sae.safetensors": SAE.load}
    for file, read in readers.items():
        if (folder / file).is_file():
            return read(folder)
    raise ConfigError(f"{folder} holds none of {', '.join(readers)}. Give the folder of one SAE.")


def to_saelens(sae: SAE, folder, **metadata) -> Path:
    """`SAE.to_saelens`."""
    return sae.to_saelens(folder, **metadata)


def to_dictionary_learning(sae: SAE, folder, **metadata) -> Path:
    """`SAE.to_dictionary_learning`."""
    return sae.to_dictionary_learning(folder, **metadata)


@torch.no_grad()
def _loaded(folder: Path, read: Callable[[Path], Read]) -> SAE:
    """The SAE in a foreign file, with unit rows if that may be done. Every complaint about the file is one of ours."""
    with readable(folder):
        config, state, dtype, history, fold = read(folder)
        sae = SAE(config).to(dtype)
        for name, target in sae.state_dict(keep_vars=True).items():
            if name in state:
                if state[name].shape != target.shape:
                    raise CheckpointError(
                        f"{folder}: {name} has shape {tuple(state[name].shape)}, "
                        f"its configuration says {tuple(target.shape)}."
                    )
                target.copy_(state[name])
            elif name not in ("threshold", "tokens_since_fired"):
                raise CheckpointError(f"{folder} lacks the tensor {name}. Is it complete?")
        sae.history = history
        return (sae.normalise_() if fold else sae).requires_grad_(False)
