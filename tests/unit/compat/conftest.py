"""What touches vLLM is tested with every version of it."""

from pathlib import Path

import pytest

from gpu_checks.checkpoints import make_checkpoint

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; all of a session are handed to this."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.every_version)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3_moe", 8))


@pytest.fixture
def nothing_stays_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.cli import serve
    from vllm.v1.engine import async_llm, core_client, utils

    for module in (serve, core_client):
        monkeypatch.setattr(module, "launch_core_engines", module.launch_core_engines)
    client = core_client.EngineCoreClient
    monkeypatch.setattr(client, "make_async_mp_client", client.make_async_mp_client)
    monkeypatch.setattr(utils, "wait_for_engine_startup", utils.wait_for_engine_startup)
    name = "load_stat_logger_plugin_factories"
    monkeypatch.setattr(async_llm, name, getattr(async_llm, name))
    monkeypatch.setattr("atexit.register", lambda *args: None)
