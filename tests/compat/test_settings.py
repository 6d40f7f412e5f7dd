"""What a configuration of vLLM is, and where it says that ranks wait for each other."""

import dataclasses
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compat.versions import vllm_minor
from vllm_dwdp.entrypoints.doctor.software import TESTED_VLLM

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[2]


def test_vllm_is_in_the_tested_range() -> None:
    first, end = TESTED_VLLM
    assert first <= vllm_minor() < end


def test_the_range_of_the_requirements_is_the_one_of_doctor() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "vllm>={}.{},<{}.{}".format(*TESTED_VLLM[0], *TESTED_VLLM[1]) in extras["cuda"]


def test_engine_args_has_every_field_that_is_refused_with_the_neutral_value_as_default() -> None:
    from vllm import EngineArgs

    from vllm_dwdp.compat.frontend.engine_fields import SINCE
    from vllm_dwdp.compat.frontend.refusals import REFUSED

    defaults = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    later = {name for name, first in SINCE.items() if vllm_minor() < first}
    for field, flag, neutral, _ in REFUSED:
        if field in later:
            continue
        assert field in defaults, f"{flag} has gone"
        default = defaults[field]
        if default is not dataclasses.MISSING:
            assert default in (neutral, None), f"{flag} is {default!r} when it is not given"


def test_every_field_of_engine_args_is_in_one_class() -> None:
    """A new flag of vLLM must be looked at; one that has gone must be forgotten."""
    from vllm import EngineArgs

    from vllm_dwdp.compat.frontend.engine_fields import FIELDS, SINCE

    assert list(FIELDS) == ["supported", "refused", "irrelevant", "untested"]
    classified = Counter(name for names in FIELDS.values() for name in names)
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert not fields - set(classified), "in no class of compat/frontend/engine_fields.py"
    expected = {name for name in classified if vllm_minor() >= SINCE.get(name, (0, 0))}
    assert not expected - fields, "no longer fields of EngineArgs"
    assert not fields & (set(classified) - expected), "older than `SINCE` says"
    assert not [name for name, count in classified.items() if count > 1], "in two classes"


def test_engine_args_tells_spawned_api_servers_apart() -> None:
    from vllm import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {"_api_process_count", "_api_process_rank", "worker_cls"} <= fields


@pytest.mark.parametrize("is_moe", [False, True])
def test_independence_is_keyed_on_is_moe(is_moe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own process function makes one kind of engine or the other, and uncouples the rank."""
    from vllm.config import ModelConfig
    from vllm.v1.engine import core

    assert isinstance(inspect.getattr_static(ModelConfig, "is_moe"), property)
    run_engine_core = core.EngineCoreProc.run_engine_core
    done: list[str] = []

    class Made(Exception):
        pass

    def engine(kind: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> None:
            done.append(kind)
            raise Made

        return make

    for name in ("set_process_title", "decorate_logs", "maybe_init_worker_tracer"):
        monkeypatch.setattr(core, name, lambda *args: None)
    monkeypatch.setattr(core, "maybe_register_config_serialize_by_value", lambda: None)
    handlers = SimpleNamespace(SIGTERM=15, SIGINT=2, SIG_DFL=0, signal=lambda *args: None)
    monkeypatch.setattr(core, "signal", handlers)
    monkeypatch.setattr(core, "DPEngineCoreProc", engine("lockstep"))
    monkeypatch.setattr(core, "EngineCoreProc", engine("independent"))
    parallel_config = SimpleNamespace(
        data_parallel_size=2,
        numa_bind=False,
        reconfigure_for_independent_dp_rank=lambda: done.append("uncoupled"),
    )
    vllm_config = SimpleNamespace(
        parallel_config=parallel_config,
        model_config=SimpleNamespace(is_moe=is_moe),
        kv_transfer_config=None,
    )
    with pytest.raises(Made):
        run_engine_core(vllm_config=vllm_config, dp_rank=1, local_dp_rank=1)
    assert done == (["lockstep"] if is_moe else ["uncoupled", "independent"])


@pytest.mark.parametrize(("total", "own_front_end"), [(1, False), (2, True), (2, False)])
def test_a_front_end_and_its_engines_agree_where_processed_images_are_kept(
    total: int, own_front_end: bool
) -> None:
    """`match_front_end_cache`; without it an engine waits for shared memory that nobody has made."""
    from vllm.multimodal.cache import factories

    from vllm_dwdp.compat.worker import independent
    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan

    def cache_type(data_parallel_size: int) -> Any:
        parallel_config.data_parallel_size = data_parallel_size
        return factories._get_cache_type(vllm_config)

    multimodal = SimpleNamespace(mm_processor_cache_gb=4, mm_processor_cache_type="shm")
    model_config = SimpleNamespace(
        supports_multimodal_inputs=True,
        multimodal_config=multimodal,
        get_multimodal_config=lambda: multimodal,
    )
    parallel_config = SimpleNamespace(
        _api_process_count=1, data_parallel_external_lb=own_front_end, data_parallel_index=0
    )
    vllm_config: Any = SimpleNamespace(model_config=model_config, parallel_config=parallel_config)
    launch = DwdpLaunch(
        config=DwdpConfig(group_size=2),
        ranks=RankSpan(first=0, count=1 if own_front_end else total, total=total),
        endpoint=None,  # type: ignore[arg-type]
    )
    model_config.dwdp_launch = launch
    of_the_front_end = cache_type(total)
    assert of_the_front_end == ("processor_only" if total == 2 and not own_front_end else "shm")
    assert cache_type(1) == "shm", "an independent engine knows of one rank"
    independent.match_front_end_cache(vllm_config)
    keeps_there = of_the_front_end == "shm"
    assert cache_type(1) == ("shm" if keeps_there else None)


def test_the_independent_config_pickles_by_reference() -> None:
    import pickletools

    from vllm_dwdp.compat.worker.independent import IndependentModelConfig

    strings = [
        argument
        for _, argument, _ in pickletools.genops(__import__("pickle").dumps(IndependentModelConfig))
        if isinstance(argument, str)
    ]
    assert strings == ["vllm_dwdp.compat.worker.independent", "IndependentModelConfig"]


def test_what_vllm_adds_to_the_environment_of_engines_is_known_beforehand() -> None:
    """Of what is read while loading; otherwise no engine could be forked, and none would be."""
    script = (
        "import importlib, json, os; from vllm_dwdp.compat.frontend import loading; "
        "expected = loading.expected(os.environ); "
        "[importlib.import_module(name) for name in loading.MODULES]; "
        "loaded = os.environ | expected; importlib.import_module('vllm.config').VllmConfig(); "
        "print(json.dumps(loading.read_differently(loaded, os.environ)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == []
