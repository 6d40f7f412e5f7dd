"""Every flag of vLLM that is refused is refused with its sentence; each is a row of docs/features.md."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.tables.said import Said
from vllm_dwdp.compat.frontend.refusals import REFUSED, refuse_unsupported
from vllm_dwdp.errors import DwdpUnsupportedError

NEUTRAL: dict[str, Any] = {
    "worker_cls": "auto",
    "load_format": "auto",
    "additional_config": {},
    "weight_transfer_config": None,
}
IPC_CACHE = (
    "--load-format ipc_cache cannot be used with --distributed-executor-backend dwdp: it maps every "
    "expert of the weight cache, past the reader that a rank limits to its own. Leave it out: a rank "
    "that comes back takes its experts from its peers."
)


def another(neutral: Any) -> Any:
    """Return a value of a flag that switches it on."""
    if isinstance(neutral, bool):
        return True
    return {0: 2, 1: 2, "mp": "ray", None: "on"}[neutral]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(
            field,
            another(neutral),
            id=field,
            marks=pytest.mark.feature(
                f"`{flag}`",
                refused=f"cannot be used with --distributed-executor-backend dwdp: {reason}",
            ),
        )
        for field, flag, neutral, reason in REFUSED
    ],
)
def test_a_flag_is_refused(field: str, value: Any, said: Said) -> None:
    with pytest.raises(DwdpUnsupportedError) as caught:
        refuse_unsupported(SimpleNamespace(**NEUTRAL | {field: value}))
    said(caught.value)


@pytest.mark.feature("`--load-format ipc_cache`", refused=IPC_CACHE)
def test_a_weight_cache_is_refused(said: Said) -> None:
    with pytest.raises(DwdpUnsupportedError) as caught:
        refuse_unsupported(SimpleNamespace(**NEUTRAL | {"load_format": "ipc_cache"}))
    said(caught.value)


def test_nothing_else_is_refused() -> None:
    refuse_unsupported(SimpleNamespace(**NEUTRAL))
    neutral = {field: value for field, _, value, _ in REFUSED}
    refuse_unsupported(SimpleNamespace(**NEUTRAL | neutral))
