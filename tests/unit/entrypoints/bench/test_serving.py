"""`benchmarks/benchmark_serving.py` without a server: its flags and its rounds."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_dwdp.entrypoints.bench import deployments, serving, starting
from vllm_dwdp.entrypoints.bench.deployments import Deployment, Setting
from vllm_dwdp.entrypoints.bench.serving import ServingOptions, Stage, parse, run_serving
from vllm_dwdp.entrypoints.bench.serving_result import ServingResult
from vllm_dwdp.errors import DwdpConfigError

TRAFFIC = ("--dataset-name", "random", "--request-rate", "4", "--goodput", "ttft:90", "tpot:9")


def parsed(tmp_path: Path, *words: str) -> ServingOptions:
    return parse(["--result-dir", str(tmp_path), *words])


def test_vllms_flags_are_passed_on_as_they_were_given(tmp_path: Path) -> None:
    options = parsed(
        tmp_path,
        *("--deployments", "dwdp,tp,disagg", "--ranks", "2", *TRAFFIC),
        *("--decode-servers", "3", "--decode-args", "--tensor-parallel-size 4 --dtype float32"),
        *("--serve-args=--enforce-eager", "--rounds", "5", "--num_prompts", "7"),
    )
    assert options.deployments == ("dwdp", "tp", "disagg")
    assert (options.decode_servers, options.rounds, options.warmup_rounds) == (3, 5, 1)
    assert options.decode_arguments == ("--tensor-parallel-size", "4", "--dtype", "float32")
    assert options.serve_arguments == ("--enforce-eager",)
    given = ("--result-dir", str(tmp_path), *TRAFFIC, "--num_prompts", "7")
    assert options.traffic == given
    assert options.flags["num_prompts"] == 7, "vLLM's parser takes underscores"
    assert options.flags["goodput"] == ["ttft:90", "tpot:9"]


def test_a_run_asks_its_deployment_with_the_requests_of_its_round(tmp_path: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = FlexibleArgumentParser()
    add_cli_args(parser)

    def run(*words: str) -> dict[str, Any]:
        options = parsed(tmp_path, *TRAFFIC, *words)
        arguments = options.run_arguments("tp", "http://x:1", "/model", tmp_path / "r.json", 2)
        return vars(parser.parse_args(arguments))

    found = run("--seed", "40", "--metric-percentiles", "90", "--served-model-name", "theirs")
    assert (found["base_url"], found["model"], found["served_model_name"]) == (
        "http://x:1",
        "m",
        "m",
    )
    assert (found["seed"], found["metric_percentiles"]) == (42, "50,99,90")
    assert (found["tokenizer"], found["label"]) == ("/model", "tp")
    assert (found["result_dir"], found["result_filename"]) == (str(tmp_path), "r.json")
    assert found["save_result"] and found["save_detailed"]
    assert found["goodput"] == ["ttft:90", "tpot:9"]
    found = run("--tokenizer", "/other", "--label", "mine")
    assert (found["tokenizer"], found["label"]) == ("/other", "mine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base-url", "http://x"), "--base-url cannot be given to benchmark_serving.py: --dep"),
        (("--port", "9"), "--port cannot be given"),
        (("--append-result",), "--append-result cannot be given to benchmark_serving.py: all rou"),
        (("--rounds", "0"), "--rounds is 0; it must be a whole number of at least 1."),
        (("--warmup-rounds", "-1"), "--warmup-rounds is -1; it must be a whole number"),
        (("--ranks", "1"), "--ranks is 1; it must be a whole number of at least 2."),
        (("--decode-servers", "0"), "--decode-servers is 0; it must be a whole number of at"),
        (("--deployments", "dwdp,magic"), "--deployments 'magic' is unknown; known are dwdp, rep"),
        (("--deployments", "tp,dwdp,tp"), "--deployments tp,dwdp,tp names one twice"),
        (("--deployments", ","), "--deployments is empty; known are dwdp, replica"),
        (("--deployments", "dp-ep"), "--deployments dp-ep needs GPUs"),
        (("--result-dir", "/proc/nowhere"), "--result-dir /proc/nowhere cannot be written"),
        (("--result-filename", "no/x.json"), "--result-filename .*no/x.json cannot be written"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        parsed(tmp_path, *words)


def test_what_vllm_does_not_know_is_refused_by_its_parser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(tmp_path, "--no-such-flag")
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((), 1),
        (("--tensor-parallel-size", "4", "--enable-expert-parallel"), 4),
        (("--tensor_parallel_size=2", "-dp", "3", "--pipeline-parallel-size", "2"), 12),
    ],
)
def test_the_gpus_of_a_decode_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], count: int
) -> None:
    setting = Setting(model="x", num_ranks=4, arguments=(), folder=tmp_path, decode_servers=2,
                      decode_arguments=arguments)  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    assert [setting.num_devices(name) for name in ("tp", "disagg")] == [cores, cores]
    monkeypatch.setattr(deployments, "has_gpu", lambda: True)
    assert [setting.num_devices(name) for name in ("tp", "disagg")] == [4, 4 + 2 * count]


def test_the_disaggregated_deployment_is_a_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(starting, "Server", lambda *given: made.append(given) or ExitStack())
    setting = Setting(
        model="/model", num_ranks=2, arguments=("--enforce-eager",), folder=tmp_path, one_url=True,
        decode_servers=3, decode_arguments=("--tensor-parallel-size", "4"),
    )  # fmt: skip
    with ExitStack() as stack:
        assert len(list(starting._make_servers(stack, "disagg", setting))) == 1
    ((arguments, log, _, program),) = made
    assert program[1:] == ("-m", "vllm_dwdp.entrypoints.cli.main", "launch")
    assert arguments[0] == "/model" and "--enforce-eager" in arguments
    assert arguments[arguments.index("--ranks") + 1] == "2"
    assert arguments[arguments.index("--decode-servers") + 1] == "3"
    assert "--decode-args=--tensor-parallel-size 4" in arguments
    assert log == tmp_path / "disagg.log"


class StandIn:
    """A client and deployments that answer at once, and note what ran when."""

    pid = os.getpid()

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []
        self.started: list[str] = []
        self.fails_at = 0

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def begin(self, arguments: list[str]) -> None:
        label, seed = (arguments[arguments.index(flag) + 1] for flag in ("--label", "--seed"))
        self.ran.append((label, int(seed)))

    def finish(self, result: Path) -> dict[str, Any]:
        if self.fails_at == len(self.ran):
            raise RuntimeError("the client failed")
        speed = {"dwdp": 20.0, "tp": 10.0, "stock": 40.0}[self.ran[-1][0]]
        return {"output_throughput": speed + self.ran[-1][1], "p99_ttft_ms": 5, "ttfts": [1.0]}

    def start(self, stack: ExitStack, name: str, *_: Any) -> Deployment:
        self.started.append(name)
        return Deployment(name=name, servers=(), num_devices=4, start_s=1.0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(serving, "BenchClient", lambda *_: made)
    monkeypatch.setattr(serving, "start", made.start)
    monkeypatch.setattr(Deployment, "url", lambda self: "http://x")
    return made


def test_rounds_are_interleaved_and_kept_as_they_come(tmp_path: Path, stand_in: StandIn) -> None:
    options = parsed(tmp_path, "--deployments", "dwdp,tp,stock", "--rounds", "2", "--model", "/m")
    kept: list[ServingResult] = []
    result = run_serving(options, "again", lambda _: None, kept.append)
    warm_up = [("stock", 0), ("tp", 0), ("dwdp", 0)]
    first = [("dwdp", 1), ("tp", 1), ("stock", 1)]
    assert stand_in.ran == [*warm_up, *first, ("stock", 2), ("tp", 2), ("dwdp", 2)]
    assert sorted(stand_in.started) == ["dwdp", "stock", "tp"], (
        "each once: the others are suspended"
    )
    assert [len(each.runs) for each in kept] == [1, 2, 3, 4, 5, 6]
    assert list(result.deployments) == ["dwdp", "tp", "stock"], "as asked for"
    assert result.values("tp", "output_throughput") == {1: 11.0, 2: 12.0}
    json.dumps(result.as_dict())


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, stand_in: StandIn) -> None:
    options = parsed(tmp_path, "--deployments", "dwdp,tp", "--model", "/m", "--warmup-rounds", "0")
    kept: list[ServingResult] = []
    stand_in.fails_at = 3
    with pytest.raises(RuntimeError, match="the client failed"):
        run_serving(options, "again", lambda _: None, kept.append)
    assert [run.deployment for run in kept[-1].runs] == ["dwdp", "tp"]
    json.dumps(kept[0].as_dict())


@pytest.mark.parametrize("gpus", [False, True])
def test_gpus_hold_one_deployment_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: bool
) -> None:
    """Their memory is for one; suspended servers would hold it."""
    held: set[str] = set()
    started: list[str] = []

    @contextmanager
    def of(name: str) -> Iterator[None]:
        started.append(name)
        held.add(name)
        yield
        held.discard(name)

    def start(stack: ExitStack, name: str, *_: Any) -> Deployment:
        stack.enter_context(of(name))
        return Deployment(name=name, servers=(), num_devices=1, start_s=1.0)

    monkeypatch.setattr(serving, "start", start)
    monkeypatch.setattr(serving, "has_gpu", lambda: gpus)
    setting = Setting(model="x", num_ranks=2, arguments=(), folder=tmp_path)
    with ExitStack() as stack:
        stage = Stage(stack, setting, lambda _: None)
        for name in ("dwdp", "tp", "dwdp"):
            with stage.holding(name) as made:
                assert made.name == name
                assert held == ({name} if gpus else set(started))
    assert started == (["dwdp", "tp", "dwdp"] if gpus else ["dwdp", "tp"])
    assert not held


@pytest.mark.parametrize(
    ("flag", "kept"), [("--save-detailed", True), ("--plot-timeline", True), ("--no-stream", False)]
)
def test_vllms_own_files_stay_where_they_were_asked_for(
    tmp_path: Path, stand_in: StandIn, flag: str, kept: bool
) -> None:
    options = parsed(tmp_path, "--result-filename", "found.json", flag)
    setting = Setting(model="x", num_ranks=2, arguments=(), folder=tmp_path / "gone")
    bench = serving._Serving(options, setting, None, None, None)  # type: ignore[arg-type]
    expected = tmp_path / "found.tp.2.json" if kept else tmp_path / "gone" / "tp.2.json"
    assert bench._file("tp", 2) == expected
    assert bench._file("tp", 0).parent == tmp_path / "gone", "what warms up is not kept"
