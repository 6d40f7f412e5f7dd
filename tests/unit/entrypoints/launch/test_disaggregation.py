"""What a disaggregated launch runs, and what it refuses before anything starts."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.entrypoints.launch.fakes import plan
from tests.unit.entrypoints.launch.servers import healthy_server
from vllm_dwdp.entrypoints.cli import launch as cli_launch
from vllm_dwdp.entrypoints.cli.main import app
from vllm_dwdp.entrypoints.doctor.gpus import one_gpu_each
from vllm_dwdp.entrypoints.launch import disaggregation as disagg
from vllm_dwdp.entrypoints.launch import launcher
from vllm_dwdp.entrypoints.launch.cores import BIND_ENV, cores_for_each
from vllm_dwdp.entrypoints.launch.disaggregation import Disaggregation
from vllm_dwdp.entrypoints.launch.plan import api_key
from vllm_dwdp.errors import DwdpConfigError

FACTS: dict[str, Any] = {
    "decode_ports": (9001, 9002),
    "decode_arguments": ("--max-num-seqs", "7"),
    "decode_urls": ("http://10.0.0.7:8000",),
    "relay_ports": (9101, 9102),
    "door_ports": (9201, 9202, 9203),
    "side_channel_ports": (5600, 5700, 5800),
    "transfer": {"kv_connector_extra_config": {"kv_lease_duration": 60}},
}


def disaggregated(**changes: Any) -> Any:
    return plan(
        arguments=("--dtype", "bfloat16"),
        additional_config={"dwdp": {"mode": "prefetch"}, "other": 3},
        disaggregation=Disaggregation(**(FACTS | changes)),
    )


def options(command: list[str], name: str) -> list[str]:
    return [value for option, value in pairwise(command) if option == name]


def test_ranks_produce_and_decode_servers_consume() -> None:
    made = disaggregated()
    common = {"kv_connector": "NixlConnector", **FACTS["transfer"]}
    rank, decode = made.rank_command(1), made.decode_command(1)
    assert json.loads(*options(rank, "--kv-transfer-config")) == common | {"kv_role": "kv_producer"}
    assert json.loads(*options(decode, "--kv-transfer-config")) == common | {
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
    }
    assert options(rank, "--dtype") == options(decode, "--dtype") == ["bfloat16"]
    assert options(decode, "--port") == ["9002"]
    assert options(decode, "--max-num-seqs") == ["7"] and "--max-num-seqs" not in rank
    assert decode.index("--dtype") < decode.index("--max-num-seqs"), "the last one counts"


def test_a_decode_server_is_stock() -> None:
    decode = disaggregated().decode_command(0)
    assert json.loads(*options(decode, "--additional-config")) == {"other": 3}
    assert not {"--distributed-executor-backend", "--middleware"} & {*decode}


def test_every_side_has_a_side_channel_of_its_own() -> None:
    made = disaggregated()
    assert made.rank_environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"
    assert made.disaggregation.side_channel(2) == {"VLLM_NIXL_SIDE_CHANNEL_PORT": "5800"}


def test_the_router_asks_relays_and_every_decode_server() -> None:
    made = disaggregated()
    command = made.router_command()
    assert options(command, "--prefill") == [
        "http://127.0.0.1:9101/routed",
        "http://127.0.0.1:9102/routed",
    ]
    doors = ["9201", "9202", "9203"]
    assert options(command, "--decode") == [f"http://127.0.0.1:{port}" for port in doors]
    assert made.decode_urls[2] == "http://10.0.0.7:8000"
    assert "--vllm-pd-disaggregation" in command and "--worker-urls" not in command
    relay = made.relay_command()
    assert relay[-3:] == ["9101,9102", *made.rank_urls]
    opened = [f"{port}={url}" for port, url in zip(doors, made.decode_urls, strict=True)]
    assert options(relay, "--decode") == opened
    assert [made.door(index) for index in (0, 2)] == ["127.0.0.1:9201", "127.0.0.1:9203"]
    assert made.control_command()[-5:] == made.rank_urls + made.decode_urls


def test_ranks_alone_listen_where_launch_was_told_to() -> None:
    made = plan(
        host="0.0.0.0",
        disaggregation=Disaggregation(side_channel_ports=(5600,), only_prefill=True),
    )
    assert not made.has_router
    assert options(made.rank_command(0), "--host") == ["0.0.0.0"]
    assert made.rank_urls == ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    assert "kv_producer" in str(made.rank_command(0))


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("", 1),
        ("--tensor-parallel-size 4 --enable-expert-parallel", 4),
        ("-tp 2 -pp=3", 6),
        ("--data_parallel_size=8 -tp 1", 8),
    ],
)
def test_devices_of_a_decode_server(text: str, devices: int) -> None:
    assert disagg.devices_of(disagg.split_decode_arguments(text)) == devices


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("--tensor-parallel-size x", "--tensor-parallel-size 'x' must be a positive number"),
        ("-tp 0", "-tp '0' must be a positive number"),
        ("--port 3", "--port cannot be given to decode servers: launch chooses it"),
        ("--kv_transfer_config={}", "--kv-transfer-config cannot .* to launch itself"),
        ("--additional-config {}", "decode servers are stock"),
        ("'open", "No closing quotation"),
    ],
)
def test_decode_arguments_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(DwdpConfigError, match=problem):
        disagg.split_decode_arguments(text)


def test_the_transfer_config_is_taken_out() -> None:
    given = ["--a", "--kv-transfer-config", '{"kv_buffer_device": "cpu"}', "--b"]
    assert disagg.take_transfer_config(given) == (("--a", "--b"), {"kv_buffer_device": "cpu"})
    assert disagg.take_transfer_config(['--kv_transfer_config={"engine_id": "x"}'])[1] == {
        "engine_id": "x"
    }
    for wrong in ("{", "3", '{"kv_connector": "LMCacheConnectorV1"}'):
        with pytest.raises(DwdpConfigError, match="--kv-transfer-config .*JSON"):
            disagg.take_transfer_config(["--kv-transfer-config", wrong])


@pytest.mark.parametrize(
    "url", ["", "host:8000", "https://h:1", "http://h", "http://h:1/v1", "http://h:x"]
)
def test_urls_that_are_none_of_a_server(url: str) -> None:
    assert disagg.check_url("http://h:1/") == "http://h:1"
    with pytest.raises(DwdpConfigError, match="must be like http://host:port"):
        disagg.check_url(url)


def test_servers_elsewhere_need_to_know_where_we_are() -> None:
    check = disagg.check_side_channel
    check({}, "127.0.0.1", ["http://localhost:1", "http://127.0.0.2:1"], False)
    check({}, "127.0.0.1", [], True)
    check({"VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.1"}, "0.0.0.0", ["http://h:1"], True)
    with pytest.raises(DwdpConfigError, match="--decode-url http://h:1: set VLLM_NIXL_SIDE"):
        check({}, "127.0.0.1", ["http://localhost:1", "http://h:1"], False)
    with pytest.raises(DwdpConfigError, match="--prefill-only --host 0.0.0.0: set VLLM_NIXL"):
        check({}, "0.0.0.0", [], True)


def test_decode_servers_get_the_next_free_gpus() -> None:
    given = one_gpu_each(2, {}, 8, [2, 2])
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["0", "1", "2,3", "4,5"]
    assert one_gpu_each(2, {}, 0, [4]) == [{}, {}, {}]
    problem = r"--ranks 2 and --decode-servers 2 need 6 GPUs, 2 for each .* has 5 GPUs"
    with pytest.raises(DwdpConfigError, match=problem):
        one_gpu_each(2, {}, 5, [2, 2])


def test_cores_are_named_for_decode_servers_too() -> None:
    given = cores_for_each(2, {BIND_ENV: "0|1|2-3"}, [1])
    assert [each[BIND_ENV] for each in given] == ["0", "1", "2-3"]
    with pytest.raises(DwdpConfigError, match="--ranks is 2 and --decode-servers 1"):
        cores_for_each(2, {BIND_ENV: "0|1"}, [1])


def test_nixl_that_is_missing_or_broken_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disagg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DwdpConfigError, match=r"NIXL, .* not installed\. .*pip install nixl"):
        disagg.check_nixl()
    monkeypatch.setattr(disagg.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "nixl.py").write_text("raise ImportError('no backend')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DwdpConfigError, match="cannot be loaded: ImportError: no backend"):
        disagg.check_nixl()
    (tmp_path / "nixl.py").write_text("")
    disagg.check_nixl()


def test_a_decode_url_that_does_not_answer_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "find_program", lambda name: name)
    monkeypatch.setattr(launcher, "check_nixl", lambda: None)
    with healthy_server() as port:
        urls = (f"http://127.0.0.1:{port}", "http://127.0.0.1:9")
        made = disaggregated(decode_urls=urls)
        with pytest.raises(DwdpConfigError, match=r"--decode-url http://127.0.0.1:9: .* first"):
            launcher.launch(made, tmp_path / "logs", print)
    assert not (tmp_path / "logs").exists()


def test_too_little_shared_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "find_program", lambda name: name)
    monkeypatch.setattr(launcher, "check_nixl", lambda: None)
    monkeypatch.setattr(launcher, "free_bytes", lambda: 64 * 2**20)
    with pytest.raises(DwdpConfigError, match=r"^decode servers cannot start with 64 MiB free"):
        launcher.launch(disaggregated(decode_urls=()), tmp_path / "logs", print)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prefill-only", "--decode-servers", "1"], "--prefill-only runs no router"),
        (["--decode-args", "-tp 2"], "--decode-args is for the servers of --decode-servers"),
        (["--decode-url", "x"], "must be like"),
        (
            ["--decode-servers", "1", "--api-key", "k"],
            "--api-key, and VLLM_API_KEY, cannot be used",
        ),
        (
            ["--decode-url", "http://127.0.0.1:1", "--api-key=k"],
            "check keys in front of the router",
        ),
    ],
)
def test_options_that_contradict_each_other(arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, ["launch", "m", *arguments])
    assert isinstance(result.exception, DwdpConfigError)
    assert problem in str(result.exception)


UTILIZATION = "--gpu-memory-utilization"


@pytest.mark.parametrize(
    ("arguments", "environment", "of_rank", "of_decode"),
    [
        (["--decode-servers", "1"], {}, ["0.3000"], ["0.3000"]),
        (["--decode-servers", "1", "--decode-args", "-tp 2"], {}, ["0.2250"], ["0.2250"]),
        (["--decode-servers", "1", "-tp", "2"], {}, ["0.1500"], ["0.1500"]),
        (["--decode-servers", "1"], {"VLLM_CPU_KVCACHE_SPACE": "2"}, [], []),
        (["--decode-servers", "1", UTILIZATION, "0.1"], {}, ["0.1"], ["0.1"]),
        (["--decode-servers", "1", "--decode-args", f"{UTILIZATION} 0.2"], {}, [], ["0.2"]),
        (["--prefill-only"], {}, [], []),
    ],
)
def test_memory_is_divided_unless_the_user_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    of_rank: list[str],
    of_decode: list[str],
) -> None:
    """Of a model whose size nobody knows."""
    launched: list[Any] = []
    monkeypatch.setattr(launcher, "launch", lambda plan, logs, report: launched.append(plan))
    monkeypatch.setattr(cli_launch, "count_gpus", lambda: 0)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["launch", "m", *arguments])
    assert result.exit_code == 0, result.output
    (made,) = launched
    assert options(made.rank_command(0), UTILIZATION) == of_rank
    if made.decode_urls:
        assert options(made.decode_command(0), UTILIZATION) == of_decode


def test_the_key_that_servers_want_to_see() -> None:
    assert api_key(["--a", "--api-key", "k", "l"], {"VLLM_API_KEY": "e"}) == "k"
    assert api_key(["--api_key=k"], {}) == "k"
    assert api_key([], {"VLLM_API_KEY": "e"}) == "e"
    assert api_key([], {}) == ""
