"""Model families of transformers, tiny and random: each is read, scored and loaded back, or refused with the reason."""

import pytest
import torch
import transformers as tr
from tiny_project import VOCABULARY, byte_tokenizer

from masksae.data import models
from masksae.errors import ConfigError, SourceError
from masksae.tracing import activations, activations_after, hook_point, hook_width, spliced_losses

SPECIAL = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
OLD = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, **SPECIAL)
SHAPE = SMALL | dict(intermediate_size=32, num_attention_heads=2)
SHARED = SHAPE | dict(num_key_value_heads=1)
WIDE = SHARED | dict(head_dim=8)
SLIDING = WIDE | dict(sliding_window=4)
TOWER = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "linear_attention", "full_attention"],
)  # fmt: skip
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
PER_LAYER = dict(vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8)
LAYERS = ["sliding_attention", "full_attention", "full_attention"]

FAMILIES = {
    "llama": lambda: tr.LlamaConfig(**SHARED),
    "mistral": lambda: tr.MistralConfig(**SHARED, sliding_window=4),
    "mixtral": lambda: tr.MixtralConfig(**SHARED, num_local_experts=3),
    "qwen2": lambda: tr.Qwen2Config(**SHARED),
    "qwen3": lambda: tr.Qwen3Config(**WIDE),
    "qwen3_next": lambda: tr.Qwen3NextConfig(**WIDE, **LINEAR, **EXPERTS),
    "gemma": lambda: tr.GemmaConfig(**WIDE),
    "gemma2": lambda: tr.Gemma2Config(**SLIDING),
    "gemma3_text": lambda: tr.Gemma3TextConfig(**SLIDING),
    "gemma3": lambda: tr.Gemma3Config(text_config=SLIDING, vision_config=TOWER),  # as many blocks in its vision tower
    "gemma4_text": lambda: tr.Gemma4TextConfig(**SLIDING, **PER_LAYER, num_kv_shared_layers=1, layer_types=LAYERS),
    "git": lambda: tr.GitConfig(**SHAPE, vision_config=TOWER),  # likewise, and the tower comes first
    "phi": lambda: tr.PhiConfig(**SHAPE),
    "phi3": lambda: tr.Phi3Config(**SHARED),
    "gpt2": lambda: tr.GPT2Config(**OLD),
    "openai_gpt": lambda: tr.OpenAIGPTConfig(**OLD),
    "gpt_neox": lambda: tr.GPTNeoXConfig(**SHAPE),
    "gptj": lambda: tr.GPTJConfig(**OLD, rotary_dim=4),
    "gpt_neo": lambda: tr.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=3,
        num_heads=2,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=64,
        window_size=4,
        bos_token_id=0,
        eos_token_id=0,
    ),  # fmt: skip
    "codegen": lambda: tr.CodeGenConfig(**OLD | {"n_head": 4}, rotary_dim=4),
    "opt": lambda: tr.OPTConfig(
        **SMALL, ffn_dim=32, num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16
    ),
    "bloom": lambda: tr.BloomConfig(**SMALL | {"n_layer": 3}, n_head=2),
    "falcon": lambda: tr.FalconConfig(**SMALL, num_attention_heads=2),
    "mpt": lambda: tr.MptConfig(vocab_size=VOCABULARY, d_model=16, n_heads=2, n_layers=3, max_seq_len=64),
    "stablelm": lambda: tr.StableLmConfig(**SHARED),
    "olmo2": lambda: tr.Olmo2Config(**SHARED),
    "granite": lambda: tr.GraniteConfig(**SHARED),
    "cohere": lambda: tr.CohereConfig(**SHARED),
    "mamba": lambda: tr.MambaConfig(**SMALL, state_size=4),
    "mamba2": lambda: tr.Mamba2Config(**SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    "rwkv": lambda: tr.RwkvConfig(**SMALL, attention_hidden_size=16, intermediate_size=32, context_length=64),
    "recurrent_gemma": lambda: tr.RecurrentGemmaConfig(**SHARED, lru_width=16, attention_window_size=4),
    "falcon_h1": lambda: tr.FalconH1Config(**WIDE, **MAMBA),
}
"""The families that people use most, and those whose blocks, caches or towers are unlike the others'."""


def tiny(config, kind=tr.AutoModelForCausalLM):
    """A random model whose attention matters: at the usual start of training it hardly does."""
    torch.manual_seed(0)
    model = kind.from_config(config()) if kind is tr.AutoModelForCausalLM else kind(config())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    return model.eval().requires_grad_(False)


