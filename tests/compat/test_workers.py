"""Workers and executors: cores, memory, devices."""

import ast
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compat.syntax import assignments, calls, tree
from tests.compat.versions import vllm_minor

pytestmark = pytest.mark.compat


def test_wrappable_classes_exist() -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.compat.worker.moe import wrappable_classes

    assert all(issubclass(cls, RoutedExperts) for cls in wrappable_classes())


@pytest.mark.parametrize(("num_workers", "counted"), [(1, 2**20), (2, 2**20 + 2**22 // 2)])
def test_cpu_worker_sizes_by_resident_memory(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, counted: int
) -> None:
    """Two workers of a rank divide their engine's."""
    from vllm.v1.worker import cpu_worker

    from vllm_dwdp.compat.worker import cpu

    worker: Any = SimpleNamespace(
        _should_warm_up_model=lambda: False,
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
        requested_cpu_memory=2**30,
    )
    nodes = SimpleNamespace(available_memory=2**40, total_memory=2**40)
    monkeypatch.setattr(cpu_worker, "get_memory_node_info", lambda node: nodes)
    sizes = {os.getpid(): 2**20, os.getppid(): 2**22}
    monkeypatch.setattr(cpu, "proportional_set_bytes", sizes.__getitem__)
    with cpu.proportional_memory(num_workers):
        assert cpu_worker.CPUWorker.determine_available_memory(worker) == 2**30 - counted


def test_segments_of_messages_are_mapped_by_all_workers_once_they_have_met() -> None:
    """And by nobody afterwards, so that their names may go."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert "-cpushm" in inspect.getsource(_CPUSHMDistributed.make_group_name)
    source = inspect.getsource(_CPUSHMDistributed._init_cpu_shm)
    order = [source.index(step) for step in ("init_shm_manager", "join_shm_manager", "return")]
    assert order == sorted(order)
    assert "barrier" in source[order[1] : order[2]]
    assert "self._init_cpu_shm()" in inspect.getsource(_CPUSHMDistributed.__init__)
    assert "init_worker_distributed_environment(" in inspect.getsource(CPUWorker.init_device)


def test_cpu_binding_variable_and_its_parser() -> None:
    from vllm import envs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    from vllm_dwdp.compat.worker.cpu import BIND_ENV

    assert BIND_ENV in envs.environment_variables
    assert envs.environment_variables[BIND_ENV]() == "auto"
    made = dict(assignments(OMPProcessManager._parse_omp_threads_bind_env))
    for name in ("skip_setup", "cpu_lists"):
        assert f"self.{name}" in made, name


def test_each_worker_process_starts_inside_of_the_setting_of_its_cores() -> None:
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.executor import multiproc_executor

    assert multiproc_executor.OMPProcessManager is OMPProcessManager, "looked up by name"
    assert list(inspect.signature(OMPProcessManager.configure_omp_envs).parameters) == [
        "self",
        "rank",
        "local_rank",
    ]
    source = inspect.getsource(multiproc_executor.MultiprocExecutor._init_executor)
    start = source.index(".configure_omp_envs(")
    assert start < source.index("WorkerProc.make_worker_process(", start)


def test_ray_reserves_the_resource_that_the_platform_names() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    assert current_platform.ray_device_key == "", "the CPU build has none: ours can go"
    for method in ("create_dp_placement_groups", "add_dp_placement_groups"):
        source = inspect.getsource(getattr(utils.CoreEngineActorManager, method))
        assert "device_str = current_platform.ray_device_key" in source
    launching = inspect.getsource(utils.launch_core_engines)
    assert 'parallel_config.data_parallel_backend == "ray"' in launching
    assert "vllm_config.model_config.is_moe" in inspect.getsource(
        utils.CoreEngineActorManager.__init__
    ), "chooses the actor of independent ranks"


def test_cpu_worker_takes_memory_of_the_node_of_the_first_core_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from vllm.utils import cpu_resource_utils
    from vllm.v1.worker import cpu_worker

    class NodeChosenError(Exception):
        pass

    def choose(nodes: list[int]) -> None:
        raise NodeChosenError(nodes)

    def start_on(core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread
        parallel_config = SimpleNamespace(assigned_physical_gpu_ids=None)
        cpu_worker.CPUWorker(SimpleNamespace(parallel_config=parallel_config), 0, 0, "")

    allowed = sorted(os.sched_getaffinity(0))
    cores = [cpu_resource_utils.LogicalCPUInfo(core, core, 10 + core) for core in allowed]
    monkeypatch.setattr(cpu_resource_utils, "_get_cpu_list", lambda: cores)
    monkeypatch.setattr(
        cpu_worker, "get_visible_memory_node", lambda *_: [10 + core for core in allowed]
    )
    monkeypatch.setattr(torch.ops._C, "init_cpu_memory_env", choose)
    with ThreadPoolExecutor(1) as pool:
        for core in allowed:
            with pytest.raises(NodeChosenError, match=rf"\[{10 + core}\]"):
                pool.submit(start_on, core).result()


def test_devices_of_a_rank_are_memory_nodes_since_033_and_we_hide_them() -> None:
    """Fails when hiding them can go: rank 1 has no node on a machine of one."""
    from vllm.utils import cpu_resource_utils
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine import utils

    from vllm_dwdp.compat.worker.cpu import bound_cores

    assert "assigned_physical_gpu_ids" in ast.unparse(tree(utils.CoreEngineProcManager.__init__))
    takes = list(inspect.signature(cpu_resource_utils.get_visible_memory_node).parameters)
    assert takes == (["assigned_node_ids"] if vllm_minor() >= (0, 33) else [])
    absent = max(cpu.numa_node for cpu in cpu_resource_utils.get_allowed_cpu_list()) + 1
    parallel_config = SimpleNamespace(
        assigned_physical_gpu_ids=[absent],
        data_parallel_rank_local=1,
        local_world_size=1,
        _api_process_count=1,
    )
    config: Any = SimpleNamespace(parallel_config=parallel_config, kv_transfer_config=None)
    with bound_cores(parallel_config, [1], 2):
        if takes:
            assert cpu_resource_utils.get_visible_memory_node([absent]) == []
            assert OMPProcessManager(config).assigned_node_ids is None
        assert OMPProcessManager(config).cpu_lists
    assert parallel_config.assigned_physical_gpu_ids == [absent]


def test_a_rank_of_one_process_takes_the_gpu_of_its_place_among_the_ranks_of_its_host() -> None:
    """Since 0.33 by a function of its own, before inside of `Worker.init_device`."""
    from vllm.config import ParallelConfig
    from vllm.v1.worker.gpu_worker import Worker

    if vllm_minor() < (0, 33):
        assert "data_parallel_rank_local" in ast.unparse(tree(Worker.init_device))
        return
    assert "parallel_config.get_local_gpu_index" in calls(Worker.init_device)
    facts: dict[str, Any] = {
        "distributed_executor_backend": "vllm_dwdp.executor.executor.DwdpExecutor",
        "data_parallel_backend": "mp",
        "nnodes_within_dp": 1,
        "world_size": 1,
        "data_parallel_index": 3,
    }
    for place, expected in ((0, 0), (1, 1), (None, 3)):
        rank: Any = SimpleNamespace(**facts, data_parallel_rank_local=place)
        assert ParallelConfig.get_local_gpu_index(rank, 0) == expected


def test_worker_queues_take_as_much_shared_memory_as_doctor_asks_for() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, ShmRingBuffer

    from vllm_dwdp.entrypoints.doctor.queues import WORKER_QUEUE_BYTES

    sizes = inspect.signature(MessageQueue.__init__).parameters
    buffer = ShmRingBuffer(1, 1, 1)
    each = sizes["max_chunk_bytes"].default + buffer.metadata_size
    needed = each * sizes["max_chunks"].default
    assert 0 <= WORKER_QUEUE_BYTES - needed < 2**20


def test_executor_and_worker_hooks() -> None:
    from vllm.v1.executor import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker.cpu_worker import CPUWorker

    for executor in (MultiprocExecutor, UniProcExecutor):
        assert callable(executor._init_executor)
        assert issubclass(executor, Executor)
        assert "self._init_executor" in calls(Executor.__init__)
    assert UniProcExecutor.supports_async_scheduling()
    started = calls(UniProcExecutor._init_executor)
    for name in ("init_worker", "init_device", "load_model"):
        assert f"self.driver_worker.{name}" in started, name
    assert "self.collective_rpc" in calls(UniProcExecutor.execute_model), "in the calling thread"
    for name in ("load_model", "execute_model", "determine_available_memory", "shutdown"):
        assert callable(getattr(CPUWorker, name))


def test_gpu_worker_hooks() -> None:
    from vllm.utils import mem_utils
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker

    for name in ("load_model", "shutdown", "reload_weights", "update_weights"):
        assert callable(getattr(Worker, name))
        assert getattr(DwdpGPUWorker, name) is not getattr(Worker, name)
    assert "self.device" in dict(assignments(Worker.init_device))
    # Shards and slots are no torch memory: they are seen only because free memory is what counts.
    consumed = dict(assignments(mem_utils.memory_profiling))["result.total_consumed"]
    assert consumed == "result.before_create.free_memory - result.after_profile.free_memory"


def test_weights_held_outside_are_part_of_the_memory_budget_and_need_not_be_free() -> None:
    """A rank that returns finds its experts on its GPU: they must not refuse its start."""
    from vllm.config import CacheConfig, LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.utils import request_memory

    from vllm_dwdp.compat.worker.gpu import requested_bytes, weights_held_outside

    called = calls(Worker.init_device)
    (asks,) = [name for name in called if name.endswith(".get_external_weight_memory")]
    order = ["torch.device", asks, "request_memory"]
    assert [name for name in called if name in order] == order
    loader = get_model_loader(LoadConfig())
    with weights_held_outside(lambda: 30 * 10**9):
        kept_bytes = loader.get_external_weight_memory(None)
    assert loader.get_external_weight_memory(None) == 0
    snapshot: Any = SimpleNamespace(
        total_memory=80 * 10**9, free_memory=49 * 10**9, device_="cuda:0"
    )
    cache_config = CacheConfig(gpu_memory_utilization=0.9)
    with pytest.raises(ValueError, match="Free memory"):
        request_memory(snapshot, cache_config)
    assert request_memory(snapshot, cache_config, kept_bytes) == 42 * 10**9
    vllm_config = SimpleNamespace(cache_config=cache_config)
    assert requested_bytes(vllm_config, snapshot.total_memory) - kept_bytes == 42 * 10**9
