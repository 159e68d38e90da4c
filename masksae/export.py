"""SAEs from wherever they lie, a folder, the hub or a release, in any of the forms of `saes/formats.py`; and as what
SAEBench evaluates."""

import tempfile
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from masksae.data import hub, releases
from masksae.saes.formats import FILES, load_dictionary_learning, load_folder, load_saelens
from masksae.saes.sae import SAE

__all__ = ["load_dictionary_learning", "load_sae", "load_saelens", "saebench_adapter"]


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


def load_sae(source) -> SAE:
    """Read an SAE in the form of SAELens, dictionary_learning, sparsify, Gemma Scope or masksae, told by its files.

    `source` is a folder; "hub:owner/name[/path][@revision]", of which only those files are fetched; or
    "release:PROFILE/SAE", one that was published with this version: fetched on first use, checked, kept in the cache.
    Raises ConfigError, CheckpointError; SourceError for what cannot be had.

    >>> import tempfile
    >>> from masksae import SAEConfig, TopK
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_sae(SAE(SAEConfig(4, 16, TopK(2))).to_saelens(f"{folder}/sae")).config.n_latents
    16
    """
    if str(source).startswith(releases.PREFIX):
        with tempfile.TemporaryDirectory() as place:
            return load_folder(releases.unpack(str(source).removeprefix(releases.PREFIX), place))
    if str(source).startswith(hub.PREFIX):
        return load_folder(hub.folder(str(source).removeprefix(hub.PREFIX), FILES))
    return load_folder(source)
