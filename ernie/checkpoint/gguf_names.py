"""What GGUF calls the parts of these networks, as data for import and export.

llama.cpp knows two architectures of the family, `ernie4_5` and `ernie4_5-moe`. Both keep the query
and key rows in the order for *interleaved* rotary embedding, which is the native one, so names
and containers are all that differs. `{i}` is a layer.
Source: the tensor and key tables of the package gguf; what llama.cpp reads.
"""

from __future__ import annotations

DENSE_ARCHITECTURE, MOE_ARCHITECTURE = "ernie4_5", "ernie4_5-moe"

# GGUF name -> native name, tensors that are the same in both.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}

# The tensors of a layer with experts. Stacked ones have the expert first in both; several GGUF
# tensors on the left are equal parts of the native one, rows under rows.
MOE_TENSORS = {
    ("blk.{i}.ffn_gate_inp.weight",): "model.layers.{i}.mlp.gate.weight",
    ("blk.{i}.exp_probs_b.bias",): "model.layers.{i}.mlp.moe_statics.e_score_correction_bias",
    ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"): (
        "model.layers.{i}.mlp.experts.gate_up_proj"
    ),
    ("blk.{i}.ffn_down_exps.weight",): "model.layers.{i}.mlp.experts.down_proj",
    ("blk.{i}.ffn_gate_shexp.weight",): "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
    ("blk.{i}.ffn_up_shexp.weight",): "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    ("blk.{i}.ffn_down_shexp.weight",): "model.layers.{i}.mlp.shared_experts.down_proj.weight",
}

# Metadata of the network, without the architecture's name in front -> field of ErnieConfig.
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}

# tokenizer.ggml.{left}_token_id holds what other files call {right}_token.
TOKEN_IDS = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
