"""What the tests of `doctor` make and read."""

from typing import Any

from vllm_dwdp.entrypoints.doctor.finding import Finding
from vllm_dwdp.entrypoints.doctor.gpus import Gpu, Topology


def topology(**changes: Any) -> Topology:
    """Four GPUs of an NVLink domain, as it should be."""
    pairs = frozenset((a, b) for a in range(4) for b in range(a + 1, 4))
    facts: dict[str, Any] = {
        "cuda_version": 12080,
        "gpus": (Gpu(name="GB200", fabric="completed", clique="c/1"),) * 4,
        "readable": pairs,
        "linked": pairs,
        "imex_channels": ("channel0",),
    }
    return Topology(**(facts | changes))


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings if finding.verdict != "ok"}
