"""The SAE of every architecture: its weights, what they mean at inference, and the two files it is saved as.

    pre = (x - b_dec) W_enc + b_enc             pre-activations (JumpReLU: x W_enc + b_enc)
    f = ReLU(pre) where it is selected, else 0  latents (Gated: ReLU(exp(r_mag) (pre - b_enc) + b_mag) there)
    x_hat = f W_dec + b_dec                     reconstruction

Selected is what exceeds the threshold: a running mean of the smallest value kept for BatchTopK, one number per latent
for JumpReLU, 0 for ReLU and Gated; TopK keeps the k largest of each token. All that differs between rules is asked of
`config.selection`.

`W_enc` has shape [d, F] but is stored latent by latent, as `W_dec` is: the gradient of a sparse step arrives in that
order.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from masksae.errors import CheckpointError, DataError, readable
from masksae.files import atomic_dir, save_tensors, sha256
from masksae.saes.config import SAEConfig

SCHEMA = 1
"""Version of the saved form; raise it when the files change meaning."""

SAE_FILES = ("sae.safetensors", "config.json", "sae_weights.safetensors", "cfg.json", "ae.pt")
"""What the folder of one SAE may hold that is written here, in any form: such a folder may be written over."""


class SAE(nn.Module):
    """A sparse autoencoder. Inputs may be [n, d] or [batch, sequence, d], of any float type: they are computed with in
    the type of the weights, which is also that of what comes out. Latents are dense [..., F]. Whatever takes an input
    raises DataError for another width and for what are no floats.

    Parameters: `W_enc` [d, F], `b_enc` [F], `W_dec` [F, d], `b_dec` [d]; JumpReLU also `thresholds` [F], Gated `r_mag`
    and `b_mag` [F]. Buffers: `threshold` (in units of the input; -1 before it was estimated, 0 where the rule needs
    none), `tokens_since_fired` int64 [F]. `history` holds the records of training (empty for an SAE that was not
    trained here); "explained_variance" is None where a batch does not vary, one of a single token for example.
    `origin` is what the file of another library says of the activations that it reads ("model_name", "hook_name",
    "prepend_bos"), and is written on; empty where nothing is said.

    >>> from masksae import BatchTopK
    >>> sae = SAE(SAEConfig(d_model=4, n_latents=16, selection=BatchTopK(2)))
    >>> f = sae.encode(torch.ones(3, 4))
    >>> f.shape, sae.decode(f).shape
    (torch.Size([3, 16]), torch.Size([3, 4]))
    """

    def __init__(self, config: SAEConfig, *, device=None):
        super().__init__()
        self.config = config
        self.history: list[dict] = []
        self.origin: dict = {}
        rule, n = config.selection, config.n_latents
        generator = torch.Generator().manual_seed(config.seed)
        directions = torch.randn(n, config.d_model, generator=generator, dtype=torch.float32)
        directions *= rule.decoder_norm / directions.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions.clone())
        self.W_enc = nn.Parameter(directions.t())
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        for name, value in rule.tensors(n).items():
            self.register_parameter(name, nn.Parameter(value))
        self.register_buffer("threshold", torch.tensor(-1.0 if rule.estimates_threshold else 0.0))
        self.register_buffer("tokens_since_fired", torch.zeros(n, dtype=torch.int64))
        self.to(device, torch.float32)  # whatever the process's default type is

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.W_dec.dtype

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder's product reads [..., d]: x - b_dec, or x."""
        return x - self.b_dec if self.config.selection.centred else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """pre [..., F]; of a Gated SAE, those of the gate."""
        x = floats(x, self.config.d_model, "activations", "Check model and block.").to(self.dtype)
        return self.encoder_input(x) @ self.W_enc + self.b_enc

    def magnitudes(self, pre: Tensor) -> Tensor:
        """Value [..., F] that each latent has if it is selected, at least 0."""
        return self.config.selection.magnitudes(self, pre)

    def margins(self, pre: Tensor) -> Tensor:
        """What is compared with the inference threshold [..., F]: pre, for JumpReLU less each latent's own
        threshold."""
        return self.config.selection.margins(self, pre)

    def encode(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """Latents f [..., F]. `threshold` takes the place of the trained one (of ranks for TopK; JumpReLU: is added to
        its own)."""
        return self.config.selection.select(self, self.pre_activations(x), threshold)

    def latents(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """`encode` as scores take it: on the CPU and in single precision at least, whatever the device and the type of
        the SAE."""
        return at_least_single(self.encode(x.to(self.device), threshold).cpu())

    def decode(self, f: Tensor) -> Tensor:
        """Reconstruction x_hat [..., d]."""
        f = floats(f, self.config.n_latents, "latents", "Check whose they are.").to(self.dtype)
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def rescale_(self, scale: float) -> "SAE":
        """Make an SAE that was trained on x / scale take x: biases and thresholds grow by `scale`, directions stay."""
        for name in ("b_enc", "b_dec", "threshold", *self.config.selection.scaled):
            getattr(self, name).mul_(scale)
        return self

    @torch.no_grad()
    def normalise_(self) -> "SAE":
        """Give decoder rows norm 1 and latents the norms instead: f_j |d_j| for f_j, same reconstruction. Not for
        ranked selections."""
        norm = self.W_dec.norm(dim=1).clamp(min=1e-12)
        self.W_dec /= norm[:, None]
        for name in ("W_enc", "b_enc", *self.config.selection.scaled):
            getattr(self, name).mul_(norm)
        return self

    def to_saelens(self, folder, **metadata) -> Path:
        """Write as a SAELens folder; see `masksae.saes.formats.write_saelens`."""
        from masksae.saes.formats import write_saelens  # which reads SAEs too, so it imports this module

        return write_saelens(folder, self, **metadata)

    def to_dictionary_learning(self, folder, **metadata) -> Path:
        """Write as a dictionary_learning folder; see `masksae.saes.formats.write_dictionary_learning`."""
        from masksae.saes.formats import write_dictionary_learning

        return write_dictionary_learning(folder, self, **metadata)

    def save(self, folder) -> Path:
        """Write `sae.safetensors` and `config.json` into `folder`, atomically. `SAE.load` reads them back bit for bit,
        in their type."""
        with atomic_dir(folder, SAE_FILES) as tmp:
            save_tensors(self.state_dict(), tmp / "sae.safetensors")
            record = {"schema": SCHEMA, "config": self.config.to_dict(), "history": self.history}
            record |= {"origin": self.origin} if self.origin else {}
            record["sha256"] = seal(record, tmp / "sae.safetensors")
            (tmp / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder, *, device=None) -> "SAE":
        """Read an SAE that `save` wrote. Raises CheckpointError if files are missing, damaged or of another schema."""
        record, tensors = read_tensors(folder, "sae.safetensors", "config.json", SCHEMA)
        with readable(folder):
            sae = cls(SAEConfig.from_dict(record["config"]))
            if "W_dec" in tensors:
                sae.to(tensors["W_dec"].dtype)
            load_state(sae, tensors, folder)
            sae.history, sae.origin = record["history"], record.get("origin", {})
        return sae.to(device) if device is not None else sae


def floats(x: Tensor, width: int, what: str, remedy: str) -> Tensor:
    """x [..., width] itself. Raises DataError for what are no floats, and for another width."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"The SAE takes {what} as a tensor of floats, found {found}. Convert them, or give others.")
    if x.ndim == 0 or x.shape[-1] != width:
        found = x.shape[-1] if x.ndim else "none"
        raise DataError(f"This SAE takes {what} of width {width}, found {found}. {remedy}")
    return x


def at_least_single(x: Tensor) -> Tensor:
    """x, in single precision if it was in half: sums and products of scores do not hang on how an SAE or its
    activations were stored."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def alike(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the widest of their float types, single precision at least. Raises DataError for integers.

    >>> [t.dtype for t in alike(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))]
    [torch.float64, torch.float64]
    """
    widest = torch.float32
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise DataError(f"Activations, latents and weights must be floats, found {tensor.dtype}. Convert them.")
        widest = torch.promote_types(widest, tensor.dtype)
    return [tensor.to(widest) for tensor in tensors]


def seal(record: dict, tensor_file: Path) -> str:
    """Hash of a JSON record and of the tensors beside it, so that no changed bit goes unnoticed."""
    return hashlib.sha256(f"{json.dumps(record, sort_keys=True)} {sha256(tensor_file)}".encode()).hexdigest()


def read_tensors(folder, tensor_file: str, json_file: str, schema: int) -> tuple[dict, dict[str, Tensor]]:
    """The JSON record and the tensors of a saved folder, checked. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    remedy = "Restore it from a copy, or give another folder."
    missing = [name for name in (tensor_file, json_file) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no complete checkpoint: {', '.join(missing)} is missing. {remedy}")
    try:
        record = json.loads((folder / json_file).read_text(encoding="utf-8"))
        tensors = load_file(folder / tensor_file)
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"The checkpoint in {folder} is damaged ({error}). {remedy}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"The checkpoint in {folder} is damaged ({json_file} holds no record). {remedy}")
    if record.get("schema") != schema:
        raise CheckpointError(
            f"The checkpoint in {folder} has schema {record.get('schema')!r}, this version reads {schema}. Use the "
            "version that wrote it, or another folder."
        )
    if record.pop("sha256", None) != seal(record, folder / tensor_file):
        raise CheckpointError(f"The checkpoint in {folder} is damaged, or was changed (its sha256 differs). {remedy}")
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
            f"The checkpoint in {folder} does not fit its configuration: {', '.join(sorted(wrong))} missing, "
            "unknown or of another shape."
        )
    module.load_state_dict(tensors)
