"""This rank's experts while a model is loaded: collected layer by layer into one shared shard.

Owns the shard that the device made and the list of layers. Nothing here knows of peers. Worker's main
thread.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_dwdp.compat.worker import moe
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.base import Device, Mapping, PeerMemory, Shard
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.composite import ModelLayout, WeightLayout
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.model_executor.expert_parameters import declared_names, per_expert_parameters
from vllm_dwdp.model_executor.routed_experts import DwdpRoutedExperts, shard_layer_class


@dataclass(frozen=True, kw_only=True)
class ShardedWeight:
    """One per-expert parameter of a layer.

    Args:
        layout: its bytes over the group.
        dtype: of its elements.
        shape: `[num_experts, ...]`.
        mapping: its writable pages in our shard.
    """

    layout: WeightLayout
    dtype: torch.dtype
    shape: tuple[int, ...]
    mapping: Mapping


@dataclass(kw_only=True)
class ShardedLayer:
    """One MoE layer of this rank.

    Args:
        layer: vLLM's layer.
        placement: of its experts.
        model_number: of the model that it belongs to; a drafter's layers run in an order of their own.
        run_index: its place in the order in which layers were built, and run.
        weights: its per-expert parameters, in the order of the shard.
    """

    layer: Any
    placement: Placement
    model_number: int
    run_index: int
    weights: list[ShardedWeight] = field(default_factory=list)


class ExpertShard:
    """Implements `ShardRegistry` over shared memory; `close` releases it.

    Args:
        config: of the group.
        dwdp_rank: our position in it.
        device: that holds the experts.
        adopted: memory of an earlier life of this rank; then no expert is read from disk.
    """

    def __init__(
        self, config: DwdpConfig, dwdp_rank: int, device: Device, adopted: Shard | None = None
    ) -> None:
        self.config = config
        self.dwdp_rank = dwdp_rank
        self.device = device
        self.memory = adopted or device.new_shard(f"dwdp-shard-{dwdp_rank}")
        self.layers: list[ShardedLayer] = []
        self.published: list[ShardedLayer] = []
        """Those in the shard, in its order, which is that of `ModelLayout.layers`."""
        self._current_model: Callable[[], int] = lambda: 0

    def close(self) -> None:
        """Release the shard; peers that mapped it keep their mappings."""
        self.memory.close()

    @property
    def is_adopted(self) -> bool:
        """Whether the experts are those of an earlier life of this rank."""
        return self.memory.is_adopted

    def placement(self, num_experts: int) -> Placement:
        """Placement of a layer with `num_experts` experts over our group."""
        per_rank = self.config.experts_per_rank
        return Placement(
            num_experts=num_experts,
            group_size=self.config.group_size,
            experts_per_rank=None if per_rank is None else min(per_rank, num_experts),
        )

    def add_layer(self, layer: DwdpRoutedExperts, placement: Placement) -> None:
        """A layer was built; remember the order, which is the order in which layers run.

        Raises:
            DwdpUnsupportedError: its quantisation method cannot share experts; nothing is loaded yet.
        """
        declared_names(layer)
        self.layers.append(
            ShardedLayer(
                layer=layer,
                placement=placement,
                model_number=self._current_model(),
                run_index=len(self.layers),
            )
        )

    def publish_layer(self, layer: DwdpRoutedExperts) -> None:
        """Move the layer's resident experts into the shard and free vLLM's copy of them."""
        sharded = next(entry for entry in self.layers if entry.layer is layer)
        for name, tensor in per_expert_parameters(layer):
            self._publish_parameter(sharded, name, tensor)
        del name, tensor  # or the last one would outlive the release
        self.published.append(sharded)
        self.device.release_free_memory()

    def _publish_parameter(self, sharded: ShardedLayer, name: str, tensor: torch.Tensor) -> None:
        weight = WeightLayout(
            name=name,
            placement=sharded.placement,
            expert_bytes=tensor[0].nbytes,
            page_bytes=self.device.page_bytes,
        )
        pages = weight.shard_pages(self.dwdp_rank)
        pieces = [len(piece) for piece in weight.shard_pieces(self.dwdp_rank)]
        mapping = self.memory.append(pieces)
        address = mapping.address + weight.resident(self.dwdp_rank).start - pages.start
        resident = tensor_at(address, tensor.dtype, tuple(tensor.shape), self.device.torch_device)
        if not self.is_adopted:
            resident.copy_(tensor)
        getattr(sharded.layer, name).data = resident
        sharded.weights.append(
            ShardedWeight(
                layout=weight,
                dtype=tensor.dtype,
                shape=(sharded.placement.num_experts, *tensor.shape[1:]),
                mapping=mapping,
            )
        )

    def finish_loading(self, model: torch.nn.Module) -> ModelLayout:
        """Seal the shard and lay the model out.

        Raises:
            DwdpUnsupportedError: a routed-experts layer of the model was not replaced, or there is
                none.
        """
        foreign = moe.find_foreign_layers(model, DwdpRoutedExperts)
        if foreign:
            raise DwdpUnsupportedError(
                f"{type(model).__name__} builds its experts from {', '.join(foreign)}, whose weight "
                "loader does not follow the expert map, so they cannot be sharded. Use dwdp mode "
                '"replica".'
            )
        if not self.layers:
            raise DwdpUnsupportedError(
                f"{type(model).__name__} has built no layer with routed experts, though its config "
                "counts experts, so there is nothing to share. Use stock vLLM for it."
            )
        unpublished = [entry.layer.layer_name for entry in self.layers if not entry.weights]
        if unpublished:
            raise DwdpUnsupportedError(
                f"{unpublished[0]}: vLLM never processed this layer's weights after loading, so "
                'they cannot be shared. Use dwdp mode "replica".'
            )
        self.memory.seal()
        return self.plan_layout()

    def plan_layout(self) -> ModelLayout:
        """The layout of every layer that was published, over the whole group."""
        return ModelLayout.plan(
            [
                (entry.layer.layer_name, tuple(weight.layout for weight in entry.weights))
                for entry in self.published
            ]
        )

    def layout_digest(self) -> bytes:
        """Identity of what lies in every rank's shard, and of the code that will read it.

        Sizes alone would not tell apart two kernels that order the same bytes differently.
        """
        facts = [
            (
                entry.layer.layer_name,
                *moe.kernel_identity(entry.layer),
                [(weight.layout.name, str(weight.dtype), weight.shape) for weight in entry.weights],
            )
            for entry in self.published
        ]
        return hashlib.sha256(repr(facts).encode()).digest()

    def fill_edges(self, layout: ModelLayout, peers: dict[int, PeerMemory]) -> None:
        """Copy the bytes that neighbours own on our first and last pages; the shard is whole then.

        Memory of an earlier life has them already.
        """
        if self.is_adopted:
            return
        for sharded, layer in zip(self.published, layout.layers, strict=True):
            for index, weight in enumerate(layer.weights):
                pages = weight.shard_pages(self.dwdp_rank)
                for edge in weight.edges(self.dwdp_rank):
                    offset = layer.shard_offset(index, edge.source_rank, edge.span.start)
                    self.device.copy(
                        sharded.weights[index].mapping.address + edge.span.start - pages.start,
                        peers[edge.source_rank].address + offset,
                        len(edge.span),
                    )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While active, vLLM builds sharded layers and reads only their experts from disk."""
        replacement: Callable[[type], type] = lambda stock: shard_layer_class(stock, self)  # noqa: E731
        with (
            moe.replaced_layers(replacement),
            moe.resident_weights(self._before_reading),
            moe.numbered_models() as self._current_model,
        ):
            yield

    def _before_reading(self) -> moe.ResidentExperts:
        """All layers exist: check that their experts fit, and name those that any layer keeps."""
        resident_bytes = sum(
            parameter.nbytes
            for entry in self.layers
            for parameter in entry.layer.parameters(recurse=False)
        )
        ranges = [entry.placement.resident[self.dwdp_rank] for entry in self.layers]
        if self.is_adopted:
            ranges = []
        else:
            self.device.check_room(resident_bytes, "this rank's share of the experts")
        return moe.ResidentExperts(
            ids=frozenset(expert for span in ranges for expert in range(span.start, span.stop)),
            split_fused=any(moe.loads_fused_tensors_whole(entry.layer) for entry in self.layers),
        )
