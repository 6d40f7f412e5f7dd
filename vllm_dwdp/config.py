"""What the user may say: `additional_config["dwdp"]`, checked once in the front end.

Pure: imports neither vLLM nor torch. Every refusal names the setting, the value and the fix.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields

from vllm_dwdp.errors import DwdpConfigError

MODES = ("auto", "direct", "prefetch", "replica")
EXECUTORS = ("uni", "mp")


@dataclass(frozen=True, kw_only=True)
class DwdpConfig:
    """The options of one DWDP deployment; one that cannot be used is never made.

    Args:
        mode: how remote experts reach the kernel. `direct` maps the peers' memory, `prefetch`
            copies the next layer's experts into a slot, `auto` chooses per step, `replica` keeps
            every expert on every rank (independent ranks, no sharing).
        group_size: ranks that share one copy of the experts.
        experts_per_rank: resident experts of each rank; `None` stores every expert once.
        direct_max_tokens: `auto` reads in place up to this many scheduled tokens per step;
            `None` takes what the ranks of the group agree on at start, at most 512.
        slice_bytes: into slices of this many bytes copies are cut, so that they rotate over the peers;
            `None` takes the device's size, 0 cuts nothing.
        executor: `uni` runs the worker in the engine process, `mp` in a process of its own; `None`
            takes what the executor's name says, else `uni`.
        rendezvous: where ranks meet: `unix:///folder`, `tcp://host[,host...]:port`, or an
            `abstract:` name made by the launcher.
        rendezvous_secret_file: file whose content authenticates `tcp://` peers.
        join_timeout_s: how long a starting rank waits for its peers, seconds.

    Source: groups, redundancy and slices are those of arXiv 2604.01621, sections 3 and 4.3.1; the
    dictionary arrives in vLLM's `VllmConfig.additional_config`.

    Raises:
        DwdpConfigError: a value is of another type, out of range or contradicts another.
    """

    mode: str = "auto"
    group_size: int
    experts_per_rank: int | None = None
    direct_max_tokens: int | None = None
    slice_bytes: int | None = None
    executor: str | None = None
    rendezvous: str | None = None
    rendezvous_secret_file: str | None = None
    join_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DwdpConfigError(
                f"dwdp mode={self.mode!r} is unknown; choose one of {', '.join(MODES)}."
            )
        if self.executor not in (None, *EXECUTORS):
            raise DwdpConfigError(
                f"dwdp executor={self.executor!r} is unknown; choose one of {', '.join(EXECUTORS)}."
            )
        _check_integer("group_size", self.group_size, 1)
        if self.experts_per_rank is not None:
            _check_integer("experts_per_rank", self.experts_per_rank, 1)
        if self.direct_max_tokens is not None:
            _check_integer("direct_max_tokens", self.direct_max_tokens, 0)
        if self.slice_bytes is not None and (self.slice_bytes != 0 or self.slice_bytes is False):
            _check_integer("slice_bytes", self.slice_bytes, 4096, "or 0, which cuts nothing")
        if not _is_number(self.join_timeout_s) or self.join_timeout_s <= 0:
            raise DwdpConfigError(
                f"dwdp join_timeout_s={self.join_timeout_s!r} must be a positive number of seconds."
            )
        self._check_rendezvous()

    def _check_rendezvous(self) -> None:
        for name in ("rendezvous", "rendezvous_secret_file"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise DwdpConfigError(f"dwdp {name}={value!r} must be a string.")
        if self.rendezvous_secret_file and not (self.rendezvous or "").startswith("tcp://"):
            raise DwdpConfigError(
                f"dwdp rendezvous_secret_file={self.rendezvous_secret_file!r} is used by tcp:// "
                f"only, and rendezvous is {self.rendezvous!r}. Leave the secret out."
            )

    @classmethod
    def from_options(cls, options: object, data_parallel_size: int) -> "DwdpConfig":
        """Read `additional_config["dwdp"]` of a deployment of `data_parallel_size` ranks.

        Raises:
            DwdpConfigError: a key is unknown, or a value cannot be used, alone or at that size.
        """
        config = cls.parse(options, data_parallel_size)
        config.check_group_size(data_parallel_size)
        return config

    @classmethod
    def parse(cls, options: object, data_parallel_size: int) -> "DwdpConfig":
        """Read the options as `from_options` does, and leave `check_group_size` to the caller.

        Raises:
            DwdpConfigError: a key is unknown, or a value alone cannot be used.
        """
        if not isinstance(options, Mapping):
            raise DwdpConfigError(
                f"additional_config['dwdp'] is {options!r}; it must be a JSON object, "
                'e.g. \'{"dwdp": {"mode": "prefetch"}}\'.'
            )
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                raise DwdpConfigError(_unknown_key(str(key), known))
        return cls(**{"group_size": data_parallel_size, **options})

    def check_group_size(self, data_parallel_size: int, num_experts: int | None = None) -> None:
        """Check that groups divide the deployment and, if it is known, that each rank has an expert.

        Raises:
            DwdpConfigError: names the largest size that would do.
        """
        largest = num_experts if num_experts is not None and self.shares_experts else None
        if data_parallel_size % self.group_size:
            problem = f"does not divide --data-parallel-size {data_parallel_size}"
        elif largest is not None and self.group_size > largest:
            problem = f"is larger than the {_counted(largest)} of a layer"
        else:
            return
        fitting = [
            size
            for size in range(1, data_parallel_size + 1)
            if not data_parallel_size % size and (largest is None or size <= largest)
        ]
        bound = "" if largest is None else f" and is at most the {_counted(largest)} of a layer"
        others = f", or to one of {fitting}" if len(fitting) > 1 else ""
        raise DwdpConfigError(
            f"dwdp group_size={self.group_size} {problem}; set it to {fitting[-1]}, the largest that "
            f"divides --data-parallel-size {data_parallel_size}{bound}{others} "
            f"(1: every rank holds all experts itself).{self._without_experts_per_rank(num_experts)}"
        )

    def _without_experts_per_rank(self, num_experts: int | None) -> str:
        """Return advice on `experts_per_rank`, which was chosen for another group size."""
        if self.experts_per_rank is None or num_experts is None:
            return ""
        return f" Leave experts_per_rank={self.experts_per_rank} out, or choose it for that size."

    @property
    def shares_experts(self) -> bool:
        """Whether ranks hold experts for each other at all."""
        return self.mode != "replica" and self.group_size > 1


def _counted(num_experts: int) -> str:
    return "1 expert" if num_experts == 1 else f"{num_experts} experts"


def _check_integer(name: str, value: object, smallest: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        must = f"an integer of at least {smallest}" + (f", {otherwise}" if otherwise else "")
        raise DwdpConfigError(f"dwdp {name}={value!r} must be {must}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"dwdp option {key!r} is unknown.{hint} Known options: {', '.join(known)}."
