"""What users plug into an engine by name: a worker's extension and a logits processor of their own."""

from collections.abc import Callable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ExpertRows:
    """An extension of a worker, as trainers have one (`worker_extension_cls`)."""

    model_runner: Any

    def count_expert_rows(self) -> dict[str, int]:
        """Return how many experts each large parameter has in the model, by its name."""
        return {
            name: len(parameter)
            for name, parameter in self.model_runner.get_model().named_parameters()
            if "w13_weight" in name or "w2_weight" in name
        }


class OnlyEven(AdapterLogitsProcessor):
    """Leaves even tokens only to requests that say so."""

    def is_argmax_invariant(self) -> bool:
        """Whether greedy tokens stay what they were."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """Return what changes a request's logits, if something does."""
        if not (params.extra_args or {}).get("only_even"):
            return None

        def process(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[1::2] = -float("inf")
            return logits

        return process
