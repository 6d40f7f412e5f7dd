"""What `vllm serve` is given where the user leaves it open; its command is replaced."""

import argparse
import os
from typing import Any

import pytest
from vllm.entrypoints.cli import serve

from vllm_dwdp.compat.frontend import serve_defaults
from vllm_dwdp.distributed.launch import SHARED_CORES_ENV


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Return the arguments that vLLM's own command was run with."""
    found: list[argparse.Namespace] = []
    monkeypatch.setattr(serve.ServeSubcommand, "cmd", staticmethod(found.append))
    monkeypatch.setenv(SHARED_CORES_ENV, "")
    monkeypatch.delenv(SHARED_CORES_ENV)
    for _ in range(2):  # once is enough
        serve_defaults.install()
    return found


def arguments(**given: Any) -> argparse.Namespace:
    facts = {
        "distributed_executor_backend": "dwdp",
        "api_server_count": None,
        "headless": False,
        "data_parallel_size": 4,
        "data_parallel_multi_port_external_lb": False,
    }
    return argparse.Namespace(**facts | given)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 1),
        ({"api_server_count": 3}, 3),
        ({"headless": True}, None),  # vLLM refuses a number there
        ({"distributed_executor_backend": "mp"}, None),
        ({"distributed_executor_backend": None}, None),
    ],
)
def test_one_api_server_unless_the_user_says_otherwise(
    ran: list[argparse.Namespace], given: dict[str, Any], count: int | None
) -> None:
    serve.ServeSubcommand.cmd(arguments(**given))
    assert [args.api_server_count for args in ran] == [count]
    assert SHARED_CORES_ENV not in os.environ


def test_on_a_gpu_vllm_chooses(
    ran: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_defaults, "_computes_on_cores", lambda: False)
    serve.ServeSubcommand.cmd(arguments())
    assert ran[0].api_server_count is None


def test_servers_that_vllm_starts_for_each_rank_divide_the_cores(
    ran: list[argparse.Namespace],
) -> None:
    serve.ServeSubcommand.cmd(arguments(data_parallel_multi_port_external_lb=True))
    assert os.environ[SHARED_CORES_ENV] == "1"
    assert ran[0].api_server_count is None


def test_a_process_without_the_command_line_does_not_import_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_defaults, "SERVE_MODULE", "vllm.entrypoints.cli.nothing")
    serve_defaults.install()
