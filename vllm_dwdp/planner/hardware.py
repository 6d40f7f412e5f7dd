"""Accelerators: what the data sheet promises, and how much of it is reached."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError

BUILT_IN = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator, at its dense peaks.

    Args:
        name: as in the table.
        bf16_tflops, fp8_tflops, fp4_tflops: 1e12 operations per second; 0 if it has no such unit.
        memory_gb: 1e9 bytes.
        memory_gbps: 1e9 bytes per second.
        link_gbps: to peers, one direction, 1e9 bytes per second.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float
    fp4_tflops: float
    memory_gb: float
    memory_gbps: float
    link_gbps: float

    def flops(self, bits: float) -> float:
        """Peak operations per second for weights of `bits`, on the fastest unit that takes them."""
        if bits <= 5 and self.fp4_tflops:
            return self.fp4_tflops * 1e12
        if bits <= 9:
            return self.fp8_tflops * 1e12
        return self.bf16_tflops * 1e12


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The reached part of each peak.

    Args:
        attention, grouped_gemm, dense_gemm: of the peak operations.
        memory: of the memory's speed.
        link: of the link's speed, by copy engines.
        direct: of the link's speed, by kernels that read peers in place.
        beside_copies: speed of compute while copies run beside it.
        origin: `peak`, `default` or `calibrated`.
    """

    attention: float = 1.0
    grouped_gemm: float = 1.0
    dense_gemm: float = 1.0
    memory: float = 1.0
    link: float = 1.0
    direct: float = 1.0
    beside_copies: float = 1.0
    origin: str = "peak"


PEAK = Efficiency()
"""The plain roofline."""

DEFAULT = Efficiency(
    attention=0.6,
    grouped_gemm=0.35,
    dense_gemm=0.6,
    memory=0.8,
    link=0.71,
    direct=0.70,
    beside_copies=0.9,
    origin="default",
)
"""Guesses in the range of published breakdowns (GB200); nothing here was measured by us."""


def load_hardware(extra: Path | None = None) -> dict[str, Hardware]:
    """The built-in table and the user's, by lower-case name.

    Raises:
        DwdpConfigError: the file cannot be read or an entry is wrong.
    """
    table = _read(BUILT_IN)
    return table | _read(extra) if extra is not None else table


def find_hardware(name: str, extra: Path | None = None) -> Hardware:
    """One entry of the table.

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
        content = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DwdpConfigError(f"--hardware {path}: {error}.") from error
    wanted = {field.name for field in fields(Hardware)} - {"name"}
    table = {}
    for name, entry in content.items():
        if not isinstance(entry, dict) or set(entry) != wanted:
            raise DwdpConfigError(
                f"--hardware {path}: entry {name!r} must have exactly {', '.join(sorted(wanted))}."
            )
        numbers = {key: _positive(path, name, key, value) for key, value in entry.items()}
        table[name.lower()] = Hardware(name=name.lower(), **numbers)
    return table


def _positive(path: Path, name: str, key: str, value: object) -> float:
    lowest_allowed = key == "fp4_tflops"
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if number < 0 or (number == 0 and not lowest_allowed):
        raise DwdpConfigError(
            f"--hardware {path}: {name}.{key} is {value!r}; it must be a positive number."
        )
    return float(number)
