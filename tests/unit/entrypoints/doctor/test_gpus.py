"""How many GPUs launch may hand out."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.entrypoints.doctor import gpus
from vllm_dwdp.errors import DwdpConfigError


class NVMLError(Exception):
    """As in pynvml."""


def nvml(**changes: Any) -> Any:
    """Three GPUs; a stand-in for pynvml, since no driver is here."""
    calls: list[str] = []
    facts = {
        "NVMLError": NVMLError,
        "calls": calls,
        "nvmlInit": lambda: calls.append("init"),
        "nvmlShutdown": lambda: calls.append("shutdown"),
        "nvmlDeviceGetCount": lambda: 3,
    }
    return SimpleNamespace(**(facts | changes))


def fails() -> None:
    raise NVMLError("Driver Not Loaded")


@pytest.fixture(autouse=True)
def has_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "has_driver", lambda: True)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert gpus.count_gpus() == 3
    assert fake.calls == ["init", "shutdown"]


@pytest.mark.parametrize(
    ("call", "calls"), [("nvmlInit", []), ("nvmlDeviceGetCount", ["init", "shutdown"])]
)
def test_a_driver_without_a_device_is_no_gpu(
    call: str,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = nvml(**{call: fails})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert gpus.count_gpus() == 0
    assert "no rank a GPU: the NVIDIA driver does not answer (Driver Not Loaded)" in caplog.text
    assert fake.calls == calls


def test_a_driver_that_nobody_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DwdpConfigError, match="pip install nvidia-ml-py"):
        gpus.count_gpus()