BY_DAY = ("llama", "gemma3", "gpt2", "gpt_neox", "gpt_neo", "bloom", "mamba2", "recurrent_gemma")
"""One of each kind: rotary positions, a vision tower, absolute positions, parallel blocks, local attention, ALiBi, a
state space model, a mix of recurrence and attention. The others are marked slow."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in BY_DAY else pytest.mark.slow) for name in FAMILIES],
)
def family(request):
    return tiny(FAMILIES[request.param])


def hooked(model, ids, block):
    """The residual stream after a block, by a bare forward hook."""
    got = []
    keep = lambda module, inputs, output: got.append(output[0] if isinstance(output, tuple | list) else output)
    handle = model.get_submodule(hook_point(model, block)).register_forward_hook(keep)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return got[0]


def test_activations_are_those_of_a_forward_hook(family, ids):
    for block in (0, 1):
        assert "vision" not in hook_point(family, block) and "image" not in hook_point(family, block)
        assert torch.equal(activations(family, ids, block=block, batch=12), hooked(family, ids, block))
        assert hook_width(family, block) == 16


def test_an_identical_replacement_changes_no_loss(family, ids):
    """And a noisy one does what the same noise from a hook does, whatever form the block's output has."""
    noise = torch.randn(12, 9, 16, generator=torch.Generator().manual_seed(0))
    losses = spliced_losses(family, ids, {"same": lambda x: x, "noise": lambda x: x + noise}, block=1, batch=12)
    plain = torch.nn.functional.cross_entropy(family(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert losses["original"].ce == pytest.approx(plain.item(), rel=1e-5)
    assert losses["same"].ce == pytest.approx(losses["original"].ce, rel=1e-6)
    assert losses["same"].kl == pytest.approx(0, abs=1e-5)
    add = lambda o: type(o)([o[0] + noise, *o[1:]]) if isinstance(o, tuple | list) else o + noise
    handle = family.get_submodule(hook_point(family, 1)).register_forward_hook(lambda module, inputs, o: add(o))
    logits = family(input_ids=ids, use_cache=False).logits
    handle.remove()
    changed = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert losses["noise"].ce == pytest.approx(changed, rel=1e-5) and losses["noise"].kl > 1e-4


def test_words_after_a_prefix_are_those_of_the_whole_prompt(family, ids):
    prefix, words = ids[:1, :7], ids[:, 7:8]
    whole = hooked(family, torch.cat([prefix.expand(12, -1), words], 1), 1)[:, 7:]
    after = activations_after(family, prefix, words, block=1, batch=5)
    assert ((after - whole).norm(dim=-1) < 1e-4 * whole.norm(dim=-1)).all()


def saved(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_folder_gives_the_model_back(family, ids, tmp_path):
    """It lacks no weight, whatever is tied or left out in its file, and it sees no later token."""
    loaded = models.load_model(saved(family, tmp_path / "model")).model
    torch.testing.assert_close(loaded(input_ids=ids).logits, family(input_ids=ids).logits)


@pytest.mark.parametrize("kind", [tr.AutoModelForCausalLM, tr.BertForMaskedLM])
def test_an_encoder_is_refused(tmp_path, kind):
    folder = saved(tiny(lambda: tr.BertConfig(**SHAPE), kind), tmp_path / "model")
    with pytest.raises(SourceError, match=r"BertLMHeadModel\) sees later tokens: .* expected rounding, 3e-05"):
        models.load_model(folder)


def test_an_encoder_as_decoder_is_causal(tmp_path):
    models.load_model(saved(tiny(lambda: tr.BertConfig(**SHAPE, is_decoder=True)), tmp_path / "model"))


BART = dict(encoder_layers=3, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2)
ENCODER_DECODERS = {
    "t5": lambda: tr.T5ForConditionalGeneration(
        tr.T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    ),
    "bart": lambda: tr.BartForConditionalGeneration(
        tr.BartConfig(
            vocab_size=128, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, **BART
        )
    ),
}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_an_encoder_decoder_is_refused(tmp_path, kind):
    folder = saved(ENCODER_DECODERS[kind](), tmp_path / "model")
    with pytest.raises(SourceError, match=rf"is an encoder-decoder \({kind}\). Use a decoder-only model"):
        models.load_model(folder)


def test_a_block_of_several_streams_is_refused(ids):
    """Gemma 3n's blocks give four streams, [4, batch, tokens, width]; a module inside them gives one."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    options = dict(num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0] * 3, layer_types=layers)
    model = tiny(lambda: tr.Gemma3nTextConfig(**SLIDING, **PER_LAYER, **options))
    for use in (
        lambda: hook_width(model, 1),
        lambda: activations(model, ids, block=1),
        lambda: activations_after(model, ids[:1], ids, block=1),
        lambda: spliced_losses(model, ids, {}, block=1),
    ):
        with pytest.raises(ConfigError, match=r"model\.layers\.1 gives \(4, \d+, \d+, 16\) for ids .* Choose another"):
            use()
    assert activations(model, ids, block="model.layers.1.mlp").shape == (12, 9, 16)
