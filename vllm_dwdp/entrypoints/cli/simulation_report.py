"""What `vllm-dwdp simulate` shows of a simulation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_dwdp.planner.advice import kv_shortage, lacking_memory
from vllm_dwdp.planner.capacity import dep_capacity, dwdp_capacity
from vllm_dwdp.planner.contention import Pulls
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.disaggregated import GENERATION_GPUS, Service, output_tokens_per_s
from vllm_dwdp.planner.estimates import assumptions
from vllm_dwdp.planner.simulate import Outcome, coarsened, sweep
from vllm_dwdp.planner.traffic import Request


@dataclass(frozen=True, kw_only=True)
class SimulationReport:
    """One simulation, run when it is first looked at.

    Args:
        requests: by arrival.
        service: of the generation servers.
        max_tokens: of a step.
        slice_mib: that was asked for.
        pulls: that are simulated.
    """

    model: CostModel
    requests: Sequence[Request]
    service: Service
    max_tokens: int
    routing_skew: float
    slice_mib: float
    pulls: Pulls

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """By deployment."""
        return dict(
            sweep(
                self.model,
                self.requests,
                max_tokens=self.max_tokens,
                routing_skew=self.routing_skew,
                pulls=self.pulls,
            )
        )

    @cached_property
    def _capacities(self) -> dict[str, float]:
        model, requests, limit = self.model, self.requests, self.max_tokens
        dep = dep_capacity(model, requests, max_tokens=limit, routing_skew=self.routing_skew)
        return {
            "DEP": dep,
            "DWDP": dwdp_capacity(model, requests, max_tokens=limit, pulls=self.pulls),
        }

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns of `rows`."""
        return (
            "",
            "prompt tokens/s/GPU",
            "busy",
            "TTFT P50, s",
            "TTFT P99, s",
            "prompt tokens/s/GPU, always busy",
            f"generated tokens/s/GPU at {self.service.tokens_per_user:g} per user, all servers busy",
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per deployment."""
        return [
            {
                "deployment": name,
                "prompt_tokens_per_s_per_gpu": outcome.tokens_per_s,
                "busy": outcome.busy,
                "ttft_p50_s": outcome.percentile(50),
                "ttft_p99_s": outcome.percentile(99),
                "prompt_tokens_per_s_per_gpu_always_busy": self._capacities[name],
                "output_tokens_per_s_per_gpu_always_busy": output_tokens_per_s(
                    self.model, self.service, self._capacities[name]
                ),
            }
            for name, outcome in self.outcomes.items()
        ]

    @property
    def origin(self) -> str:
        """Of all figures."""
        return self.model.efficiency.origin(assumed=True)

    @property
    def warnings(self) -> list[str]:
        """What makes figures other than they seem."""
        longest = max(request.input_tokens for request in self.requests)
        found = [*lacking_memory(self.model), *kv_shortage(self.model, longest, 1)]
        said = coarsened(self.model, self.slice_mib, self.pulls)
        return [*found, said] if said else found

    @property
    def assumptions(self) -> list[str]:
        """What figures rest on that nobody measured."""
        return [
            *assumptions(self.model),
            f"The busiest expert-parallel rank has {self.routing_skew:g} times the mean load "
            f"(--routing-skew); generation servers have {GENERATION_GPUS} GPUs, and room for the KV "
            "cache of their batch.",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "origin": self.origin,
            "rows": self.rows,
            "warnings": self.warnings,
            "assumptions": self.assumptions,
        }
