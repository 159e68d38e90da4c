"""Controls of a score: SAEs that know less than a trained one, at the same shape and the same sparsity.

    random_like        weights that were never trained: what a score owes to sparsity and to the number of latents alone
    permuted_decoder   the trained latents, each with the direction of another: what it owes to when latents fire alone

A score of dictionaries should tell both from the SAE that they are made of, and one that does not says something else
than its name. An SAE whose decoder stays at its random start while its encoder is trained is a third control; it takes
training (`SAEConfig(..., frozen_decoder=True)`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from masksae.errors import ConfigError, DataError
from masksae.metrics.reconstruction import active_counts, calibrated_threshold, mean_activation
from masksae.saes.sae import SAE


@torch.no_grad()
def random_like(sae: SAE, x: Tensor, *, seed: int) -> SAE:
    """An untrained SAE of the same shape, selection rule and type, as sparse on x [n, d] as `sae` is.

    Decoder rows are random directions of norm 1, the encoder is their transpose, as an SAE begins its training (with
    the SAE's own `config.seed` they are the very directions that it began with). It reads x less its mean, which is
    also its b_dec. TopK keeps its k; of every other rule `threshold` is set so that L0 on x is that of `sae`.

    seed  of the directions: 0 to 2**64 - 1

    Raises ConfigError for what is no SAE, DataError for x that it cannot read, for an SAE that is silent on x, and for
    one of an L0 that random weights cannot have: of any token they leave about half of the latents at 0.

    >>> from masksae import BatchTopK, SAEConfig
    >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    >>> sae = SAE(SAEConfig(8, 64, BatchTopK(4)))
    >>> sae.threshold.fill_(1.0)
    tensor(1.)
    >>> control = random_like(sae, x, seed=1)
    >>> round((control.encode(x) > 0).sum().item() / (sae.encode(x) > 0).sum().item(), 3)
    1.0
    """
    _check(sae)
    mean, rule = mean_activation(x, sae.config.d_model), sae.config.selection
    control = SAE(replace(sae.config, seed=seed)).requires_grad_(False)
    control.W_dec /= rule.decoder_norm  # norm 1, which rows of every trained SAE have, and not of every start
    control.W_enc.copy_(control.W_dec.t())
    control.b_dec.copy_(mean)
    if not rule.centred:
        control.b_enc.sub_(control.b_dec @ control.W_enc)
    control.to(sae.device, sae.dtype)
    if not rule.keeps_k_per_token:
        wanted = int(active_counts(sae, x).sum())
        if wanted == 0:
            raise DataError(
                "No latent of the SAE is active on x, so there is no L0 to match. Give activations of its layer."
            )
        control.threshold.fill_(calibrated_threshold(control, x, wanted / len(x)))
        reached = int(active_counts(control, x).sum())
        if reached < 0.95 * wanted:
            raise DataError(
                f"The SAE has L0 {wanted / len(x):.4g} on x, random weights reach {reached / len(x):.4g} at most. Give "
                "it the threshold of a sparser one."
            )
    return control


@torch.no_grad()
def permuted_decoder(sae: SAE, *, seed: int) -> SAE:
    """The same SAE with its decoder's rows permuted, so that every latent fires when it did and writes another's
    direction.

    The permutation is one random cycle through all latents: none keeps its row. Encoder, biases and thresholds, and
    with them the latents, stay bit for bit.

    Raises ConfigError for what is no SAE, and for one with a single latent.

    >>> from masksae import SAEConfig, TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> control, x = permuted_decoder(sae, seed=0), torch.ones(1, 4)
    >>> torch.equal(control.encode(x), sae.encode(x)), (control.W_dec == sae.W_dec).all(1).any().item()
    (True, False)
    """
    _check(sae)
    n = sae.config.n_latents
    if n < 2:
        raise ConfigError("An SAE with one latent has no other decoder row to give it. Take one with more latents.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    control = SAE(sae.config).to(sae.device, sae.dtype).requires_grad_(False)
    control.load_state_dict(sae.state_dict())
    control.W_dec[order] = sae.W_dec[order.roll(1)]
    return control


def _check(sae) -> None:
    if not isinstance(sae, SAE):
        raise ConfigError(
            f"A control is made of a masksae.SAE, whose encoder and decoder can be told apart, found a "
            f"{type(sae).__name__}. Read yours with masksae.load_sae."
        )
