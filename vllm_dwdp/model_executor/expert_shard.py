"""This rank's experts while a model is loaded: collected layer by layer into one shared shard.

Owns the shard that the device made and the list of layers. Nothing here knows of peers. Worker's main
thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from vllm_dwdp.compat.worker import checkpoint_reader, moe
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.base import Device, PeerMemory, Shard
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import ModelLayout, smallest_composite_bytes
from vllm_dwdp.layout.placement import ExpertRange, Placement
from vllm_dwdp.model_executor.expert_tensors import ExpertRows, TensorOverRows
from vllm_dwdp.model_executor.layout_facts import encode_facts
from vllm_dwdp.model_executor.loaded_model import check_layers
from vllm_dwdp.model_executor.private_rows import PrivateTensors, layouts_of
from vllm_dwdp.model_executor.processed_layer import ProcessedLayer
from vllm_dwdp.model_executor.raw_parameters import RawParameters
from vllm_dwdp.model_executor.routed_experts import DwdpRoutedExperts, shard_layer_class
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer, ShardedWeight

TIMES_WHOLE = 2
"""So often is a layer of all experts held while it is processed: as loaded, and as packed."""


class ExpertShard:
    """Implements `ShardRegistry` over shared memory; `close` releases it.

    Args:
        config: of the group.
        dwdp_rank: our position in it.
        device: that holds the experts.
        adopted: memory of an earlier start of this rank; then no expert is read from disk.
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
        self._proved: set[str] = set()

    def close(self) -> None:
        """Release the shard; peers that mapped it keep their mappings."""
        self.memory.close()

    @property
    def is_adopted(self) -> bool:
        """Whether the experts are those of an earlier start of this rank."""
        return self.memory.is_adopted

    def placement(self, num_experts: int) -> Placement:
        """Placement of a layer with `num_experts` experts over our group."""
        per_rank = self.config.experts_per_rank
        return Placement(
            num_experts=num_experts,
            group_size=self.config.group_size,
            experts_per_rank=None if per_rank is None else min(per_rank, num_experts),
        )

    def loads(self, num_experts: int) -> ExpertRange:
        """Return the experts of such a layer that this rank reads: none that it has adopted."""
        if self.is_adopted:
            return ExpertRange(0, 0)
        return self.placement(num_experts).resident[self.dwdp_rank]

    def needs_proof(self, layer: DwdpRoutedExperts) -> bool:
        """Whether the layer is the first of its kind that this rank loads experts for."""
        kind = layer.kind()
        is_new = kind not in self._proved and len(layer.raw.resident) > 0
        self._proved.add(kind)
        return is_new

    def add_layer(self, layer: DwdpRoutedExperts) -> None:
        """Register a layer that was built; layers run in this order."""
        self.layers.append(
            ShardedLayer(
                layer=layer,
                placement=self.placement(layer.raw.num_experts),
                model_number=self._current_model(),
                run_index=len(self.layers),
            )
        )

    def publish_layer(self, layer: DwdpRoutedExperts, processed: ProcessedLayer) -> None:
        """Move the layer's resident experts into the shard and free vLLM's copy of all.

        Raises:
            DwdpUnsupportedError: something else keeps that copy.
        """
        sharded = next(entry for entry in self.layers if entry.layer is layer)
        sharded.facts = processed.facts()
        sharded.replicated = dict(processed.tensors.replicated)
        shared, sharded.private = self._divide(processed.tensors.per_expert)
        processed.hand_over(shared, sharded.private, partial(self._publish_rows, sharded))
        self.published.append(sharded)
        self.device.release_free_memory()

    def _publish_rows(self, sharded: ShardedLayer, rows: ExpertRows) -> None:
        self.add_weight(sharded, rows.name, rows.row_bytes, rows.tensors)
        if not self.is_adopted:
            self.fill_weight(sharded, rows.bytes_of(sharded.placement.resident[self.dwdp_rank]))

    def _divide(
        self, per_expert: Sequence[ExpertRows]
    ) -> tuple[list[ExpertRows], list[ExpertRows]]:
        """Storages that become composite tensors, and those that every rank keeps whole."""
        limit = smallest_composite_bytes(
            (rows.num_bytes for rows in per_expert), self.config.group_size, self.device.page_bytes
        )
        shared = [rows for rows in per_expert if rows.num_bytes >= limit]
        return shared, [rows for rows in per_expert if rows.num_bytes < limit]

    def add_weight(
        self,
        sharded: ShardedLayer,
        name: str,
        expert_bytes: int,
        tensors: Sequence[TensorOverRows],
    ) -> None:
        """Append room for the resident experts of one composite tensor to the shard."""
        weight = WeightLayout(
            name=name,
            placement=sharded.placement,
            expert_bytes=expert_bytes,
            page_bytes=self.device.page_bytes,
        )
        pieces = [len(piece) for piece in weight.shard_pieces(self.dwdp_rank)]
        mapping = self.memory.append(pieces)
        sharded.weights.append(
            ShardedWeight(layout=weight, tensors=tuple(tensors), mapping=mapping)
        )

    def fill_weight(self, sharded: ShardedLayer, resident: torch.Tensor) -> None:
        """Write the bytes of the resident experts of the weight that was added last.

        Args:
            sharded: the layer that it was added to.
            resident: uint8 of shape (bytes,), as `ExpertRows.bytes_of` returns it.
        """
        weight = sharded.weights[-1]
        before = weight.layout.resident(self.dwdp_rank).start
        before -= weight.layout.shard_pages(self.dwdp_rank).start
        address, shape = weight.mapping.address + before, (resident.numel(),)
        if resident.numel():
            tensor_at(address, torch.uint8, shape, self.device.torch_device).copy_(resident)

    def finish_loading(self, model: torch.nn.Module) -> ModelLayout:
        """Seal the shard and lay the model out.

        Raises:
            DwdpUnsupportedError: experts of the model cannot be shared.
        """
        check_layers(model, self.layers)
        return self.seal()

    def seal(self) -> ModelLayout:
        """Append the resident rows of private tensors; the shard is final but for its edges."""
        layout = ModelLayout.plan(
            [
                (entry.layer.layer_name, tuple(weight.layout for weight in entry.weights))
                for entry in self.published
            ],
            layouts_of(self.published),
        )
        if num_bytes := layout.private_bytes(self.dwdp_rank):
            area = self.memory.append([num_bytes]).address
            private = self.private_tensors(layout)
            private.adopt(area) if self.is_adopted else private.publish(area)
        self.memory.seal()
        return layout

    def private_tensors(self, layout: ModelLayout) -> PrivateTensors:
        """Return the small tensors that this rank keeps whole."""
        return PrivateTensors(
            layers=self.published, layout=layout, dwdp_rank=self.dwdp_rank, device=self.device
        )

    def layout_facts(self) -> bytes:
        """Return what lies in every rank's shard and the code that will read it, as ranks compare it.

        Sizes alone would not tell apart two kernels that order the same bytes differently.
        """
        return encode_facts({entry.layer.layer_name: entry.facts for entry in self.published})

    def read_bytes(self) -> int:
        """Bytes of the checkpoint's large expert tensors that were read."""
        return sum(entry.layer.raw.read_bytes for entry in self.layers)

    def read_share(self) -> float:
        """Return the part of the checkpoint's large expert tensors that was read; 0 if it has none."""
        raws: list[RawParameters] = [entry.layer.raw for entry in self.layers]
        return self.read_bytes() / max(1, sum(raw.checkpoint_bytes for raw in raws))

    def fill_edges(self, layout: ModelLayout, peers: Mapping[int, PeerMemory]) -> None:
        """Copy the bytes that neighbours own on our first and last pages; the shard is whole then.

        Memory of an earlier start has them already.
        """
        if self.is_adopted:
            return
        mapping = self.memory.map_writable()
        try:
            self.copy_edges(layout, peers, mapping.address)
        finally:
            mapping.unmap()

    def copy_edges(self, layout: ModelLayout, peers: Mapping[int, PeerMemory], base: int) -> None:
        """Copy those bytes into the shard, all of which is writable from address `base` on."""
        for layer in layout.layers:
            for index, weight in enumerate(layer.weights):
                for edge in weight.edges(self.dwdp_rank):
                    start = edge.span.start
                    self.device.copy(
                        base + layer.shard_offset(index, self.dwdp_rank, start),
                        peers[edge.source_rank].address
                        + layer.shard_offset(index, edge.source_rank, start),
                        len(edge.span),
                    )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While active, vLLM builds sharded layers and reads only their experts from disk."""
        replacement: Callable[[type], Any] = lambda stock: shard_layer_class(stock, self)  # noqa: E731
        with ExitStack() as stack:
            stack.enter_context(moe.replaced_layers(replacement))
            stack.enter_context(checkpoint_reader.mapped_experts())
            stack.enter_context(checkpoint_reader.split_experts(self._splits_experts))
            stack.enter_context(checkpoint_reader.dummy_weights(self._fill_with_dummies))
            numbered = checkpoint_reader.numbered_models(self._check_room)
            self._current_model = stack.enter_context(numbered)
            yield

    def _splits_experts(self) -> bool:
        return any(moe.copies_fused_tensors(entry.layer) for entry in self.layers)

    def _fill_with_dummies(
        self, tensor: torch.Tensor, stock: Callable[[torch.Tensor], None]
    ) -> bool:
        """Fill the rows of a tensor that has those of resident experts only."""
        raw = next((each.layer.raw for each in self.layers if each.layer.raw.keeps(tensor)), None)
        if raw is not None:
            raw.fill(tensor, stock)
        return raw is not None

    def _check_room(self) -> None:
        """Note that a model's layers exist, and nothing of it is loaded."""
        raws = [entry.layer.raw for entry in self.layers if not entry.weights]
        whole_bytes = max((raw.whole_bytes for raw in raws), default=0)
        self.device.check_room(
            sum(raw.resident_bytes for raw in raws) + TIMES_WHOLE * whole_bytes,
            "this rank's share of the experts, and to process one layer of all of them",
        )
