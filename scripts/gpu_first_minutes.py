"""The first minutes on a GPU: one line per question that the CUDA device rests on.

    PYTHONPATH=. python3 scripts/gpu_first_minutes.py              # two minutes, and vLLM's smoke script
    PYTHONPATH=. python3 scripts/gpu_first_minutes.py --no-vllm    # without that

Every question is a process of its own with a timeout, so that one crash does not hide the others.
`yes` and `no` answer a question of which the product needs the yes; `fact` is worth knowing either way,
and for those that may hang for ever no answer is one. Exits 1 if a needed yes is missing. Writes
`first_minutes.json` to $OUT if that is set.

Nothing of this has run on a GPU yet. Over the fake driver (`simulated_environment()`) it runs, which
shows that the questions are asked, not how a GPU answers.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import importlib.util
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from gpu_checks.accelerator import SIMULATED_ENV, Accelerator, accelerator
from gpu_checks.expert_ranks import (
    ExpertShape,
    RankMemory,
    local_ranks,
    peers_on_host,
    same_bytes,
)
from gpu_checks.fake_cuda import ComputeStream
from gpu_checks.moe_kernels import Routing, choose_kernel
from gpu_checks.ring_check import (
    RingCheck,
    provoke_races,
    without_records,
    without_waits,
)
from tests.gpu import external_nodes
from vllm_dwdp.compat.worker import cuda_graphs
from vllm_dwdp.device.cuda_driver import CudaCopyQueue, CudaDevice, ReadOnlyAccessError
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import DwdpError, TransferError
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.prefetch.captured_ring import RingGraph

ROOT = Path(__file__).parents[1]
PAGE = 2 * 2**20
NUM_LAYERS = 6
SHAPE = ExpertShape(num_experts=7, hidden_size=256, intermediate_size=704, top_k=2)
LARGE = ExpertShape(num_experts=8, hidden_size=2048, intermediate_size=2048, top_k=2)
SIMULATED = os.environ.get(SIMULATED_ENV) == "1"
ROUNDS = 2 if SIMULATED else 8
CAPTURE_UNSUPPORTED = 900
SMOKE_S = 200.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a question found: `good` is None for a fact."""

    good: bool | None
    text: str


# --- the device ----------------------------------------------------------------------------------


def which_device() -> Answer:
    """Everything else depends on it."""
    gpu = accelerator()
    with CudaDevice(0) as device:
        text = (
            f"{gpu.describe()}; granularity {device.granularity_bytes // 1024} KiB, "
            f"{device.free_bytes / 2**30:.1f} of {device.total_bytes / 2**30:.1f} GiB free, "
            f"fabric handles {'work' if device.supports_fabric else 'do not work'} here"
        )
        with CudaCopyQueue(device) as queue:
            text += f", batch copies {'in use' if queue.uses_batch_copy else 'missing'}"
        return Answer(good=16 * 2**20 % device.granularity_bytes == 0, text=text)


def driver_call(name: str, *arguments: object) -> int:
    """The status of a driver call that the product never makes, in device 0's primary context."""
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    driver.cuInit(0)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    driver.cuCtxPushCurrent_v2(context)
    try:
        return int(getattr(driver, name)(*arguments))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        driver.cuDevicePrimaryCtxRelease_v2(0)


