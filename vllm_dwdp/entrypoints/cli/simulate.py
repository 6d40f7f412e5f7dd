"""`vllm-dwdp simulate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_dwdp.entrypoints.cli.options import (
    AsJson,
    DenseDtype,
    Dtypes,
    ExpertDtype,
    Gpu,
    HardwareFile,
    KvDtype,
    Model,
    Png,
    cost_model,
)
from vllm_dwdp.entrypoints.cli.paper import paper as show_paper
from vllm_dwdp.entrypoints.pictures.draw import PngFile
from vllm_dwdp.entrypoints.pictures.planner import ttft_pictures
from vllm_dwdp.entrypoints.tables import print_json, progress, say, show, text
from vllm_dwdp.planner.capacity import dep_capacity, dwdp_capacity
from vllm_dwdp.planner.contention import Pulls
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.disaggregated import DECODE_GPUS, Service, output_tokens_per_s
from vllm_dwdp.planner.estimates import assumptions
from vllm_dwdp.planner.plan import kv_shortage, lacking_memory
from vllm_dwdp.planner.simulate import (
    SLICE_MIB,
    Outcome,
    check_steps,
    coarsened,
    pulls_for,
    simulate_dep,
    simulate_dwdp,
)
from vllm_dwdp.planner.traffic import Request, poisson_traffic, read_trace


def simulate(
    paper: Annotated[bool, typer.Option("--paper", help="Now a command of its own.")] = False,
    model: Model = None,
    gpu: Gpu = "gb200",
    ranks: Annotated[int, typer.Option(help="Ranks that share one copy.")] = 4,
    expert_dtype: ExpertDtype = "",
    dense_dtype: DenseDtype = "",
    kv_dtype: KvDtype = "",
    hardware: HardwareFile = None,
    requests: Annotated[int, typer.Option(help="Prompts in all.")] = 2000,
    rate: Annotated[float, typer.Option(help="Prompts per second over all ranks.")] = 10.0,
    input_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 8192,
    smallest_share: Annotated[float, typer.Option(help="Shortest prompt over the longest.")] = 0.8,
    trace: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"arrival_s": ..., "input_tokens": ...} as traffic.'),
    ] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's limit.")] = 16384,
    routing_skew: Annotated[float, typer.Option(help="Busiest rank over the mean.")] = 1.1,
    slice_mib: Annotated[
        float, typer.Option(help="Of a copy; 0 copies a peer's share whole.")
    ] = SLICE_MIB,
    pull_order: Annotated[str, typer.Option(help="rotated or random.")] = "rotated",
    output_tokens: Annotated[int, typer.Option(help="Generated on separate servers.")] = 1024,
    tokens_per_user: Annotated[float, typer.Option(help="Per second, on those servers.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    as_json: AsJson = False,
    png: Png = None,
) -> None:
    """Replay prefill traffic on DEP in lockstep and on independent DWDP ranks.

    The last column is what both kinds of servers can do together, prefill servers that always have work
    and decode servers: it does not depend on the rate.

    Times are in seconds, rates in requests per second and in tokens per second and GPU. Source: the
    roofline of arXiv 2604.01621, sections 3 and 4.3.1, step by step.
    """
    if paper:
        progress("simulate --paper is now vllm-dwdp paper; the flag goes with the next release.")
        show_paper(as_json=as_json, png=png)
        return
    picture = PngFile(png)
    check_steps(max_num_batched_tokens, routing_skew)
    dtypes = Dtypes(experts=expert_dtype, dense=dense_dtype, kv_cache=kv_dtype)
    cost = cost_model(model, gpu, ranks, dtypes, hardware)
    traffic = (
        read_trace(trace)
        if trace is not None
        else poisson_traffic(
            num_requests=requests,
            requests_per_s=rate,
            input_tokens=input_tokens,
            smallest_share=smallest_share,
            seed=seed,
        )
    )
    report = SimulationReport(
        model=cost,
        requests=traffic,
        service=Service(
            input_tokens=sum(request.input_tokens for request in traffic) / len(traffic),
            output_tokens=output_tokens,
            tokens_per_user=tokens_per_user,
        ),
        max_tokens=max_num_batched_tokens,
        routing_skew=routing_skew,
        slice_mib=slice_mib,
        pulls=pulls_for(cost, slice_mib, pull_order),
    )
    picture.write(lambda: ttft_pictures(cost, report.outcomes))
    if as_json:
        print_json(report.as_dict())
        return
    title = f"{cost.shape.name} on {ranks} x {gpu}, prefill, {report.origin} efficiencies"
    show(title, report.headings, [[text(value) for value in row.values()] for row in report.rows])
    say(*(f"- {sentence}" for sentence in report.warnings))
    say("Assumed:", *(f"- {sentence}" for sentence in report.assumptions))


@dataclass(frozen=True, kw_only=True)
class SimulationReport:
    """One simulation, run when it is first looked at.

    Args:
        requests: by arrival.
        service: of the decode servers.
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
        """The outcomes by deployment."""
        model, requests, limit = self.model, self.requests, self.max_tokens
        dep = simulate_dep(model, requests, max_tokens=limit, routing_skew=self.routing_skew)
        return {
            "DEP": dep,
            "DWDP": simulate_dwdp(model, requests, max_tokens=limit, pulls=self.pulls),
        }

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
        """The headings of the columns of `rows`."""
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
        """The figures of each deployment."""
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
        """The origin of all figures."""
        return self.model.efficiency.origin(assumed=True)

    @property
    def warnings(self) -> list[str]:
        """The sentences on what makes figures other than they seem."""
        longest = max(request.input_tokens for request in self.requests)
        found = [*lacking_memory(self.model), *kv_shortage(self.model, longest, 1)]
        said = coarsened(self.model, self.slice_mib, self.pulls)
        return [*found, said] if said else found

    @property
    def assumptions(self) -> list[str]:
        """The sentences on what figures rest on that was not measured."""
        return [
            *assumptions(self.model),
            f"The busiest expert-parallel rank has {self.routing_skew:g} times the mean load "
            f"(--routing-skew); decode servers have {DECODE_GPUS} GPUs.",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "origin": self.origin,
            "rows": self.rows,
            "warnings": self.warnings,
            "assumptions": self.assumptions,
        }
