"""What comes from outside is refused in one line: options, config.json, TOML, traces, paths."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import MIXTRAL_8X7B
from vllm_dwdp.entrypoints.cli import main as cli
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import real, shown, whole

Command = Callable[..., tuple[int, str, str]]
PEAKS = {
    "bf16_tflops": "1",
    "fp8_tflops": "2",
    "fp4_tflops": "0",
    "memory_gb": "99",
    "memory_gbps": "900",
    "link_gbps": "9",
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `vllm-dwdp` in this process: exit status, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["vllm-dwdp", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path, MIXTRAL_8X7B)


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def assert_refused(answer: tuple[int, str, str], message: str) -> None:
    status, _, error = answer
    assert status == 2
    assert error.startswith("vllm-dwdp: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert len(error) < 700


@pytest.mark.parametrize("value", [3.0, "3", True, None, 0, 8])
def test_what_is_no_whole_number(value: object) -> None:
    assert whole("x", 7, 1, 7) == 7
    with pytest.raises(DwdpConfigError, match="^x is .*; it must be a whole number from 1 to 7.$"):
        whole("x", value, 1, 7)


@pytest.mark.parametrize("value", ["3", True, None, float("nan"), float("inf"), 0, 7.1])
def test_what_is_no_number(value: object) -> None:
    assert real("x", 7, 0, 7, above=True) == 7.0
    with pytest.raises(DwdpConfigError, match="^x is .*; it must be a number above 0"):
        real("x", value, 0, 7, above=True)


def test_messages_stay_short() -> None:
    assert len(shown("a" * 1000)) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "Expecting value"),
        ("[]", "it must be a JSON object"),
        (MIXTRAL_8X7B | {"architectures": {"a": 1}}, "architectures in config.json is {'a': 1}"),
        (MIXTRAL_8X7B | {"architectures": "Mixtral"}, "it must be a list of names"),
        (MIXTRAL_8X7B | {"num_local_experts": 8.0}, "num_local_experts in config.json is 8.0;"),
        (MIXTRAL_8X7B | {"num_local_experts": "8"}, "num_local_experts in config.json is '8';"),
        (MIXTRAL_8X7B | {"hidden_size": float("nan")}, "hidden_size in config.json is nan"),
        (MIXTRAL_8X7B | {"num_hidden_layers": 0}, "0; it must be a whole number of at least 1."),
    ],
)
def test_a_config_that_cannot_be(
    command: Command, tmp_path: Path, content: Any, message: str
) -> None:
    path = written(tmp_path, content)
    assert_refused(command("plan", "--model", str(path)), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gb": "-1"}, "mine.memory_gb is -1; it must be a number above 0."),
        ({"memory_gb": "inf"}, "mine.memory_gb is inf"),
        ({"memory_gb": "true"}, "mine.memory_gb is True"),
        ({"fp8_tflops": "0"}, "mine.fp8_tflops is 0; it must be a number above 0"),
        ({"[mine.efficiency]\nlink": "1.5"}, "mine.efficiency.link is 1.5; .* at most 1."),
        ({"[mine.efficiency]\nmemory": "2"}, "mine.efficiency.memory is 2"),
        (
            {"[mine.efficiency]\nbeside_copies": "1.4"},
            "beside_copies is 1.4; .* at most 1.",
        ),
        ({"[Mine]\nbf16_tflops": "1"}, "'Mine' is there twice"),
        ({"x": "["}, "--hardware"),
    ],
)
def test_hardware_that_cannot_be(tmp_path: Path, change: dict[str, str], message: str) -> None:
    from vllm_dwdp.planner.hardware import find_hardware

    path = tmp_path / "mine.toml"
    entries = PEAKS | change
    path.write_text("[mine]\n" + "\n".join(f"{key} = {entries[key]}" for key in entries))
    with pytest.raises(DwdpConfigError, match=message):
        find_hardware("mine", path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"arrival_s": 0, "input_tokens": 3.9}', "input_tokens is 3.9"),
        ('{"arrival_s": 0, "input_tokens": "12"}', "input_tokens is '12'"),
        ('{"arrival_s": true, "input_tokens": 12}', "arrival_s is True"),
        ('{"arrival_s": NaN, "input_tokens": 5}', "arrival_s is nan"),
        ('{"arrival_s": 0, "input_tokens": 0}', "input_tokens is 0"),
        ("[", "line 1: "),
    ],
)
def test_a_trace_that_cannot_be(
    command: Command, config: Path, tmp_path: Path, line: str, message: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(line + "\n")
    assert_refused(command("simulate", "--model", str(config), "--trace", str(trace)), message)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("plan", "--variation", "nan"),
        ("plan", "--experts-per-rank", "-1"),
        ("simulate", "--rate", "inf"),
        ("simulate", "--slice-mib", "nan"),
        ("simulate", "--smallest-share", "0"),
        ("bench", "--seconds", "inf"),
    ],
)
def test_numbers_out_of_bounds(
    command: Command, config: Path, name: str, option: str, value: str
) -> None:
    model = ("--model", str(config)) if name != "bench" else ()
    assert_refused(command(name, *model, option, value), f"{option} is ")


@pytest.mark.parametrize(
    "path", ["/dev/full", f"/tmp/{'a' * 300}.png", "/nowhere/x.png", "", "/tmp"]
)
def test_a_picture_that_cannot_be_written(command: Command, config: Path, path: str) -> None:
    pytest.importorskip("matplotlib")
    answer = command("plan", "--model", str(config), "--png", path)
    assert_refused(answer, "cannot be written")


def test_brackets_in_what_others_wrote_are_shown_as_they_are(
    command: Command, tmp_path: Path
) -> None:
    model = written(tmp_path, MIXTRAL_8X7B | {"architectures": ["[/bold]x"]})
    hardware = tmp_path / "mine.toml"
    lines = [f"{key} = {value}" for key, value in PEAKS.items()]
    hardware.write_text('["[/y]"]\n' + "\n".join([*lines, 'source = "[red]z"']))
    chosen = ("--model", str(model), "--hardware", str(hardware), "--gpu", "[/y]")
    status, out, error = command("plan", *chosen)
    assert (status, error) == (0, "")
    assert "[/bold]x on 4 x [/y] ([red]z)" in out
    status, out, error = command("simulate", *chosen, "--requests", "3")
    assert (status, error) == (0, "")
    assert "[/bold]x on 4 x [/y]" in out


def test_the_default_output_is_checked_before_measuring(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").write_text("a file where the folder would be")
    assert_refused(command("bench"), "--output (the default)")
