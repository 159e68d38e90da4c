"""The SAE: four weights, three buffers, and the two files it is saved as.

    h = ReLU((x - b_dec) W_enc + b_enc)      pre-activations
    f = h where h > threshold, else 0        latents (inference; training selects by rank in the batch instead)
    x_hat = f W_dec + b_dec                  reconstruction

`W_enc` has shape [d, F] but is stored latent by latent, as `W_dec` is: the gradient of a sparse step arrives in that order.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from masksae.errors import CheckpointError, DataError
from masksae.files import atomic_dir
from masksae.saes.config import SAEConfig

SCHEMA = 1
"""Version of the saved form; raise it when the files change meaning."""


class SAE(nn.Module):
    """A sparse autoencoder. Inputs may be [n, d] or [batch, sequence, d]; latents are dense [..., F].

    Buffers: `threshold` (in units of the input; -1 before it was estimated), `tokens_since_fired` int64 [F].
    `history` holds the records of training (empty for an SAE that was not trained here).
    """

    def __init__(self, config: SAEConfig, *, device=None):
        super().__init__()
        self.config = config
        self.history: list[dict] = []
        generator = torch.Generator().manual_seed(config.seed)
        directions = torch.randn(config.n_latents, config.d_model, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions.clone())
        self.W_enc = nn.Parameter(directions.t())
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.register_buffer("tokens_since_fired", torch.zeros(config.n_latents, dtype=torch.int64))
        if device is not None:
            self.to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.W_dec.dtype

    def pre_activations(self, x: Tensor) -> Tensor:
        """h [..., F], at least 0: what selection sees."""
        if x.shape[-1] != self.config.d_model:
            raise DataError(
                f"This SAE reads activations of width {self.config.d_model}, found {x.shape[-1]}. Check model and block."
            )
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def encode(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """Latents f [..., F]; `threshold` takes the place of the trained one."""
        h = self.pre_activations(x)
        return h * (h > (self.threshold if threshold is None else threshold))

    def decode(self, f: Tensor) -> Tensor:
        """Reconstruction x_hat [..., d]."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def rescale_(self, scale: float) -> "SAE":
        """Make an SAE that was trained on x / scale take x: biases and threshold grow by `scale`, directions stay."""
        for tensor in (self.b_enc, self.b_dec, self.threshold):
            tensor.mul_(scale)
        return self

    def save(self, folder) -> Path:
        """Write `sae.safetensors` and `config.json` into `folder`, atomically. `SAE.load` reads them back bit for bit."""
        from safetensors.torch import save_file

        with atomic_dir(folder) as tmp:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, tmp / "sae.safetensors"
            )
            record = {"schema": SCHEMA, "config": self.config.to_dict(), "history": self.history}
            (tmp / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder, *, device=None) -> "SAE":
        """Read an SAE that `save` wrote. Raises CheckpointError if files are missing, damaged or of another schema."""
        record, tensors = read_tensors(folder, "sae.safetensors", "config.json", SCHEMA)
        sae = cls(SAEConfig.from_dict(record["config"]))
        load_state(sae, tensors, folder)
        sae.history = record["history"]
        return sae.to(device) if device is not None else sae


def read_tensors(folder, tensor_file: str, json_file: str, schema: int) -> tuple[dict, dict[str, Tensor]]:
    """The JSON record and the tensors of a saved folder, checked. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    remedy = "Delete the folder and train again, or restore it from a copy."
    missing = [name for name in (tensor_file, json_file) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no complete checkpoint: {', '.join(missing)} is missing. {remedy}")
    try:
        record = json.loads((folder / json_file).read_text(encoding="utf-8"))
        tensors = load_file(folder / tensor_file)
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"The checkpoint in {folder} is damaged ({error}). {remedy}") from error
    if record.get("schema") != schema:
        raise CheckpointError(
            f"The checkpoint in {folder} has schema {record.get('schema')!r}, this version reads {schema}. Use the version that wrote it."
        )
    return record, tensors


def load_state(module: nn.Module, tensors: dict[str, Tensor], folder) -> None:
    """Copy tensors into a module whose names and shapes must match. Raises CheckpointError."""
    expected = module.state_dict()
    wrong = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"The checkpoint in {folder} does not fit its configuration: {', '.join(sorted(wrong))} missing, unknown or of another shape."
        )
    module.load_state_dict(tensors)
