"""The same SAE, with the same weights and recipe, in the trainers of dictionary_learning 0.1.0 and SAELens 6.54.

Both benchmarks and the agreement tests (`tests/peers`) build their peers here. `make peers` makes the environment.
"""

from types import SimpleNamespace

import torch

from masksae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK, TrainConfig


def named(sae: SAE, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Our parameters under a peer's names; `.T` after one of our names transposes."""
    result = {}
    for theirs, ours in names.items():
        value = getattr(sae, ours.removesuffix(".T")).detach()
        result[theirs] = (value.t() if ours.endswith(".T") else value).clone().contiguous()
    return result


LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T", "b_dec": "b_dec"}
DIRECT = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def dictionary_learning_names(sae: SAE) -> dict[str, str]:
    """Their state-dict keys -> our parameters."""
    rule = type(sae.config.selection)
    if rule is BatchTopK and sae.config.prefixes:
        return DIRECT
    return {
        BatchTopK: LINEAR,
        TopK: LINEAR,
        JumpReLU: DIRECT | {"threshold": "thresholds"},
        ReLU: {key: ours for key, ours in LINEAR.items() if key != "b_dec"} | {"bias": "b_dec"},
        Gated: {
            "encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec",
            "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag",
        },
    }[rule]  # fmt: skip


def dictionary_learning_trainer(sae: SAE, recipe: TrainConfig, device="cpu"):
    """Their trainer at step 0 with our weights (give it steps from 1 on: at step 0 it resets b_dec)."""
    import dictionary_learning.trainers as trainers
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    config, rule = sae.config, sae.config.selection
    common = dict(
        steps=recipe.steps, activation_dim=config.d_model, dict_size=config.n_latents, layer=0, lm_name="none",
        lr=recipe.lr, warmup_steps=recipe.warmup, decay_start=None, device=str(device),
    )  # fmt: skip
    top = dict(threshold_start_step=recipe.threshold_start, threshold_beta=recipe.threshold_ema)
    warm = dict(sparsity_warmup_steps=recipe.sparsity_steps)
    kind = type(rule)
    if kind is BatchTopK and config.prefixes:
        trainer = MatryoshkaBatchTopKTrainer(k=rule.k, group_fractions=list(config.prefixes), **common, **top)
    elif kind in (BatchTopK, TopK):
        trainer = (trainers.BatchTopKTrainer if kind is BatchTopK else trainers.TopKTrainer)(k=rule.k, **common, **top)
    elif kind is JumpReLU:
        trainer = JumpReluTrainer(target_l0=rule.target_l0, bandwidth=rule.bandwidth, **common, **warm)
    elif kind is Gated:
        trainer = trainers.GatedSAETrainer(l1_penalty=rule.l1, **common, **warm)
    else:
        trainer = StandardTrainerAprilUpdate(l1_penalty=rule.l1, **common, **warm)
    trainer.ae.to(device, sae.dtype)
    if config.aux is not None and hasattr(trainer, "top_k_aux"):
        trainer.dead_feature_threshold = config.aux.dead_after_tokens
        trainer.num_tokens_since_fired.copy_(sae.tokens_since_fired)
    trainer.ae.load_state_dict(named(sae, dictionary_learning_names(sae)), strict=False)
    return trainer


def saelens_sae(sae: SAE, device="cpu"):
    """Their training SAE with our weights."""
    import sae_lens.saes as saes

    config, rule = sae.config, sae.config.selection
    common = dict(d_in=config.d_model, d_sae=config.n_latents, dtype=str(sae.dtype).removeprefix("torch."))
    common["device"] = str(device)
    names, kind = dict(DIRECT), type(rule)
    if kind is BatchTopK and config.prefixes:
        widths = torch.tensor(config.group_sizes).cumsum(0).tolist()
        theirs = saes.MatryoshkaBatchTopKTrainingSAE(
            saes.MatryoshkaBatchTopKTrainingSAEConfig(k=rule.k, matryoshka_widths=widths, **common)
        )
    elif kind is BatchTopK:
        theirs = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(k=rule.k, **common))
    elif kind is TopK:
        theirs = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(k=rule.k, **common))
    elif kind is JumpReLU:
        theirs = saes.JumpReLUTrainingSAE(
            saes.JumpReLUTrainingSAEConfig(jumprelu_bandwidth=rule.bandwidth, apply_b_dec_to_input=False, **common)
        )
        names |= {"threshold": "thresholds"}
    elif kind is Gated:
        theirs = saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(l1_coefficient=rule.l1, **common))
        del names["b_enc"]
        names |= {"b_gate": "b_enc", "b_mag": "b_mag", "r_mag": "r_mag"}
    else:
        theirs = saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(l1_coefficient=rule.l1, **common))
    theirs.load_state_dict(named(sae, names), strict=False)
    return theirs


def saelens_trainer(sae: SAE, recipe: TrainConfig, batch_size: int, device="cpu", autocast: bool = False):
    """Their trainer; `step(batch)` is one update."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    theirs = saelens_sae(sae, device)
    config = SAETrainerConfig(
        total_training_samples=recipe.steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=recipe.lr,
        lr_end=recipe.lr,
        device=str(device),
        autocast=autocast,
    )
    return SAETrainer(config, theirs, iter(()))


def spelling_model(words: dict[str, torch.Tensor]):
    """What SAEBench's absorption asks of a language model, with the activation of each word at hand: prompts end with
    the word."""
    spelt = lambda prompt: words[prompt.split("\n")[-1].split()[0].rstrip(":")]
    return SimpleNamespace(
        run_with_cache=lambda prompts, names_filter: (
            None,
            {names_filter[0]: torch.stack([spelt(p) for p in prompts])[:, None]},
        ),
        to_tokens=lambda prompt: [[0]],
        tokenizer=True,
    )