@contextlib.contextmanager
def allocation(device: CudaDevice, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Reserved addresses, and memory that is not mapped there."""
    address = device.reserve(num_bytes)
    handle = device.create(num_bytes, handle_type="posix_fd")
    try:
        yield address, handle
    finally:
        device.release(handle)
        device.free_address(address, num_bytes)


def partial_mappings() -> Answer:
    """May a mapping start within an allocation, or end within it?"""
    accelerator()
    found = []
    with CudaDevice(0) as device:
        page = device.granularity_bytes
        for what, offset in (
            ("starts one page into", page),
            ("ends one page before the end of", 0),
        ):
            with allocation(device, 2 * page) as (address, handle):
                status = driver_call(
                    "cuMemMap",
                    ctypes.c_uint64(address),
                    ctypes.c_size_t(page),
                    ctypes.c_size_t(offset),
                    ctypes.c_uint64(handle),
                    ctypes.c_ulonglong(0),
                )
                if status == 0:
                    device.unmap(address, page)
            verdict = "is accepted" if status == 0 else f"is refused with status {status}"
            found.append(f"a mapping that {what} an allocation {verdict}")
    return Answer(good=None, text="; ".join(found))


# --- other processes -----------------------------------------------------------------------------


@contextlib.contextmanager
def exporter(pattern: int) -> Iterator[tuple[int, int]]:
    """A process that holds two pages full of `pattern`: its pid, and a descriptor of them."""
    here, there = socket.socketpair()
    with here, there:
        process = subprocess.Popen(
            [sys.executable, __file__, "--export", str(there.fileno()), str(pattern)],
            pass_fds=[there.fileno()],
            cwd=ROOT,
        )
        try:
            there.close()
            here.settimeout(60)
            _data, fds, _flags, _address = socket.recv_fds(here, 1, 1)
            if not fds:
                raise RuntimeError("the exporting process sent no descriptor: see its error above")
            yield process.pid, fds[0]
        finally:
            process.kill()
            process.wait()


def export_pages(fd: int, pattern: int) -> NoReturn:
    """What `exporter` runs; it needs no torch."""
    device = CudaDevice(0)
    address = device.reserve(2 * PAGE)
    handle = device.create(2 * PAGE, handle_type="posix_fd")
    device.map(address, 2 * PAGE, handle)
    device.set_access(address, 2 * PAGE, writable=True)
    device.write(address, bytes([pattern]) * (2 * PAGE))
    with socket.socket(fileno=fd) as connection:
        socket.send_fds(connection, [b"x"], [device.export_fd(handle)])
    time.sleep(120)
    sys.exit(1)


@contextlib.contextmanager
def imported(device: CudaDevice, fd: int, *, writable: bool) -> Iterator[int]:
    """The exporter's pages, mapped."""
    handle = device.import_fd(fd)
    address = device.reserve(2 * PAGE)
    device.map(address, 2 * PAGE, handle)
    device.release(handle)
    try:
        device.set_access(address, 2 * PAGE, writable=writable)
        yield address
    finally:
        device.unmap(address, 2 * PAGE)
        device.free_address(address, 2 * PAGE)


def holds(address: int, pattern: int, gpu: Accelerator) -> bool:
    """Whether kernels read nothing but `pattern` in the two pages."""
    pages = tensor_at(address, torch.uint8, (2 * PAGE,), gpu.device)
    return bool((pages == pattern).all())


def killed_exporter() -> Answer:
    """Does memory that a peer exported outlive `kill -9` of the peer: mapped, and as a descriptor?"""
    gpu = accelerator()
    with CudaDevice(0) as device, exporter(77) as (pid, fd):
        with imported(device, fd, writable=True) as address:
            before = holds(address, 77, gpu)
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            filler = [
                torch.full((PAGE,), 3, dtype=torch.uint8, device=gpu.device) for _ in "x" * 64
            ]
            after = holds(address, 77, gpu)
            del filler
        with imported(device, fd, writable=True) as address:
            again = holds(address, 77, gpu)
        os.close(fd)
    text = f"read before {before}, mapped after the kill {after}, imported after the kill {again}"
    return Answer(good=before and after and again, text=text)


_kept: list[object] = []


def read_only_peer() -> Answer:
    """May a peer's pages be mapped read-only, and does a kernel that writes them fault?"""
    gpu = accelerator()
    device = CudaDevice(0)
    with exporter(78) as (_pid, fd), contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(imported(device, fd, writable=False))
        except ReadOnlyAccessError as error:
            return Answer(good=None, text=f"refused, the product maps them writable: {error}")
        if not holds(address, 78, gpu):
            return Answer(good=False, text="mapped read-only, but read wrong")
        _kept.append(stack.pop_all())  # after the fault this process can give nothing back
        try:
            if SIMULATED:
                device.write(address, b"x")
            else:
                tensor_at(address, torch.uint8, (2 * PAGE,), gpu.device).fill_(1)
                gpu.synchronize()
        except (RuntimeError, TransferError) as error:
            reason = str(error).splitlines()[0][:150]
            return Answer(good=None, text=f"allowed, and a write faults: {reason}")
        return Answer(good=None, text="allowed, but a write goes through: no protection")


# --- composites ----------------------------------------------------------------------------------


@contextlib.contextmanager
def first_rank(
    gpu: Accelerator, num_layers: int = NUM_LAYERS, shape: ExpertShape = SHAPE
) -> Iterator[RankMemory]:
    """Rank 0 of three, all of them in this process."""
    memory = gpu.open_memory()
    try:
        with local_ranks(memory, shape, num_layers, 3) as ranks:
            yield ranks[0]
    finally:
        memory.close()


def pointer_attribute(address: int, attribute: int, kind: type) -> str:
    """One attribute of an address as the driver knows it; the product does not ask."""
    value = kind()
    status = driver_call(
        "cuPointerGetAttribute", ctypes.byref(value), attribute, ctypes.c_uint64(address)
    )
    return str(value.value) if status == 0 else f"status {status}"


def torch_on_composites() -> Answer:
    """Do torch's kernels and copies work on a tensor assembled from several allocations?"""
    gpu = accelerator()
    facts = []
    with first_rank(gpu, 1) as rank, torch.no_grad():
        view, whole = rank.direct_views()[0], rank.whole(0)
        wrong = []
        for name, expected in whole.items():
            tensor = view.tensors[name]
            x = torch.randn(5, tensor.shape[2], device=gpu.device, dtype=torch.bfloat16)
            on_view = torch.matmul(x, tensor.transpose(-1, -2))
            if not same_bytes(on_view, torch.matmul(x, expected.transpose(-1, -2))):
                wrong.append(f"matmul on {name}")
            if not same_bytes(tensor.cpu(), expected.cpu()):
                wrong.append(f"copy of {name} to the host")
            if not same_bytes(tensor.clone(), expected):
                wrong.append(f"copy of {name} on the device")
        address = view.addresses[0]
        if not SIMULATED:
            facts = [
                f"memory type {pointer_attribute(address, 2, ctypes.c_uint)}",
                f"device {pointer_attribute(address, 9, ctypes.c_int)}",
                f"range size {pointer_attribute(address, 12, ctypes.c_size_t)} of "
                f"{rank.layout.layers[0].weights[0].mapped.stop} mapped",
                f"torch says {view.tensors['w13_weight'].device}",
            ]
    text = f"wrong: {', '.join(wrong)}" if wrong else "bitwise as on torch's memory"
    return Answer(good=not wrong, text="; ".join([text, *facts]))


def moe_on_composites() -> Answer:
    """Does a fused-MoE kernel give the same bits on a composite as on torch's memory?"""
    gpu = accelerator()
    name, kernel = choose_kernel(SHAPE.num_experts, SHAPE.dtype, gpu.device)
    equal = []
    with first_rank(gpu, 1) as rank, torch.no_grad():
        tensors, whole = rank.direct_views()[0].tensors, rank.whole(0)
        for num_tokens in (1, 17, 300):
            routing = Routing.random(num_tokens, SHAPE.num_experts, SHAPE.top_k, gpu.device)
            x = torch.randn(num_tokens, SHAPE.hidden_size, device=gpu.device).to(torch.bfloat16)
            outputs = [
                kernel(x, each["w13_weight"], each["w2_weight"], *vars(routing).values())
                for each in (tensors, whole)
            ]
            equal.append(same_bytes(*outputs) and bool(outputs[0].isfinite().all()))
    return Answer(good=all(equal), text=f"{name}: {equal} for 1, 17 and 300 tokens")


# --- the order of copies and kernels -------------------------------------------------------------


def ordered(mode: str) -> Answer:
    """Late copies, slow kernels, poisoned slots: right with the events, wrong without."""
    provoke_races(60000 if SIMULATED else 3000)
    gpu = accelerator()
    found = {}
    for name, break_ring in (
        ("whole", None),
        ("without waits", without_waits),
        ("without records", without_records),
    ):
        with first_rank(gpu) as rank, gpu.on_stream():
            check = RingCheck(gpu, rank)
            if break_ring is not None:
                break_ring(check.rings)
            found[name] = check.wrong_layers(check.make_step(mode), ROUNDS)
            fills = check.rings.counters()[0].fills
            check.quiet()
    # A simulated kernel has returned before its slot can be refilled, recorded or not.
    controls = bool(found["without waits"]) and bool(found["without records"] or SIMULATED)
    text = f"wrong layers {found['whole']}; controls: " + ", ".join(
        f"{name} {found[name]}" for name in list(found)[1:]
    )
    if not controls:
        text += " - A CONTROL SAW NOTHING WRONG, so this proves nothing"
    return Answer(good=not found["whole"] and controls and fills > NUM_LAYERS, text=text)


def eager_order() -> Answer:
    """Do events order copies and kernels eagerly?"""
    return ordered("eager")


def piecewise_order() -> Answer:
    """Do waits before and records behind three graphs order host-issued copies between them?"""
    return ordered("piecewise")


def full_order() -> Answer:
    """Do captured copies on VMM addresses, in a branch of one graph, keep the order?"""
    return ordered("full")


def external_waits() -> Answer:
    """When does an external wait node look at its event: at the launch of its graph or when it runs?"""
    accelerator()
    return Answer(good=None, text=external_nodes.when_waits_look())


def external_order() -> Answer:
    """Do external event nodes order host-issued copies across three graphs? The product has none."""
    accelerator()
    wrong = external_nodes.wrong_layers_of_three_graphs()
    return Answer(
        good=None, text=f"no: wrong layers {wrong}" if wrong else "yes, every layer is right"
    )


def batch_copy_under_capture() -> Answer:
    """Is a batch copy that meets a capture refused, and seen to be refused?"""
    accelerator()
    seen = "nothing: THE COPY VANISHED SILENTLY"
    with CudaDevice(0) as device, allocation(device, 2 * PAGE) as (address, handle):
        device.map(address, 2 * PAGE, handle)
        device.set_access(address, 2 * PAGE, writable=True)
        with CudaCopyQueue(device) as queue, ComputeStream() as stream:
            if not queue.uses_batch_copy:
                return Answer(good=None, text="this driver has no batch copies")
            batches = [queue.add_batch([(address, address + PAGE, 4096)]) for _ in range(3)]
            stream.begin_capture()
            queue.capture_record(batches[0], stream.handle)
            queue.capture_fill(batches[1], batches[0], stream.handle)
            try:
                queue.issue(batches[2], None)
            except TransferError as error:
                seen = str(error)
            with contextlib.suppress(DwdpError):
                stream.end_capture().close()
            queue.issue(batches[2], None)
            queue.drain()
        device.unmap(address, 2 * PAGE)
    named = f"returned {CAPTURE_UNSUPPORTED}" in seen
    return Answer(good="returned" in seen, text=f"{'as documented: ' if named else ''}{seen}")


def graph_seam() -> Answer:
    """Do torch's graphs tell a follower of capture and replay?"""
    gpu = accelerator()
    if SIMULATED:
        return Answer(good=None, text="not asked: graphs are simulated")
    told: list[str] = []

    class Follower:
        def begin_capture(self) -> None:
            told.append("begin")

        def end_capture(self) -> RingGraph:
            told.append("end")
            return RingGraph(needs=[0])

        def before_launch(self, graph: RingGraph) -> None:
            told.append("before")

        def after_launch(self, graph: RingGraph) -> None:
            told.append("after")

    x = torch.zeros(4, device=gpu.device)
    with cuda_graphs.followed_by([Follower()]):
        replay = gpu.capture(lambda: x.add_(1))
        replay()
        replay()
    gpu.synchronize()
    expected = ["begin", "end", "before", "after", "before", "after"]
    good = told == expected and x.tolist() == [2.0] * 4
    return Answer(good=good, text=f"told {' '.join(told)}; the graph ran {x[0].item():g} times")


def no_join() -> Answer:
    """Do copies for later layers leave the pieces before them alone (nothing joins in a piece)?"""
    gpu = accelerator()
    with first_rank(gpu, shape=SHAPE if SIMULATED else LARGE) as rank, gpu.on_stream():
        rings = rank.rings(peers_on_host(rank, gpu.pinned))
        x = torch.zeros(1, device=gpu.device)

        def layer(index: int) -> None:
            ops.wait_layer(x, 0, index)
            gpu.pause(20)
            ops.record_layer(x, 0, index)

        layer(0)
        layer(1)
        pieces = [gpu.capture(lambda index=index: layer(index)) for index in range(NUM_LAYERS)]
        shares = []
        for _ in range(ROUNDS):
            rings.begin_forward()
            rings.queue.drain()
            gpu.synchronize()
            ours = gpu.milliseconds(lambda: [pieces[index]() for index in (0, 1)])
            shares.append((ours, gpu.milliseconds(lambda: [pieces[n]() for n in range(2, 6)])))
        copy_ms = milliseconds_of_fill(rings)
    ours, later = (statistics.median(column) for column in zip(*shares, strict=True))
    text = f"pieces 0 and 1 took {ours:.2f} ms, pieces 2 to 5 {later:.2f} ms, one fill {copy_ms:.2f} ms"
    return Answer(good=None if SIMULATED else ours < copy_ms / 2, text=text)


# --- speed ---------------------------------------------------------------------------------------


def milliseconds_of_fill(rings: PrefetchRings) -> float:
    """The median time of layer 0's copies, by the host's clock."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        rings.queue.issue(rings.pipelines[0].batches[0], None)
        rings.queue.drain()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def copy_speed() -> Answer:
    """How fast are our copies beside torch's, within the device and from pinned host memory?"""
    gpu = accelerator()
    num_bytes = 2**22 if SIMULATED else 2**28
    found = []
    target = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
    sources = {
        "within the device": torch.ones(num_bytes, dtype=torch.uint8, device=gpu.device),
        "pinned host to device": gpu.pinned(num_bytes),
    }
    gpu.synchronize()
    with CudaDevice(0) as device, CudaCopyQueue(device) as queue:
        for name, source in sources.items():
            addresses = target.data_ptr(), source.data_ptr()
            slices = [
                (addresses[0] + start, addresses[1] + start, PAGE)
                for start in range(0, num_bytes, PAGE)
            ]
            batch = queue.add_batch(slices)

            def ours(batch: int = batch) -> None:
                queue.issue(batch, None)
                queue.drain()

            def plain(source: torch.Tensor = source) -> None:
                target.copy_(source, non_blocking=True)
                gpu.synchronize()

            speeds = [num_bytes / 1e9 / best_seconds(action) for action in (ours, plain)]
            found.append(f"{name} {speeds[0]:.0f} GB/s in 2 MiB slices, torch {speeds[1]:.0f} GB/s")
    return Answer(good=None, text="; ".join(found) + " (bytes moved once)")


def best_seconds(action: Callable[[], object]) -> float:
    """The best of ten."""
    action()
    times = []
    for _ in range(10):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def measured_costs() -> Answer:
    """What the measurement at start, by which `auto` chooses, finds here."""
    from vllm_dwdp.model_executor.measure import measure_costs

    gpu = accelerator()
    with first_rank(gpu) as rank:
        costs = measure_costs(rank.mapper(), rank.rings(), 0, rank.direct_views()[0])
    text = (
        f"copies {costs.copy_bytes_per_s / 1e9:.0f} GB/s, reads in place "
        f"{costs.direct_bytes_per_s / 1e9:.0f} GB/s, direct up to {costs.direct_max_tokens} tokens "
        "(one device: peers are as near as own memory)"
    )
    return Answer(good=costs.copy_bytes_per_s > 0 and costs.direct_bytes_per_s > 0, text=text)


def nothing_left() -> Answer:
    """Do memory and descriptors return when a rank closes?"""
    gpu = accelerator()
    with CudaDevice(0) as device:
        freed, files = [], []
        for _ in range(3):
            with first_rank(gpu) as rank:
                rings = rank.rings()
                rings.begin_forward()
                rank.direct_views()
            gpu.release_memory()
            freed.append(device.free_bytes)
            files.append(len(os.listdir("/proc/self/fd")))
        lost = freed[0] - freed[-1]
        good = abs(lost) <= device.granularity_bytes and files[0] == files[-1]
    return Answer(
        good=good, text=f"lost {lost} bytes and {files[-1] - files[0]} descriptors in 2 runs"
    )


# --- asking --------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[], Answer]] = {
    function.__name__: function
    for function in (
        which_device,
        partial_mappings,
        killed_exporter,
        read_only_peer,
        torch_on_composites,
        moe_on_composites,
        eager_order,
        piecewise_order,
        full_order,
        external_waits,
        external_order,
        batch_copy_under_capture,
        graph_seam,
        nothing_left,
        no_join,
        copy_speed,
        measured_costs,
    )
}
MAY_HANG_S = {"external_waits": 30.0, "external_order": 30.0}
"""Questions about what the product does not use; no answer in this time is an answer."""
ALONE = ("nothing_left", "no_join", "copy_speed", "measured_costs")
"""Asked one after the other, with nothing else on the device."""


