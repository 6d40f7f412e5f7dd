"""The state that a layer of linear attention, a state-space layer or a short convolution keeps. Pure.

It is the same for a sequence of any length. Each family has its own fields in config.json; the sizes are
those of vLLM's `MambaStateShapeCalculator`, for one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown
from vllm_dwdp.planner.checkpoint import ConfigFields

HALF, FLOAT32 = 16, 32
"""Bits of an element."""


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """The state of one layer.

    Args:
        convolution, recurrent: elements per sequence; those of the convolution have 16 bits.
        recurrent_bits: of an element of the recurrent part.
        params: linear weights of the layer.
    """

    convolution: int = 0
    recurrent: int = 0
    recurrent_bits: int = HALF
    params: int = 0

    @property
    def num_bytes(self) -> float:
        """The bytes per sequence."""
        return (self.convolution * HALF + self.recurrent * self.recurrent_bits) / 8


NO_STATE = LayerState()


def layer_state(fields: ConfigFields) -> LayerState:
    """Read the state of the layers that have one.

    Raises:
        DwdpConfigError: no field says its size, or its type is unknown.
    """
    for field, read in FAMILIES.items():
        if fields.config.get(field) is not None:
            return read(fields)
    raise DwdpConfigError(
        f"{fields.architecture}: config.json names layers that keep a state, and no field that says "
        f"its size is known here (known are {', '.join(FAMILIES)}). vLLM logs the size of its KV cache "
        "at start: plan with that."
    )


def _gated_delta_net(fields: ConfigFields) -> LayerState:
    keys = fields.first("linear_num_key_heads") * fields.first("linear_key_head_dim")
    heads, size = fields.first("linear_num_value_heads"), fields.first("linear_value_head_dim")
    kernel, hidden = fields.first("linear_conv_kernel_dim", default=4), fields.first("hidden_size")
    values = heads * size
    return LayerState(
        convolution=(2 * keys + values) * (kernel - 1),
        recurrent=values * fields.first("linear_key_head_dim"),
        recurrent_bits=_recurrent_bits(fields, HALF),
        params=hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden,
    )


def _kimi_delta_attention(fields: ConfigFields) -> LayerState:
    heads, size = fields.first("linear_num_heads"), fields.first("linear_head_dim")
    kernel, hidden = fields.first("linear_conv_kernel_dim", default=4), fields.first("hidden_size")
    gates = 2 * (hidden * size + size * heads * size)  # each of two low-rank products
    return LayerState(
        convolution=3 * heads * size * (kernel - 1),
        recurrent=heads * size * size,
        recurrent_bits=FLOAT32,
        params=4 * hidden * heads * size + gates + hidden * heads,
    )


def _published_kimi_linear(fields: ConfigFields) -> LayerState:
    inner = fields.config["linear_attn_config"]
    if not isinstance(inner, dict):
        raise DwdpConfigError(
            f"{fields.named('linear_attn_config')} is {shown(inner)}; it must be an object."
        )
    own = ConfigFields(inner | {"architectures": fields.config.get("architectures")})
    return _kimi_delta_attention(
        ConfigFields(
            fields.config
            | {
                "linear_num_heads": own.first("num_heads"),
                "linear_head_dim": own.first("head_dim"),
                "linear_conv_kernel_dim": own.first("short_conv_kernel_size", default=4, low=1),
            }
        )
    )


def _ling_delta_attention(fields: ConfigFields) -> LayerState:
    heads, size = fields.first("num_attention_heads"), fields.first("head_dim")
    kernel, hidden = fields.first("short_conv_kernel_size"), fields.first("hidden_size")
    return LayerState(
        convolution=3 * heads * size * (kernel - 1),
        recurrent=heads * size * size,
        recurrent_bits=FLOAT32,
        params=6 * hidden * heads * size + hidden * heads,  # two gates of full rank among them
    )


def _lightning_attention(fields: ConfigFields) -> LayerState:
    heads, hidden = fields.first("num_attention_heads"), fields.first("hidden_size")
    size = fields.first("head_dim", default=max(1, hidden // heads), low=1)
    return LayerState(
        recurrent=heads * size * size,
        recurrent_bits=_recurrent_bits(fields, HALF),
        params=5 * hidden * heads * size,  # queries, keys, values, gate and output
    )


def _mamba2(fields: ConfigFields) -> LayerState:
    heads = fields.first("mamba_n_heads", "mamba_num_heads")
    width = heads * fields.first("mamba_d_head", "mamba_head_dim")
    state = fields.first("mamba_d_state", "ssm_state_size")
    mixed = width + 2 * fields.first("mamba_n_groups", "n_groups", default=1) * state
    kernel, hidden = (
        fields.first("mamba_d_conv", "conv_kernel", default=4),
        fields.first("hidden_size"),
    )
    default = FLOAT32 if fields.model_type.startswith("nemotron_h") else HALF
    return LayerState(
        convolution=mixed * (kernel - 1),
        recurrent=width * state,
        recurrent_bits=_recurrent_bits(fields, default),
        params=hidden * (width + mixed + heads) + width * hidden,
    )


def _mamba1(fields: ConfigFields) -> LayerState:
    hidden, state = fields.first("hidden_size"), fields.first("mamba_d_state")
    width = fields.first("mamba_expand", default=2) * hidden
    rank = fields.first("mamba_dt_rank", default=-(-hidden // 16))
    return LayerState(
        convolution=width * (fields.first("mamba_d_conv", default=4) - 1),
        recurrent=width * state,
        recurrent_bits=_recurrent_bits(fields, HALF),
        params=3 * hidden * width + width * (2 * rank + 2 * state),
    )


def _short_convolution(fields: ConfigFields) -> LayerState:
    hidden = fields.first("hidden_size")
    width = fields.first("conv_dim", default=hidden, low=1)
    return LayerState(
        convolution=width * (fields.first("conv_L_cache") - 1), params=4 * hidden * width
    )


FAMILIES: dict[str, Callable[[ConfigFields], LayerState]] = {
    "linear_num_key_heads": _gated_delta_net,
    "linear_num_heads": _kimi_delta_attention,
    "linear_attn_config": _published_kimi_linear,
    "short_conv_kernel_size": _ling_delta_attention,
    "layer_group_size": _lightning_attention,
    "mamba_n_heads": _mamba2,
    "mamba_num_heads": _mamba2,
    "mamba_d_state": _mamba1,
    "conv_L_cache": _short_convolution,
}
"""By a field that only such a family has; the first that is given wins."""


def _recurrent_bits(fields: ConfigFields, default: int) -> int:
    """Return the recurrent part's type: the config's, else what vLLM takes for the family on GPUs."""
    name = fields.config.get("mamba_ssm_dtype") or fields.config.get("mamba_ssm_cache_dtype")
    known = {"float32": FLOAT32, "bfloat16": HALF, "float16": HALF}
    if name is not None and name not in known:
        raise DwdpConfigError(
            f"{fields.architecture}: the type of a state in config.json is {shown(name)}; it must be "
            f"one of {', '.join(known)}."
        )
    return default if name is None else known[name]
