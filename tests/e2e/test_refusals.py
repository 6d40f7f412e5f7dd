"""Bad input: one clear error that names the setting, the value and the fix, before anything starts."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Checkpoints
from tests.helpers.engines import fork
from tests.tables.said import Said
from vllm_dwdp.device import native
from vllm_dwdp.entrypoints.launch.server import VLLM
from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError, NativeLibraryError

pytestmark = pytest.mark.e2e


def configure(model: str, dwdp: Any = None, **arguments: Any) -> Any:
    from vllm import EngineArgs

    defaults = {"data_parallel_size": 4, "distributed_executor_backend": "dwdp"}
    return EngineArgs(
        model=model,
        **(defaults | arguments),
        additional_config={} if dwdp is None else {"dwdp": dwdp},
    ).create_engine_config()


@pytest.mark.parametrize(
    ("dwdp", "message"),
    [
        ({"mod": "direct"}, r"option 'mod' is unknown.*Did you mean 'mode'"),
        ({"mode": "fast"}, r"mode='fast' is unknown; choose one of auto, direct"),
        ({"group_size": 3}, r"group_size=3 does not divide --data-parallel-size 4.*\[1, 2, 4\]"),
        ({"group_size": 0}, r"group_size=0 must be an integer of at least 1"),
        ({"experts_per_rank": 1}, r"experts_per_rank=1 .*must lie in \[2, 8\]"),
        ({"experts_per_rank": 9}, r"experts_per_rank=9 .*must lie in \[2, 8\]"),
        ({"experts_per_rank": "2"}, r"experts_per_rank='2' must be an integer"),
        ({"executor": "ray"}, r"executor='ray' is unknown; choose one of uni, mp"),
        ({"slice_bytes": 10}, r"slice_bytes=10 must be an integer of at least 4096"),
        ({"join_timeout_s": -1}, r"join_timeout_s=-1 must be a positive number"),
        ({"rendezvous": "here"}, r"rendezvous='here' is not a meeting place; use unix:///"),
        ({"rendezvous": "tcp://h:1"}, r"'tcp://h:1'.*unix:///folder"),
        ("prefetch", r"additional_config\['dwdp'\] is 'prefetch'; it must be a JSON object"),
    ],
)
def test_dwdp_options(checkpoints: Checkpoints, dwdp: Any, message: str) -> None:
    with pytest.raises((DwdpConfigError, DwdpUnsupportedError), match=message):
        configure(checkpoints("qwen3_moe"), dwdp)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"pipeline_parallel_size": 2},
            r"--pipeline-parallel-size 2 cannot .* a rank runs every layer\. Use --tensor-parallel-size",
        ),
        pytest.param(
            {"tensor_parallel_size": 2, "prefill_context_parallel_size": 2},
            r"--prefill-context-parallel-size 2 cannot .* keeps all of a sequence .* Leave it out",
        ),
        pytest.param(
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            r"--decode-context-parallel-size 2 cannot .* keeps all of a sequence .* Leave it out",
        ),
        pytest.param(
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            r"--enable-expert-parallel cannot .*Leave it out",
        ),
        (
            {"enable_expert_parallel": True},
            r"--enable-expert-parallel cannot .*Leave it out, or give --no-enable-expert-parallel",
        ),
        (
            {"enable_expert_parallel": True, "enable_eplb": True},
            r"--enable-expert-parallel and --enable-eplb cannot .*"
            r"--enable-expert-parallel: .*Leave it out.* --enable-eplb: .*Leave it out",
        ),
        ({"enable_fault_tolerance": True}, r"--enable-fault-tolerance cannot .*Leave it out"),
        ({"load_format": "ipc_cache"}, r"--load-format ipc_cache cannot .*Leave it out"),
        ({"enable_eplb": True}, r'--enable-eplb cannot .*"experts_per_rank"'),
        ({"enable_dbo": True}, r"--enable-dbo cannot .*Leave it out"),
        (
            {"weight_transfer_config": {"backend": "sparse_nccl"}},
            r"--weight-transfer-config with backend 'sparse_nccl' cannot .*Use nccl or ipc",
        ),
        pytest.param(
            {"nnodes": 2, "master_addr": "127.0.0.1"},
            r"--nnodes 2 cannot .*start each node's ranks with --data-parallel-start-rank instead",
        ),
        ({"worker_cls": "my.Worker"}, r"--worker-cls my.Worker cannot"),
        ({"data_parallel_rank": 1}, r"rendezvous is missing.*unix:///"),
        ({"data_parallel_size": 16}, r"group_size=16 is larger than the 8 experts.* set it to 8,"),
        ({"data_parallel_size": 9}, r"group_size=9 is larger than the 8 experts.* set it to 3,"),
    ],
)
def test_vllm_arguments(checkpoints: Checkpoints, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((DwdpConfigError, DwdpUnsupportedError), match=message):
        configure(checkpoints("qwen3_moe"), **arguments)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (3, {}, r"group_size=3 is larger than the 2 experts .* set it to 1,"),
        (4, {"group_size": 3}, r"group_size=3 does not divide .* 4; set it to 2,.* \[1, 2\] "),
        (
            4,
            {"group_size": 4, "experts_per_rank": 1},
            r"set it to 2,.* Leave experts_per_rank=1 out",
        ),
    ],
)
def test_the_group_size_that_is_named_is_accepted(
    checkpoints: Checkpoints, size: int, options: dict[str, int], message: str
) -> None:
    model = checkpoints("qwen3_moe", 2)
    with pytest.raises(DwdpConfigError, match=message) as caught:
        configure(model, options, data_parallel_size=size)
    named = re.search(r"set it to (\d+),", str(caught.value))
    assert named is not None
    configure(model, {"group_size": int(named[1])}, data_parallel_size=size)


@pytest.mark.model(
    "Odd shape: one expert",
    refused="is larger than the 1 expert of a layer; set it to 1, the largest that divides "
    "--data-parallel-size 2 and is at most the 1 expert of a layer (1: every rank holds all "
    "experts itself).",
)
def test_one_expert_is_shared_by_nobody(checkpoints: Checkpoints, said: Said) -> None:
    """Refused where ranks would share it; every rank may hold it."""
    model = checkpoints("qwen3_moe", 1, num_experts_per_tok=1)
    with pytest.raises(DwdpConfigError) as refusal:
        configure(model, data_parallel_size=2)
    said(refusal.value)
    configure(model, {"group_size": 1}, data_parallel_size=2)
    configure(model, {"mode": "replica"}, data_parallel_size=2)


@pytest.mark.model(
    "Odd shape: fewer experts than ranks",
    refused="is larger than the 2 experts of a layer; set it to 2, the largest that divides "
    "--data-parallel-size 4 and is at most the 2 experts of a layer, or to one of [1, 2] (1: "
    "every rank holds all experts itself).",
)
def test_fewer_experts_than_ranks(checkpoints: Checkpoints, said: Said) -> None:
    """Refused with the size that is left; groups of that size share them."""
    model = checkpoints("qwen3_moe", 2)
    with pytest.raises(DwdpConfigError) as refusal:
        configure(model)
    said(refusal.value)
    configure(model, {"group_size": 2})


def test_a_replica_deployment_may_have_more_ranks_than_experts(checkpoints: Checkpoints) -> None:
    configure(checkpoints("qwen3_moe", 2), {"mode": "replica"}, data_parallel_size=3)


def test_a_decode_kernel_that_keeps_addresses_of_experts(checkpoints: Checkpoints) -> None:
    from vllm import EngineArgs

    arguments = EngineArgs(
        model=checkpoints("qwen3_moe"),
        distributed_executor_backend="dwdp",
        additional_config={"decode_backend": "specialized"},
    )
    message = r"--additional-config decode_backend='specialized' cannot .* Leave decode_backend out"
    with pytest.raises(DwdpUnsupportedError, match=message):
        arguments.create_engine_config()


@pytest.mark.model(
    "Odd shape: experts in the config, and in no layer",
    refused="so there is nothing for --distributed-executor-backend dwdp to share. Leave the flag "
    "out: vLLM already runs the data-parallel ranks of a dense model independently.",
)
@pytest.mark.parametrize(
    ("architecture", "overrides", "rules"),
    [
        ("qwen3_moe", {"mlp_only_layers": list(range(16))}, r"mlp_only_layers=\[0, 1"),
        ("qwen3_moe", {"decoder_sparse_step": 99}, "decoder_sparse_step=99"),
        ("deepseek_v2", {"first_k_dense_replace": 99}, "first_k_dense_replace=99"),
    ],
)
def test_experts_in_the_config_and_in_no_layer(
    checkpoints: Checkpoints, architecture: str, overrides: dict[str, Any], rules: str, said: Said
) -> None:
    message = rf"its config says .*{rules}.* Leave the flag out"
    with pytest.raises(DwdpUnsupportedError, match=message) as refusal:
        configure(checkpoints(architecture, **overrides))
    said(refusal.value)


def test_experts_that_are_substituted(checkpoints: Checkpoints) -> None:
    model = checkpoints("qwen3_moe", approximate_experts={"0": [1]})
    with pytest.raises(DwdpUnsupportedError, match="substitutes constants for some experts"):
        configure(model)


def test_prefetch_without_the_native_library(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Refused by the front end, before a worker loads anything; direct mode does not need it."""
    native.library.cache_clear()
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / "libdwdp.so")
    with pytest.raises(NativeLibraryError, match=r"is not built\. Build it with `make native`"):
        configure(checkpoints("qwen3_moe"), {"mode": "prefetch"})
    configure(checkpoints("qwen3_moe"), {"mode": "direct"})