def answer_here(name: str) -> int:
    """Answer one question in this process; the last line of the output is the answer."""
    faulthandler.enable()
    try:
        answer = QUESTIONS[name]()
    except Exception as error:
        traceback.print_exc()
        answer = Answer(good=False, text=f"{type(error).__name__}: {str(error)[:600]}")
    print("\n" + json.dumps(vars(answer)), flush=True)
    os._exit(0)  # a faulted context may not survive a tidy exit


def ask(name: str, timeout_s: float) -> dict[str, Any]:
    """Answer one question in a child."""
    started = time.monotonic()
    timeout_s = min(timeout_s, MAY_HANG_S.get(name, timeout_s))
    command = [sys.executable, __file__, "--ask", name]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        hangs = "; it hangs" if name in MAY_HANG_S else ""
        found = {"good": False, "text": f"no answer in {timeout_s:.0f} s{hangs}"}
    else:
        try:
            found = json.loads(output.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            tail = " | ".join(output.strip().splitlines()[-4:])
            found = {"good": False, "text": f"died with {process.returncode}: {tail}"}
    if name in MAY_HANG_S:
        found["good"] = None
    return {
        "name": name,
        "question": (QUESTIONS[name].__doc__ or "").strip(),
        "seconds": round(time.monotonic() - started, 1),
        "output": output,
        **found,
    }


def report(result: dict[str, Any]) -> None:
    """One line."""
    word = {True: "yes ", False: "NO  ", None: "fact"}[result["good"]]
    print(
        f"{word} {result['name']} ({result['seconds']:.0f} s) {result['question']}\n"
        f"       {result['text']}",
        flush=True,
    )
    if result["good"] is False:
        for line in result["output"].strip().splitlines()[-12:]:
            print(f"       | {line[:300]}", flush=True)


def run_smoke(bundle: Path) -> dict[str, Any] | None:
    """The bundle's own script: does vLLM generate here, without us? None where there is none to ask."""
    script = bundle / "smoke.py"
    if SIMULATED or not script.exists():
        reason = "there is no GPU" if SIMULATED else f"{script} is missing (see docs/gpu.md)"
        print(f"     vllm_smoke was NOT ASKED: {reason}", flush=True)
        return None
    started = time.monotonic()
    logs = Path(os.environ.get("OUT", "/tmp")) / "smoke"
    command = [sys.executable, str(script), "--logs", str(logs)]
    prefix = ""
    if importlib.util.find_spec("vllm") is None:
        prefix, command[0] = f". {shlex.quote(str(bundle / 'activate.sh'))} && ", "python3"
    process = subprocess.Popen(
        ["bash", "-c", prefix + shlex.join(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, ended = process.communicate(timeout=SMOKE_S)[0], ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, ended = process.communicate()[0], f"no end in {SMOKE_S:.0f} s; "
    lines = [line for line in output.strip().splitlines() if not line.startswith("     |")]
    return {
        "name": "vllm_smoke",
        "question": "Does vLLM from the bundle generate?",
        "seconds": round(time.monotonic() - started, 1),
        "output": output,
        "good": process.returncode == 0,
        "text": ended + " / ".join(lines)[:2000],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--jobs", type=int, default=3, help="questions asked at a time")
    parser.add_argument("--timeout-s", type=float, default=75, help="of one question")
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM's smoke script out")
    parser.add_argument("--bundle", type=Path, default=ROOT / "vllm-bundle")
    parser.add_argument("--ask", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--export", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export_pages(*options.export)
    if options.ask:
        return answer_here(options.ask)
    if not SIMULATED and not torch.cuda.is_available():
        print(f"There is no GPU here (torch {torch.__version__}); nothing was asked.")
        return 1
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        together = [name for name in options.only if name not in ALONE]
        for result in pool.map(lambda name: ask(name, options.timeout_s), together):
            results.append(result)
            report(result)
    for name in options.only:
        if name in ALONE:
            results.append(ask(name, options.timeout_s))
            report(results[-1])
    asks_all = options.only == list(QUESTIONS)
    if asks_all and not options.no_vllm and (smoke := run_smoke(options.bundle)):
        results.append(smoke)
        report(smoke)
    missing = [result["name"] for result in results if result["good"] is False]
    print(f"{len(results)} questions, {len(missing)} without the needed yes: {missing}")
    if "OUT" in os.environ:
        folder = Path(os.environ["OUT"])
        (folder / "first_minutes.json").write_text(json.dumps(results, indent=1))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
