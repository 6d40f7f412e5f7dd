"""A kernel that copies just the routed remote experts of a layer into its slot.

The alternative to reading peers in place for small steps: which experts are needed is read on the
device, from the router's output, so that it runs inside a captured graph. `ExpertGather` is made once
per layer from the product's own copy plan, cut into chunks; a launch has one program per chunk, and
a program whose expert no token was routed to ends at once. It runs on the compute stream, between the
router and the expert kernels, and overlaps nothing. Never run on a GPU so far; the interpreter
(TRITON_INTERPRET=1) gives bitwise the right weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dwdp.layout.composite import ByteRange
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView

CHUNK_BYTES = 64 * 1024
WORD_BYTES = 4
UNIT_BYTES = 16
"""Offsets are counted in these, so that the compiler knows that 16-byte accesses are aligned."""


@triton.jit  # type: ignore[untyped-decorator]
def _gather_chunks(  # type: ignore[no-untyped-def]
    anchor, chunks, routed, CHUNK_WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy one chunk: expert, source and destination in units from `anchor`, length in units."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 4
    expert = tl.load(chunk)
    if tl.load(routed + expert) != 0:
        source = anchor + tl.load(chunk + 1) * 4
        destination = anchor + tl.load(chunk + 2) * 4
        num_words = tl.load(chunk + 3) * 4
        for start in range(0, CHUNK_WORDS, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < num_words
            words = tl.load(source + offsets, mask=inside)
            tl.store(destination + offsets, words, mask=inside)


@dataclass(frozen=True, kw_only=True)
class ExpertGather:
    """The chunks of one layer; `chunks` is `[num_chunks, 4]`, int64, on the device."""

    anchor: torch.Tensor
    chunks: torch.Tensor
    num_experts: int

    @classmethod
    def plan(cls, mapper: CompositeMapper, index: int, view: LayerView) -> "ExpertGather":
        """Plan copies from the peers' shards into the ring view of layer number `index`.

        Raises:
            ValueError: an expert's bytes are no multiple of 16.
        """
        device = mapper.device.torch_device
        anchor = torch.zeros(UNIT_BYTES, dtype=torch.int32, device=device)
        layer, rank = mapper.layout.layers[index], mapper.dwdp_rank
        rows: list[tuple[int, int, int, int]] = []
        for number, weight in enumerate(layer.weights):
            if weight.expert_bytes % UNIT_BYTES:
                raise ValueError(
                    f"{weight.name}: experts of {weight.expert_bytes} bytes cannot be gathered in "
                    f"units of {UNIT_BYTES}"
                )
            for copy in weight.remote_copies(rank):
                source = mapper.peers[copy.source_rank].address
                source += layer.shard_offset(number, copy.source_rank, copy.span.start)
                for expert, span in _by_expert(copy.span, weight.expert_bytes):
                    for start in range(span.start, span.stop, CHUNK_BYTES):
                        begin = source + start - copy.span.start
                        target = view.addresses[number] + start
                        length = min(CHUNK_BYTES, span.stop - start)
                        rows.append((expert, begin, target, length))
        origin = anchor.data_ptr()
        table = [
            (expert, *((value - origin) // UNIT_BYTES for value in (begin, target)), length // 16)
            for expert, begin, target, length in rows
        ]
        for _, begin, target, length in rows:
            aligned = (begin - origin, target - origin, length)
            assert not any(value % UNIT_BYTES for value in aligned), "a chunk is not aligned"
        return cls(
            anchor=anchor,
            chunks=torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 4),
            num_experts=layer.weights[0].placement.num_experts,
        )

    def launch(self, topk_ids: torch.Tensor) -> None:
        """Enqueue (or capture) the copies that `topk_ids` `[num_tokens, top_k]` asks for."""
        routed = torch.zeros(self.num_experts, dtype=torch.int32, device=topk_ids.device)
        routed.index_fill_(0, topk_ids.flatten().long(), 1)
        if self.chunks.shape[0]:
            _gather_chunks[(self.chunks.shape[0],)](
                self.anchor,
                self.chunks,
                routed,
                CHUNK_WORDS=CHUNK_BYTES // WORD_BYTES,
                BLOCK=2048,
                num_warps=8,
            )

    def gathered_bytes(self, topk_ids: torch.Tensor) -> int:
        """Return what a launch copies for `topk_ids`; waits for the device."""
        experts = set(topk_ids.flatten().tolist())
        return sum(row[3] * UNIT_BYTES for row in self.chunks.tolist() if row[0] in experts)


def _by_expert(span: ByteRange, expert_bytes: int) -> list[tuple[int, ByteRange]]:
    """Cut `span` at the borders of experts; each part comes with its expert."""
    first, last = span.start // expert_bytes, (span.stop - 1) // expert_bytes
    return [
        (
            expert,
            span.intersect(ByteRange(expert * expert_bytes, (expert + 1) * expert_bytes)),
        )
        for expert in range(first, last + 1)
    ]
