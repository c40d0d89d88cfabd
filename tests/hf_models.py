"""Small models of Hugging Face's transformers with random weights, made from configs: nothing is downloaded."""

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()
VOCABULARY, LENGTH, PAD = 99, 11, 0
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _IDS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": 2, "d_model": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class, its config, and what accelerate has to find in it: how many of each replacement."""

    model: str
    config: str
    options: dict
    found: dict[str, int]
    kind: str = "decoder"  # encoder, seq2seq, image, sound

    def make(self, **options) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options, **options)
        model = getattr(transformers, self.model)(config)
        for parameter in model.parameters():  # norms that are not the identity, biases that are not zero
            if parameter.dim() == 1:
                nn.init.normal_(parameter, parameter.mean().item(), 0.1)
        return model.get_encoder().eval() if self.kind == "sound" else model.eval()

    def inputs(self) -> dict[str, Tensor]:
        """A batch of two, the second padded on the left."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "image":
            return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        if self.kind == "sound":
            return {"input_features": torch.randn(2, 8, 2 * LENGTH, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        ids[1, :4], mask[1, :4] = PAD, 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
        return inputs

    def kept(self, output: Tensor) -> Tensor:
        """What of logits or hidden states counts: not that of padding, where a query has no key."""
        return output[:, 4:] if self.kind in ("decoder", "encoder") else output


def _decoder(model: str, config: str, found: dict[str, int], **options) -> Family:
    return Family(model, config, _DECODER | options, found)


_LLAMA = {
    "rms_norm (weight)": 5, "swiglu (gate_proj, up_proj)": 2, "rope (halves)": 2, "fused attention": 2, "loss": 1,
    "add_rms_norm (post_attention_layernorm)": 2,
}  # fmt: skip
_GEMMA = {
    "geglu tanh (gate_proj, up_proj)": 2, "rope (halves)": 2, "fused attention": 2, "loss": 1,
    "add_rms_norm (pre_feedforward_layernorm)": 2,
}  # fmt: skip
_SLIDING = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
_BERT = {"layer_norm": 6, "gelu": 3, "fused attention": 2, "loss": 1, "add_layer_norm (LayerNorm)": 4}

FAMILIES: dict[str, Family] = {
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": _decoder("MistralForCausalLM", "MistralConfig", _LLAMA, sliding_window=5),
    "qwen2": _decoder("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"rms_norm (weight)": 9}, head_dim=8),
    "gemma2": _decoder("Gemma2ForCausalLM", "Gemma2Config", _GEMMA | {"rms_norm (1 + weight)": 9}, **_SLIDING),
    "gemma3": _decoder(
        "Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA | {"rms_norm (1 + weight)": 13}, **_SLIDING,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _decoder(
        "Phi3ForCausalLM", "Phi3Config",
        {name: count for name, count in _LLAMA.items() if "swiglu" not in name} | {"swiglu (gate_up_proj, packed)": 2},
    ),
    "gpt_oss": _decoder(
        "GptOssForCausalLM", "GptOssConfig",
        {"rms_norm (weight)": 5, "rope (half tables)": 2, "fused attention": 2, "loss": 1},
        head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=2,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        _IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"layer_norm": 5, "gelu by tanh": 2, "fused attention": 2, "loss": 1},
    ),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig",
        _IDS | {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 64},
        {"layer_norm": 5, "fused attention": 2, "loss": 1},
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", _IDS | _ENCODER, {**_BERT, "loss": 0}, "encoder"),
    "roberta": Family(
        "RobertaForMaskedLM", "RobertaConfig", _IDS | _ENCODER, {**_BERT, "gelu": 2, "loss": 0}, "encoder"
    ),
    # As all-MiniLM-L6: BERT without a head, of which the sentence is the mean.
    "minilm": Family(
        "BertModel", "BertConfig", _IDS | _ENCODER, {**_BERT, "layer_norm": 5, "gelu": 2, "loss": 0}, "encoder"
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        _SEQ2SEQ | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
                    "decoder_start_token_id": PAD},
        {"rms_norm (weight)": 12, "geglu tanh (wi_0, wi_1)": 4, "fused attention": 6}, "seq2seq",
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig",
        _SEQ2SEQ | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "bos_token_id": 1,
                    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
                    "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None},
        {"layer_norm": 12, "gelu": 4, "fused attention": 6,
         "add_layer_norm (self_attn_layer_norm, final_layer_norm)": 2,
         "add_layer_norm (self_attn_layer_norm, encoder_attn_layer_norm, final_layer_norm)": 2}, "seq2seq",
    ),
    "whisper encoder": Family(
        "WhisperModel", "WhisperConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": LENGTH,
         "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        {"layer_norm": 5, "gelu": 2, "fused attention": 2, "add_layer_norm (final_layer_norm)": 2}, "sound",
    ),
    "vit": Family(
        "ViTModel", "ViTConfig", _ENCODER | {"image_size": 8, "patch_size": 4},
        {"layer_norm": 5, "gelu": 2, "fused attention": 2, "add_layer_norm (layernorm_after)": 2}, "image",
    ),
}  # fmt: skip


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state."""
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state
