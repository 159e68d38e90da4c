"""What SAEBench's evaluations take for an SAE; `masksae.export.saebench_adapter` makes one."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

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
    """An SAE as SAEBench's evaluations take it: parameters as attributes, `cfg`, and a `to` that keeps `device` and `dtype` true."""

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
