"""The parameters of routed experts, of shared ones, and of feed-forwards without experts. Pure."""

from typing import NamedTuple

from vllm_dwdp.planner.checkpoint import ConfigFields
from vllm_dwdp.planner.layer_kinds import LayerKind, layer_kinds

UNGATED = ("relu2",)
"""Activations of a feed-forward of two matrices; others have a third, for the gate."""


SHARED_WIDTH = "moe_shared_expert_intermediate_size"
"""Of one shared expert (Ling, NemotronH)."""


class Widths(NamedTuple):
    """What the matrices of feed-forwards lie between; 0 where there is no such feed-forward.

    Args:
        matrices: of a feed-forward.
        hidden: of the residual stream.
        latent: of what routed experts read.
        expert: inside of a routed expert.
        other_expert: inside of one of the second kind that ERNIE-VL has for pictures.
        shared: inside of what an MoE layer computes for every token besides.
        dense: inside of a layer without routed experts.
    """

    matrices: int
    hidden: int
    latent: int
    expert: int
    other_expert: int
    shared: int
    dense: int


class FeedForwards(NamedTuple):
    """Parameters.

    Args:
        expert: of one routed expert.
        other_expert: of one of the second kind; 0 where there is one kind.
        shared: of what an MoE layer computes for every token besides.
        dense: of a layer without routed experts, in the mean over these.
    """

    expert: int
    other_expert: int
    shared: int
    dense: int


def feed_forwards(
    fields: ConfigFields, num_layers: int, with_experts: tuple[int, ...]
) -> FeedForwards:
    """Read the sizes, by the names that the families have for them."""
    size = widths(fields)
    dense = size.dense * _dense_share(fields, num_layers, with_experts)
    return FeedForwards(
        expert=size.matrices * size.latent * size.expert,
        other_expert=size.matrices * size.latent * size.other_expert,
        shared=size.matrices * size.hidden * size.shared,
        dense=round(size.matrices * size.hidden * dense),
    )


def widths(fields: ConfigFields) -> Widths:
    """Read the widths, by the names that the families have for them."""
    hidden = fields.first("hidden_size")
    matrices = 2 if fields.config.get("mlp_hidden_act") in UNGATED else 3
    names = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_hidden_dim")
    expert = fields.of_kind(0, *names, default=0) or fields.first("intermediate_size")
    other_expert = fields.of_kind(1, *names, default=0) if fields.has_two_kinds else 0
    dense_names = (
        "prefix_dense_intermediate_size",
        "dense_intermediate_size",
        "intermediate_size_mlp",
        "ffn_hidden_size",
    )
    dense = fields.first(*dense_names, "intermediate_size", default=0)
    num_shared = fields.first(
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
        "num_shared_expert",
        default=int("llama4" in fields.model_type),
    )
    shared_names = (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
    )
    shared_each = fields.most(SHARED_WIDTH, default=0)
    if shared_each:  # of Param-2 it is the width of all of them
        num_shared = 1 if "param2" in fields.model_type else max(1, num_shared)
    shared = fields.most(*shared_names, default=0) or (shared_each or expert) * num_shared
    if fields.attentions_per_layer > 1:
        shared += fields.attentions_per_layer * dense
    latent = fields.first("moe_latent_size", "routed_expert_hidden_size", default=0) or hidden
    return Widths(matrices, hidden, latent, expert, other_expert, shared, dense)


def _dense_share(fields: ConfigFields, num_layers: int, with_experts: tuple[int, ...]) -> float:
    """Return the part of the layers without experts that are a feed-forward, or have one."""
    kinds = layer_kinds(fields, num_layers)
    without = set(range(num_layers)) - set(with_experts)
    if LayerKind.NONE not in kinds:
        return 1.0
    return sum(kinds[layer] is LayerKind.NONE for layer in without) / max(1, len(without))
