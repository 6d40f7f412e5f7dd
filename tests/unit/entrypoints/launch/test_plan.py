"""The commands of a launch, and the arguments that are not for its ranks."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.entrypoints.launch.fakes import plan
from vllm_dwdp.entrypoints.launch.plan import split_arguments
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [([], 1), (["-tp", "2"], 2), (["--tensor_parallel_size=4", "--seed", "3"], 4)],
)
def test_how_many_workers_a_rank_has(arguments: list[str], size: int) -> None:
    assert plan(arguments=tuple(arguments)).tensor_parallel_size == size


def test_a_rank_knows_where_all_are_and_the_routers_requests(tmp_path: Path) -> None:
    made = plan(arguments=("--middleware", "a.B"))
    command = made.rank_command(1)
    given = [word for option, word in pairwise(command) if "middle" in option]
    assert given == ["a.B", "vllm_dwdp.entrypoints.launch.routed.Routed"], "the last is asked first"
    assert made.rank_environment == {
        "DWDP_RANK_URLS": "http://127.0.0.1:8001 http://127.0.0.1:8002",
        "DWDP_CONTROL_URL": "",
    }
    assert made.router_command()[-2:] == [
        "http://127.0.0.1:8001/routed",
        "http://127.0.0.1:8002/routed",
    ]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
        ("gpu-7", "http://gpu-7:8000"),
    ],
)
def test_the_router_is_probed_where_it_listens(host: str, url: str) -> None:
    assert plan(host=host).url == url


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--data-parallel-size", "use --ranks"),
        ("--data_parallel_size=4", "use --ranks"),
        ("--data-par", "use --ranks"),
        ("-dp", "use --ranks"),
        ("-dp=2", "use --ranks"),
        ("-dpr", "use --ranks"),
        ("--distributed_executor_backend=ray", "always dwdp"),
        ("--distributed-exec", "always dwdp"),
        ("--hos", "launch's own --host"),
        ("--port=5", "launch's own --port"),
        ("--ssl-keyfile", "put TLS in front"),
        ("--ssl_certfile=a.pem", "put TLS in front"),
        ("--uds", "by HTTP"),
        ("--headless", "by HTTP"),
        ("--additional-config.dwdp.mode=direct", "in full and as one JSON object"),
        ("--additional_conf", "in full and as one JSON object"),
    ],
)
def test_arguments_that_are_not_for_ranks(argument: str, instead: str) -> None:
    given = re.escape(argument.partition("=")[0])
    with pytest.raises(DwdpConfigError, match=f"^{given}.* {instead}"):
        split_arguments(["--enforce-eager", argument, "2"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--additional-config", '{"dwdp": {"mode": "direct"}}'],
        ['--additional-config={"dwdp": {"mode": "direct"}}'],
        ["--additional_config", '{"dwdp": {"mode": "direct"}}'],
        ['--additional_config={"dwdp": {"mode": "direct"}}'],
    ],
)
def test_the_additional_config_is_taken_out(arguments: list[str]) -> None:
    others = [
        "--max_model_len",
        "512",
        "--dtype=bfloat16",
        "-tp",
        "1",
        "--hf-overrides",
        '{"a_b": 1}',
    ]
    rest, config = split_arguments([*others, *arguments])
    assert (list(rest), config) == (others, {"dwdp": {"mode": "direct"}})
    assert plan(additional_config=config).dwdp_options == {
        "rendezvous": "unix:///run/meet",
        "mode": "direct",
    }


@pytest.mark.parametrize("text", ["{", "3", '{"dwdp": 3}', ""])
def test_an_additional_config_that_is_no_object(text: str) -> None:
    with pytest.raises(DwdpConfigError, match="--additional-config .* JSON"):
        split_arguments(["--additional-config", text])
