"""Everything that a launch keeps running, by role: what `status` shows of it, and which servers fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from vllm_dwdp.entrypoints.launch.admission import UNNAMED, Admission, Candidate
from vllm_dwdp.entrypoints.launch.child import Child
from vllm_dwdp.entrypoints.launch.fronts import admission_file, answers
from vllm_dwdp.entrypoints.launch.pairing import Server, check_pairs
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.roster import Entry
from vllm_dwdp.entrypoints.launch.server import READY_PATH


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is kept running, by role."""

    plan: LaunchPlan
    ranks: list[Child]
    decodes: list[Child]
    fronts: list[Child]
    logs: Path

    @cached_property
    def admission(self) -> Admission:
        """Which decode servers get requests."""
        return Admission(
            [self._candidate(index, url) for index, url in enumerate(self.plan.decode_urls)],
            admission_file(self.logs),
        )

    def _candidate(self, index: int, url: str) -> Candidate:
        """One of ours is known by its process, one elsewhere is any that answers."""
        ours = self.decodes[index] if index < len(self.decodes) else None
        return Candidate(
            name=f"decode {index}",
            place=self.plan.door(index),
            identity=partial(_process_of, ours) if ours else partial(_who_answers, url),
            compare=lambda: self._comparison(index),
        )

    def _comparison(self, index: int) -> Callable[[], None] | None:
        """Return what compares a decode server with every rank that serves now; None if none does."""
        ranks = [rank for rank, child in enumerate(self.ranks) if child.state == "serving"]
        return partial(self._compare, index, ranks) if ranks else None

    def _compare(self, index: int, ranks: Sequence[int]) -> None:
        plan = self.plan
        decode = Server(f"decode {index}", plan.decode_urls[index])
        ours = [Server(f"rank {rank}", plan.rank_url(rank)) for rank in ranks]
        check_pairs(ours, decode, (plan.model, *plan.arguments))

    @property
    def servers(self) -> list[Child]:
        """Those that must serve before clients are let in."""
        return [*self.ranks, *self.decodes]

    def roster(self) -> list[Entry]:
        """All of it, for `status`; empty where all that is there meets anyway."""
        plan = self.plan
        if plan.disaggregation is None:
            return []
        prefill = [_entry("prefill", *each) for each in enumerate(self.ranks)]
        decode = [_entry("decode", *each) for each in enumerate(self.decodes)]
        ours = zip([*prefill, *decode], [*plan.rank_urls, *plan.decode_urls], strict=False)
        elsewhere = [
            Entry(role="decode", index=index, url=url, pid=None, state=f"elsewhere, {each.state}")
            for index, (url, each) in enumerate(
                zip(plan.decode_urls, self.admission.candidates, strict=True)
            )
            if index >= len(decode)
        ]
        return [entry(url) for entry, url in ours] + elsewhere

    def check_pairs(self) -> None:
        """Refuse decode servers that cannot use what the ranks compute.

        Raises:
            DwdpConfigError: one cannot, with the field that differs.
        """
        for index in range(len(self.plan.decode_urls)):
            self._compare(index, range(self.plan.num_ranks))
        self.admission.admit_all()


def _process_of(child: Child) -> str:
    return str(child.process.pid) if child.process and child.state == "serving" else ""


def _who_answers(url: str) -> str:
    return UNNAMED if answers(url + READY_PATH) else ""


def _entry(role: str, index: int, child: Child) -> Callable[[str], Entry]:
    pid = None if child.process is None else child.process.pid
    return lambda url: Entry(role=role, index=index, url=url, pid=pid, state=child.state)
