"""Published figures of DWDP beside the model's own.

Sources: arXiv 2604.01621 (DWDP, NVIDIA, April 2026) [P], TensorRT-LLM's tech blog 19 [B], SGLang pull
request 29778 [S]. Every row is marked:

- `predicted`: data-sheet peaks, exact formulas and published inputs only;
- `default`: also uses factors that were fitted on other rows (`factors.FITTED` names them and the rows);
- `fitted`: one of the rows that a factor was fitted on;
- `derived`: follows from other published figures, or repeats a fitted row (`factors.DERIVED`).

Beside them stands the chunk curve of another vendor's machine (`chunks`), which counts in nothing.
What the model misses and what it does not speak to is listed with the reason (`rows.why_missed`,
`rows.NOT_MODELLED`).
"""

from vllm_dwdp.paper.chunks import DIFFERENCES, chunk_curve, chunk_rows
from vllm_dwdp.paper.factors import (
    DEEPSEEK_R1,
    DERIVED,
    FITTED,
    GPT_OSS_120B,
    TOLERANCE,
    Factor,
    Row,
)
from vllm_dwdp.paper.rows import NOT_MODELLED, NUM_PUBLISHED, paper_rows, why_missed

__all__ = [
    "DEEPSEEK_R1",
    "DERIVED",
    "DIFFERENCES",
    "FITTED",
    "GPT_OSS_120B",
    "NOT_MODELLED",
    "NUM_PUBLISHED",
    "TOLERANCE",
    "Factor",
    "Row",
    "chunk_curve",
    "chunk_rows",
    "paper_rows",
    "why_missed",
]
