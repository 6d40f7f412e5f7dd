"""Accelerators: what the data sheet promises, and how much of it is reached."""

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import real
from vllm_dwdp.planner.quantisation import Format

BUILT_IN = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator, or several as one, at its dense peaks.

    Args:
        name: as in the table.
        bf16_tflops, fp8_tflops, fp4_tflops: 1e12 operations per second; 0 if it has no such unit.
        memory_gb: 1e9 bytes.
        memory_gbps: 1e9 bytes per second.
        link_gbps: to peers, one direction, 1e9 bytes per second.
        source: `data sheet`, or how these peaks were measured.
        measured: names and values of `Efficiency` that were measured too.
        num_gpus: accelerators that are counted as one.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float
    fp4_tflops: float
    memory_gb: float
    memory_gbps: float
    link_gbps: float
    source: str = "data sheet"
    measured: tuple[tuple[str, float], ...] = ()
    num_gpus: int = 1

    def times(self, count: int) -> "Hardware":
        """Count several accelerators as one: the GPUs of a rank, which divide all that it does."""
        if count == 1:
            return self
        peaks = {name: count * getattr(self, name) for name in _PEAKS}
        return replace(self, name=f"{count} x {self.name}", num_gpus=count, **peaks)

    @property
    def efficiency(self) -> "Efficiency":
        """The measured efficiencies, and the defaults for the rest."""
        values: dict[str, Any] = dict(self.measured)
        return replace(DEFAULT, **values, calibrated=frozenset(values))

    def product_bits(self, form: Format) -> int:
        """Return the bits that their products run in; 16 where the kernel dequantises the weights."""
        if form.activation_bits == 4 and self.fp4_tflops:
            return 4
        return 8 if form.activation_bits == 8 else 16

    def flops(self, product_bits: int) -> float:
        """Return the peak operations per second of products in so many bits."""
        if product_bits == 4:
            return self.fp4_tflops * 1e12
        return (self.fp8_tflops if product_bits == 8 else self.bf16_tflops) * 1e12


_PEAKS = (
    *("bf16_tflops", "fp8_tflops", "fp4_tflops"),
    *("memory_gb", "memory_gbps", "link_gbps"),
)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The reached part of each peak.

    Args:
        attention, grouped_gemm, dense_gemm: of the peak operations, or of the memory's speed where
            an operator is bound by it (a kernel that reaches a third of one seldom reaches more of
            the other; `memory` is the bound for both).
        memory: of the memory's speed.
        other_passes: norms, rotary embedding, routing, quantisation and permutation of a layer, as
            passes over `[num_tokens, hidden_size]` in 16 bits at the memory's peak speed.
        link: of the link's speed, by copy engines.
        direct: of the link's speed, by kernels that read peers in place.
        beside_copies: speed of compute while copies flow beside it.
        calibrated: names of the fields above that were measured on the user's machine.
        is_peak: these are no efficiencies but the plain roofline.
    """

    attention: float = 1.0
    grouped_gemm: float = 1.0
    dense_gemm: float = 1.0
    memory: float = 1.0
    other_passes: float = 0.0
    link: float = 1.0
    direct: float = 1.0
    beside_copies: float = 1.0
    calibrated: frozenset[str] = frozenset()
    is_peak: bool = False

    def origin(self, *names: str, assumed: bool = False) -> str:
        """Name what a figure rests on that uses these fields (all, if none is named).

        Args:
            assumed: it also rests on a constant that was not measured, so it is never calibrated.
        """
        used = set(names or MEASURABLE)
        if self.is_peak:
            return "peak"
        if used <= self.calibrated:
            return "part default" if assumed else "calibrated"
        return "part default" if used & self.calibrated else "default"


MEASURABLE = tuple(
    field.name for field in fields(Efficiency) if field.name not in ("calibrated", "is_peak")
)
PEAK = Efficiency(is_peak=True)
"""The plain roofline."""

DEFAULT = Efficiency(
    attention=0.81,
    grouped_gemm=0.352,
    dense_gemm=0.504,
    memory=0.8,
    other_passes=75.0,
    link=0.714,
    direct=0.70,
    beside_copies=0.766,
)
"""Fitted to one published breakdown (DeepSeek-R1 on GB200; `vllm_dwdp.paper` says on which rows), except
`memory` and `direct`, which are guesses. Nothing here was measured by us."""


def load_hardware(extra: Path | None = None) -> dict[str, Hardware]:
    """Read the built-in table and the user's, by lower-case name.

    Raises:
        DwdpConfigError: the file cannot be read or an entry is wrong.
    """
    table = _read(BUILT_IN)
    return table | _read(extra) if extra is not None else table


def find_hardware(name: str, extra: Path | None = None) -> Hardware:
    """Find one entry of the table.

    Raises:
        DwdpConfigError: there is none of that name.
    """
    table = load_hardware(extra)
    if name.lower() not in table:
        raise DwdpConfigError(
            f"--gpu {name!r} is unknown; known are {', '.join(sorted(table))}. Describe yours in a "
            "TOML file like vllm_dwdp/planner/hardware.toml and give it with --hardware."
        )
    return table[name.lower()]


def _read(path: Path) -> dict[str, Hardware]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DwdpConfigError(f"--hardware {path}: {error}.") from error
    table: dict[str, Hardware] = {}
    for name, entry in content.items():
        if name.lower() in table:
            raise DwdpConfigError(
                f"--hardware {path}: {name!r} is there twice; names differ by more than their case."
            )
        table[name.lower()] = _entry(path, name, entry)
    return table


def _entry(path: Path, name: str, entry: Any) -> Hardware:
    optional = {"source", "efficiency"}
    wanted = set(_PEAKS)
    if not isinstance(entry, dict) or set(entry) - optional != wanted:
        raise DwdpConfigError(
            f"--hardware {path}: entry {name!r} must have exactly {', '.join(sorted(wanted))}, and may "
            "have source and a table efficiency."
        )
    reached = entry.get("efficiency", {})
    if not isinstance(reached, dict) or set(reached) - set(MEASURABLE):
        raise DwdpConfigError(
            f"--hardware {path}: {name}.efficiency may have {', '.join(MEASURABLE)} and nothing else."
        )
    where = f"--hardware {path}: {name}"
    peaks: dict[str, Any] = {
        key: _peak(f"{where}.{key}", key, entry[key]) for key in sorted(wanted)
    }
    return Hardware(
        name=name.lower(),
        source=str(entry.get("source", "data sheet")),
        measured=tuple(
            (key, _reached(f"{where}.efficiency.{key}", key, value))
            for key, value in reached.items()
        ),
        **peaks,
    )


def _peak(what: str, key: str, value: object) -> float:
    return real(what, value, above=key != "fp4_tflops")


_MAY_EXCEED_ONE = ("other_passes", "direct")
"""A count, and reads in place, which may be faster than copies that take a core."""
_MAY_BE_ZERO = ("other_passes", "beside_copies")


def _reached(what: str, key: str, value: object) -> float:
    most = math.inf if key in _MAY_EXCEED_ONE else 1.0
    return real(what, value, 0, most, above=key not in _MAY_BE_ZERO)
