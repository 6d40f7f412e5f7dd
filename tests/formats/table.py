"""The table of methods and kernels: where the law of sharing experts holds, and what is left out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.formats.law import BLACKWELL, HOPPER, Broken, Finding, processing, try_law
from tests.formats.methods import METHODS
from tests.formats.pairs import Pair, pairs_of

HOLDS = "holds"
REFUSED_HERE = "refused by DWDP"
REFUSED = "refused by vLLM"
LEFT_OUT = "left out"
BROKEN = "broken"
GPUS = {"Hopper": HOPPER, "Blackwell": BLACKWELL}

FACTOR = "the scales of an expert carry a factor that depends on all experts"
DEPENDENT = {
    ("modelopt_nvfp4", "MARLIN"): FACTOR,
    ("ct_nvfp4", "MARLIN"): FACTOR,
    ("ct_nvfp4_a16", "MARLIN"): FACTOR,
    ("quark_nvfp4", "MARLIN"): FACTOR,
}
"""Pairs whose rows depend on experts of other ranks."""
NO_CACHE = "vLLM's conversion asserts an argument that this method does not give"
UNTRIED = {
    ("quark_gpt_oss_mxfp4", "FLASHINFER_TRTLLM_MXFP4_MXFP8"): NO_CACHE,
    ("quark_gpt_oss_mxfp4", "FLASHINFER_TRTLLM_MXFP4_BF16"): NO_CACHE,
}
"""Pairs that vLLM itself cannot process, though it does not say so."""
REFUSALS = {
    ("ct_mxfp4_fp8", "TRITON"),
    ("ct_mxfp4_fp8", "EMULATION"),
    ("moe_wna16", "MARLIN"),
    ("moe_wna16", "CPU"),
    ("gpt_oss_mxfp4", "DEEPGEMM_MXFP4"),
    ("gpt_oss_mxfp4", "CUTLASS_MXFP4_MXFP4"),
    ("gpt_oss_mxfp4", "EMULATION"),
    ("mxfp4", "TRITON"),
    ("mxfp4", "EMULATION"),
    ("quark_int4", "MARLIN"),
    ("quark_int4", "CPU"),
    ("quark_gpt_oss_mxfp4", "DEEPGEMM_MXFP4"),
    ("quark_gpt_oss_mxfp4", "CUTLASS_MXFP4_MXFP4"),
    ("quark_gpt_oss_mxfp4", "EMULATION"),
}
"""Pairs that vLLM refuses by an error of its own, and no other."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of a method with a kernel."""

    method: str
    backend: str
    kernel: str
    verdict: str
    says: str

    def __str__(self) -> str:
        return f"{self.method:22} {self.backend:30} {self.kernel:42} {self.verdict:16} {self.says}"


def rows_of(method: str) -> Iterator[Row]:
    """Try every kernel that vLLM has for a key of `METHODS`."""
    with processing(None, BLACKWELL):
        pairs = list(pairs_of(method))
    for pair in pairs:
        verdict, says = _verdict(pair)
        yield Row(
            method=method, backend=pair.backend, kernel=pair.kernel, verdict=verdict, says=says
        )


def all_rows() -> list[Row]:
    return [row for method in METHODS for row in rows_of(method)]


def _verdict(pair: Pair) -> tuple[str, str]:
    if pair.choice is None:
        return LEFT_OUT, str(pair.why_not)
    place = pair.method, pair.backend
    findings: dict[str, Finding] = {}
    refusals: dict[str, str] = {}
    for gpu, capability in GPUS.items():
        try:
            findings[gpu] = try_law(pair.method, pair.choice, capability)
        except Broken as error:
            return (REFUSED_HERE, DEPENDENT[place]) if place in DEPENDENT else (BROKEN, str(error))
        except (ValueError, TypeError, NotImplementedError) as error:
            refusals[gpu] = " ".join(str(error).split())
        except (AssertionError, RuntimeError):
            if place not in UNTRIED:
                raise
            return LEFT_OUT, UNTRIED[place]
    if not findings:
        return REFUSED, next(iter(refusals.values()))
    (finding, *_) = findings.values()
    only = "" if not refusals else f", on {', '.join(findings)} only"
    return HOLDS, f"{len(finding.shared)} by expert, {len(finding.replicated)} the same{only}"


# --- the documentation ----------------------------------------------------------------------------

HEADINGS = {
    HOLDS: "Proved by assembly: every tensor is its owners' rows, or the same on every rank",
    REFUSED_HERE: "Refused by DWDP before anything is loaded",
    REFUSED: "Pairs that vLLM itself refuses",
    LEFT_OUT: "Left out",
}


INTRODUCTION = """# Formats of experts

DWDP has no list of formats: a layer is loaded and processed by vLLM as ever, and what it then holds is
sorted by its layout in memory and shared ([design.md](design.md), "Any format"). These tables say how
that was shown, for vLLM 0.32. The tests write them:
`DWDP_WRITE_FORMATS=1 .venv/bin/python -m pytest tests/formats/test_law.py`.

**Run end to end**: real checkpoints on disk, vLLM's own CPU kernels (on processors with AVX512-BF16),
the tokens and the weights of stock vLLM. **Proved by assembly**: vLLM's own loading and processing of a
small layer on CPU tensors, with operations that need a GPU replaced by ones of the same effect for each
expert; what each of three uneven ranks provides is bit for bit the whole layer's, its twin finds the
same, and no memory is kept. That is no evidence about a GPU's kernels: none has run
([gpu.md](gpu.md))."""


def as_markdown(rows: list[Row], runs_here: Mapping[str, str]) -> str:
    """Write the table of formats for the documentation.

    Args:
        runs_here: of formats that run end to end in the tests, what is tested of them.
    """
    lines = [INTRODUCTION, "", "## Run end to end on a CPU", ""]
    lines += _as_table(("format", "shown"), runs_here.items())
    for verdict, heading in HEADINGS.items():
        chosen = [row for row in rows if row.verdict == verdict]
        lines += ["", f"## {heading}", ""]
        if verdict in (REFUSED, LEFT_OUT):
            lines += _by_reason(chosen)
        else:
            cells = ((row.method, row.backend, row.kernel, row.says) for row in chosen)
            lines += _as_table(("method", "backend", "kernel", "tensors"), cells)
    return "\n".join(lines) + "\n"


def _by_reason(rows: list[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        pairs = reasons.setdefault(_first_sentence(row.says), [])
        if (pair := f"{row.method} on {row.backend}") not in pairs:
            pairs.append(pair)
    return _as_table(("reason", "pairs"), ((why, ", ".join(each)) for why, each in reasons.items()))


def _first_sentence(text: str) -> str:
    return text.split(": should be one of", maxsplit=1)[0].split(". ", maxsplit=1)[0]


def _as_table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    body = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *body]
