"""Models that DWDP cannot share, refused by what their config says, before any process starts."""

from collections.abc import Callable
from typing import Any

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.placement import Placement


def refuse_unsupported_model(vllm_config: Any, config: DwdpConfig, data_parallel_size: int) -> None:
    """Refuse models without routed experts, and groups that their experts cannot be spread over.

    Raises:
        DwdpUnsupportedError: the model has no experts, no layer with experts, or substituted ones.
        DwdpConfigError: the experts cannot be spread over the group as asked.
    """
    model_config = vllm_config.model_config
    num_experts = model_config.get_num_experts()
    if num_experts < 1:
        _refuse(model_config, "has no routed experts that vLLM knows of")
    if rules := rules_without_expert_layer(model_config.hf_text_config):
        _refuse(model_config, f"has no layer with routed experts: its config says {rules}")
    if substitutes_experts(model_config):
        raise DwdpUnsupportedError(
            f"{model_config.model} substitutes constants for some experts (approximate_experts or "
            "expert_substitution in its config), so that its layers differ in what a rank would "
            "share. Use stock vLLM for it."
        )
    config.check_group_size(data_parallel_size, num_experts)
    if config.shares_experts:
        Placement(
            num_experts=num_experts,
            group_size=config.group_size,
            experts_per_rank=config.experts_per_rank,
        )


def _refuse(model_config: Any, what: str) -> None:
    raise DwdpUnsupportedError(
        f"{model_config.model} ({', '.join(model_config.architectures)}) {what}, so there is nothing "
        "for --distributed-executor-backend dwdp to share. Leave the flag out: vLLM already runs the "
        "data-parallel ranks of a dense model independently."
    )


def rules_without_expert_layer(text_config: Any) -> str:
    """Return the settings of a config that together leave no layer with experts; empty if one is left.

    Read as Qwen, DeepSeek and their relatives do. What other architectures do is seen when the model is
    built.
    """
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        return ""
    rules: dict[str, Callable[[Any, int], bool]] = {
        "first_k_dense_replace": lambda value, layer: layer >= value,
        "mlp_only_layers": lambda value, layer: layer not in value,
        "decoder_sparse_step": lambda value, layer: value > 0 and (layer + 1) % value == 0,
        "moe_layer_freq": lambda value, layer: (
            any(value[layer:][:1]) if isinstance(value, list) else value > 0 and layer % value == 0
        ),
    }
    set_rules = {
        name: value for name in rules if (value := getattr(text_config, name, None)) is not None
    }
    for layer in range(num_layers):
        if all(rules[name](value, layer) for name, value in set_rules.items()):
            return ""
    return ", ".join(f"{name}={value}" for name, value in set_rules.items())


def substitutes_experts(model_config: Any) -> bool:
    """Whether the checkpoint has constants in the place of experts, as vLLM 0.33 reads it."""
    configs = [model_config.hf_text_config, model_config.hf_config]
    if any(getattr(config, "approximate_experts", None) for config in configs):
        return True
    transform = (getattr(model_config.hf_config, "compression_config", None) or {}).get(
        "transform_config"
    )
    return bool((transform or {}).get("expert_substitution"))
