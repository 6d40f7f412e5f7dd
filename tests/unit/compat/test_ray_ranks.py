"""Ranks that Ray starts: what is refused, and what vLLM's own start of them finds."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.compat.frontend import own_engines, ray_ranks
from vllm_dwdp.compat.frontend.backend import offline_data_parallel
from vllm_dwdp.compat.worker import independent
from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError

RAY = SimpleNamespace(data_parallel_backend="ray")
PROCESSES = SimpleNamespace(data_parallel_backend="mp")

pytestmark = pytest.mark.feature("Ray data-parallel back end")


def test_a_start_by_ray_without_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ray_ranks.check_ray(PROCESSES)
    with pytest.raises(DwdpConfigError, match=r"needs Ray.*`pip install ray` \(the extra `ray`\)"):
        ray_ranks.check_ray(RAY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    ray_ranks.check_ray(RAY)


def test_an_offline_llm_starts_its_ranks_itself() -> None:
    with offline_data_parallel(2):
        ray_ranks.check_ray(PROCESSES)
        with pytest.raises(
            DwdpUnsupportedError, match=r"backend ray is for vllm serve.*Leave it out"
        ):
            ray_ranks.check_ray(RAY)


@pytest.mark.parametrize(("backend", "found"), [("ray", "CPU"), ("mp", "")])
def test_vllm_starts_them_and_finds_a_resource_for_a_worker_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, backend: str, found: str
) -> None:
    """Its CPU build has none of its own; the GPU's is left as it is."""
    from vllm.platforms import current_platform

    seen: list[str] = []

    @contextmanager
    def stock(vllm_config: Any) -> Iterator[str]:
        seen.append(current_platform.ray_device_key)
        yield "engines"

    monkeypatch.setattr(independent, "is_planted", lambda config: True)
    parallel = SimpleNamespace(
        data_parallel_backend=backend,
        data_parallel_size=2,
        data_parallel_size_local=1,
        local_engines_only=False,
    )
    config = SimpleNamespace(parallel_config=parallel)
    with own_engines._launching(stock)(config) as engines:
        assert engines == "engines"
    assert seen == [found] and current_platform.ray_device_key == ""


def test_ray_reserves_the_gpus_of_ranks_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "ray_device_key", "GPU")

    @contextmanager
    def stock() -> Iterator[str]:
        yield current_platform.ray_device_key

    with ray_ranks.launching(stock)() as found:
        assert found == "GPU"