def test_a_device_without_an_implementation(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_dwdp.compat.frontend.engine_config.device_type", lambda: "tpu")
    with pytest.raises(DwdpUnsupportedError, match=r"runs on CPUs and NVIDIA GPUs.*for 'tpu'"):
        configure(checkpoints("qwen3_moe"))


@pytest.mark.parametrize(
    ("dwdp", "num_workers", "executor"),
    [
        ({}, 1, "DwdpExecutor"),
        ({"executor": "uni"}, 1, "DwdpExecutor"),
        ({"executor": "mp"}, 1, "DwdpMultiprocExecutor"),
        ({}, 2, "DwdpMultiprocExecutor"),
    ],
)
def test_the_executor_is_named_by_the_option_and_the_number_of_workers(
    checkpoints: Checkpoints, dwdp: dict[str, str], num_workers: int, executor: str
) -> None:
    model = checkpoints("qwen3_moe", num_attention_heads=4, num_key_value_heads=2)
    config = configure(model, dwdp, tensor_parallel_size=num_workers)
    chosen = config.parallel_config.distributed_executor_backend
    assert chosen == f"vllm_dwdp.executor.executor.{executor}"
    assert config.additional_config == {"dwdp": {"mode": "auto"}}, (
        "only what changes the graph is hashed"
    )


@pytest.mark.parametrize(
    ("dwdp", "backend"),
    [({"executor": "uni"}, "dwdp"), ({}, "vllm_dwdp.executor.executor.DwdpExecutor")],
)
def test_several_workers_do_not_fit_into_the_engines_process(
    checkpoints: Checkpoints, dwdp: dict[str, str], backend: str
) -> None:
    message = r"executor='uni' runs the only worker .*--tensor-parallel-size 2 makes 2 .* to 'mp'"
    with pytest.raises(DwdpConfigError, match=message):
        configure(
            checkpoints("qwen3_moe"),
            dwdp,
            tensor_parallel_size=2,
            distributed_executor_backend=backend,
        )


def test_an_executor_may_be_chosen_by_its_dotted_name(checkpoints: Checkpoints) -> None:
    name = "vllm_dwdp.executor.executor.DwdpMultiprocExecutor"
    config = configure(checkpoints("qwen3_moe"), distributed_executor_backend=name)
    assert config.parallel_config.distributed_executor_backend == name


def test_on_a_gpu_its_worker_is_chosen_with_a_warning(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the answer of the platform is replaced: what no GPU has run must not look as if it had."""
    from vllm_dwdp.compat.frontend import engine_config

    said: list[str] = []
    monkeypatch.setattr(engine_config, "device_type", lambda: "cuda")
    monkeypatch.setattr(engine_config.logger, "warning", said.append)
    config = configure(checkpoints("qwen3_moe"), {"mode": "prefetch"})
    worker = "vllm_dwdp.executor.gpu_worker.DwdpGPUWorker"
    assert config.parallel_config.worker_cls == worker
    assert len(said) == 1 and "never on hardware" in said[0]


def test_a_dense_model(tmp_path: Any) -> None:
    import transformers

    from vllm_dwdp.entrypoints.bench.checkpoints import COMMON, write_checkpoint

    config = transformers.Qwen3Config(
        **(COMMON | {"intermediate_size": 64, "num_hidden_layers": 1})
    )
    write_checkpoint(tmp_path, config)
    with pytest.raises(DwdpUnsupportedError, match=r"has no routed experts.*Leave the flag out"):
        configure(str(tmp_path))


def test_a_model_whose_experts_vllm_does_not_count(checkpoints: Checkpoints) -> None:
    """They are counted where its config has them, and the group is checked against their number."""
    assert configure(checkpoints("dbrx")).model_config.get_num_experts() == 8
    with pytest.raises(DwdpConfigError, match=r"is larger than the 2 experts of a layer"):
        configure(checkpoints("dbrx", 2), data_parallel_size=4)


def test_the_command_ends_with_the_error_and_a_non_zero_exit(checkpoints: Checkpoints) -> None:
    command = [VLLM, "serve", checkpoints("qwen3_moe"), "--data-parallel-size", "2"]
    command += ["--distributed-executor-backend", "dwdp"]
    command += ["--additional-config", '{"dwdp": {"mode": "swift"}}']
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert "dwdp mode='swift' is unknown; choose one of auto, direct, prefetch, replica" in last


@pytest.mark.feature("torch.compile: all ranks and starts have one cache key")
def test_every_rank_and_every_start_share_one_compile_cache(checkpoints: Checkpoints) -> None:
    """vLLM names the cache by a hash of the configuration: no rank, name or timeout is in it.

    As an engine process sees it, after it has uncoupled itself from the other ranks.
    """
    model = checkpoints("qwen3_moe")
    together = configure(model)
    again = configure(model, {"join_timeout_s": 7, "slice_bytes": 8192, "executor": "mp"})
    place = {"rendezvous": "unix:///tmp/somewhere"}
    alone = [configure(model, place, data_parallel_rank=rank) for rank in (0, 1)]
    for config in (together, again, *alone):
        config.parallel_config.reconfigure_for_independent_dp_rank()
    hashes = {config.compute_hash() for config in (together, again, *alone)}
    assert len(hashes) == 1
    prefetch = configure(model, {"mode": "prefetch"})
    prefetch.parallel_config.reconfigure_for_independent_dp_rank()
    assert prefetch.compute_hash() not in hashes, "other operators"


def test_without_dwdp_stock_vllm_is_untouched(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The config of a stock engine is the same with the plugin loaded and with it disabled."""
    script = (
        "import sys; from vllm import EngineArgs; import vllm.plugins as p; "
        "p.load_general_plugins(); "
        f"c = EngineArgs(model={checkpoints('qwen3_moe')!r}, data_parallel_size=2)"
        ".create_engine_config(); "
        "from vllm.v1.engine.async_llm import AsyncLLM; from vllm.v1.engine.core_client import "
        "EngineCoreClient; from vllm.model_executor.custom_op import op_registry_oot; "
        "print('RESULT', c.compute_hash(), type(c.model_config).__name__, c.parallel_config"
        ".worker_cls, c.parallel_config.distributed_executor_backend, c.additional_config, "
        "hasattr(AsyncLLM.__init__, 'dwdp_stock'), op_registry_oot, "
        "'vllm_dwdp.executor.executor' in sys.modules)"
    )
    results = [run_script(script, tmp_path, plugins) for plugins in ("", "dwdp")]
    assert results[0] == results[1]
    assert "False {} False" in results[1]


def run_script(script: str, folder: Path, plugins: str) -> str:
    log = folder / f"plugins-{plugins}.log"
    process = fork(["-c", script], log, {"VLLM_PLUGINS": plugins})
    try:
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill()
    return next(line for line in log.read_text().splitlines() if line.startswith("RESULT"))


GIB = 2**30


def host_gib() -> int:
    return psutil.virtual_memory().total // GIB


@pytest.mark.parametrize(
    "arguments",
    [
        {"data_parallel_size": 2},
        {"data_parallel_size": 2, "data_parallel_rank": 1, "dwdp": {"rendezvous": "unix:///x"}},
        {"data_parallel_size": 1, "tensor_parallel_size": 2},
    ],
    ids=["one front end", "one by one", "workers"],
)
def test_kv_caches_that_the_machine_cannot_hold(
    arguments: dict[str, Any], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    half = host_gib() // 2
    message = (
        rf"is for each of the 2 workers of [12] ranks: 2 x {half + 1}\.00 GiB are .* and this machine "
        r"has .* Give each less than .*, or leave it out: then the ranks divide the memory"
    )
    dwdp = arguments.get("dwdp")
    model = checkpoints("qwen3_moe", 2, num_attention_heads=4, num_key_value_heads=2)
    arguments = {name: each for name, each in arguments.items() if name != "dwdp"}
    with pytest.raises(DwdpConfigError, match=f"VLLM_CPU_KVCACHE_SPACE or .*{message}"):
        configure(model, dwdp, kv_cache_memory_bytes=(half + 1) * GIB, **arguments)
    configure(model, dwdp, kv_cache_memory_bytes=(half - 1) * GIB, **arguments)
    with pytest.raises(
        DwdpConfigError, match=r"--gpu-memory-utilization 0\.6 is for each of the 2"
    ):
        configure(model, dwdp, gpu_memory_utilization=0.6, **arguments)
    configure(model, dwdp, gpu_memory_utilization=0.45, **arguments)


def test_kv_caches_that_may_lie_elsewhere_or_are_smaller(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    model, much = checkpoints("qwen3_moe", 2), {"kv_cache_memory_bytes": host_gib() * GIB}
    configure(model, {"mode": "replica"}, data_parallel_size=4, data_parallel_rank=1, **much)
    configure(model, data_parallel_size=2, num_gpu_blocks_override=8, **much)


def test_kv_caches_that_a_container_cannot_hold(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """In a memory cgroup of this test's own; by the variable that the documentation names."""
    mine = Path("/sys/fs/cgroup/memory", f"dwdp-{os.getpid()}")
    try:
        mine.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (v1) can be made here: {error}")
    try:
        (mine / "memory.limit_in_bytes").write_text(str(7 * GIB))
        script = (
            f"import os; open('{mine}/cgroup.procs', 'w').write(str(os.getpid())); "
            "from vllm import EngineArgs; import vllm.plugins as p; p.load_general_plugins(); "
            f"EngineArgs(model={checkpoints('qwen3_moe', 2)!r}, data_parallel_size=2, "
            "distributed_executor_backend='dwdp').create_engine_config(); print('RESULT fits')"
        )
        wanted = {
            "3": "RESULT fits",
            "4": "2 x 4.00 GiB are 8.00 GiB, and this container may use 7.00",
        }
        for each, said in wanted.items():
            log = tmp_path / f"{each}.log"
            process = fork(["-c", script], log, {"VLLM_CPU_KVCACHE_SPACE": each})
            try:
                assert process.wait(timeout=120) == (each == "4"), log.read_text()
            finally:
                process.kill()
            assert said in log.read_text()
    finally:
        mine.rmdir()
