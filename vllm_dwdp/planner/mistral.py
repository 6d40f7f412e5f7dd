"""Mistral's own format of a config, params.json, in the words of config.json. Pure."""

from typing import Any

NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
}
EXPERT_NAMES = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "route_every_n": "moe_layer_freq",
}
"""Of what is in the field `moe`."""


def common_names(params: dict[str, Any]) -> dict[str, Any]:
    """Return the fields by the names that config.json has for them, as vLLM reads them."""
    experts = params.get("moe")
    named = {NAMES.get(name, name): value for name, value in params.items() if name != "moe"}
    if isinstance(experts, dict):
        named |= {theirs: experts[own] for own, theirs in EXPERT_NAMES.items() if own in experts}
    return named
