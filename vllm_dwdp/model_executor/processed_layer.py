"""A layer as vLLM's processing left it: its tensors, sorted, and their way out of vLLM's memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_dwdp.compat.worker import moe
from vllm_dwdp.compat.worker.reachable import reachable_numbers, reachable_tensors
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.expert_tensors import (
    ExpertRows,
    describe,
    digest_of,
    expert_dimension,
    sort_tensors,
)
from vllm_dwdp.model_executor.raw_parameters import bytes_of
from vllm_dwdp.model_executor.relocation import WatchedStorage, check_gone, detach

Findings = dict[str, torch.Tensor | float]
"""What a processed layer holds, by path: bytes of tensors, and numbers."""


class ProcessedLayer:
    """The tensors and numbers of a layer that vLLM has processed whole.

    Args:
        layer: vLLM's, or one like it.
        watched: memory that was there before; what of it the layer no longer uses must be gone.

    Raises:
        DwdpUnsupportedError: its tensors are mixed up in a way that cannot be shared.
    """

    def __init__(self, layer: Any, device: torch.device, watched: Sequence[WatchedStorage]) -> None:
        self._layer = layer
        self._watched = watched
        self._numbers = reachable_numbers(layer)
        self.tensors = sort_tensors(
            layer.layer_name, reachable_tensors(layer), layer.global_num_experts, device
        )

    def independent_of_others(self, resident: ExpertRange) -> Findings:
        """Digest what must not depend on other ranks' experts: resident rows, and what is replicated.

        In place, not copied, where it is contiguous.
        """
        found: Findings = dict(self._numbers)
        for path, tensor in self.tensors.replicated.items():
            found[path] = bytes_of(tensor.detach().contiguous())
        for rows in self.tensors.per_expert:
            for placed in rows.tensors:
                dimension = expert_dimension(placed.tensor, rows.num_experts)
                if dimension is not None:
                    part = placed.tensor.detach().narrow(dimension, resident.start, len(resident))
                    found[placed.path] = bytes_of(part.contiguous())
        return found

    def facts(self) -> dict[str, str]:
        """Return what all ranks must have in common, by path."""
        facts = {"kernel": moe.kernel_identity(self._layer)}
        for rows in self.tensors.per_expert:
            shown = (f"{placed.path} {describe(placed.tensor)}" for placed in rows.tensors)
            facts[rows.name] = f"{rows.row_bytes} bytes per expert: {'; '.join(shown)}"
        for path, tensor in self.tensors.replicated.items():
            facts[path] = f"{describe(tensor)} #{digest_of(tensor)}"
        return facts | {path: repr(number) for path, number in self._numbers.items()}

    def hand_over(
        self,
        shared: list[ExpertRows],
        private: Sequence[ExpertRows],
        take: Callable[[ExpertRows], None],
    ) -> None:
        """Let `take` copy the storages of `shared` one by one, and free each.

        Args:
            shared: is emptied.
            private: storages that stay.

        Raises:
            DwdpUnsupportedError: something else keeps one of them, or memory of before.
        """
        staying = [rows.rows for rows in private] + list(self.tensors.replicated.values())
        addresses = {tensor.untyped_storage().data_ptr() for tensor in staying}
        gone = [each for each in self._watched if each.address not in addresses]
        gone += [WatchedStorage.of(rows.name, rows.rows) for rows in shared]
        del self.tensors
        while shared:
            rows = shared.pop(0)
            take(rows)
            detach(rows.tensors)
            del rows
        check_gone(self._layer.layer_name, gone)
