"""The GPUs of this machine and how they reach each other, read through nvidia-ml-py (NVML).

Reading (`find_topology`) and judging (`doctor.gpu_findings`) are apart: no GPU was at hand
where this was written, so only the judging has been tested with real code; the reading has been
tested against a stand-in with the names and constants of nvidia-ml-py.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
P2P_READ = 0  # NVML_P2P_CAPS_INDEX_READ, which nvidia-ml-py defines as a tuple by mistake
P2P_NVLINK = 2
P2P_OK = 0
FABRIC_STATES = ("none", "not started", "in progress", "completed")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Args:
        name: as NVML gives it.
        fabric: state of its registration with an NVLink fabric; `none` without one.
        clique: cluster and clique of the fabric; GPUs of one clique reach each other.
    """

    name: str
    fabric: str = "none"
    clique: str = ""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What NVML says of this machine.

    Args:
        cuda_version: the newest that the driver supports, e.g. 12080.
        gpus: by index.
        readable: pairs (a, b), a < b, that can read each other's memory.
        linked: those of them that do so over NVLink.
        imex_channels: that this process may open.
    """

    cuda_version: int
    gpus: tuple[Gpu, ...]
    readable: frozenset[tuple[int, int]]
    linked: frozenset[tuple[int, int]]
    imex_channels: tuple[str, ...]

    def pairs(self, gpus_of_a_rank: int = 1) -> list[tuple[int, int]]:
        """All pairs of GPUs whose workers share experts: those of one tensor rank."""
        count = range(len(self.gpus))
        return [
            (first, second)
            for first in count
            for second in range(first + gpus_of_a_rank, len(count), gpus_of_a_rank)
        ]


def has_driver() -> bool:
    """Say whether an NVIDIA driver is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def one_gpu_each(
    num_ranks: int,
    environment: Mapping[str, str],
    count: int,
    decode: Sequence[int] = (),
    gpus_of_a_rank: int = 1,
) -> list[dict[str, str]]:
    """Return what to add to the environment of each server, so that it sees its own GPUs.

    Rank n has the n-th, or the n-th few in a row: workers of one tensor rank are equally far apart then.

    Args:
        num_ranks: ranks.
        gpus_of_a_rank: one for each of its workers.
        decode: how many of the next GPUs each decode server beside the ranks takes.
        environment: of this process; its `CUDA_VISIBLE_DEVICES` says which GPUs may be used.
        count: GPUs of this machine; without any, ranks run on the CPU and get nothing.

    Raises:
        DwdpConfigError: there are fewer GPUs than that.
    """
    if count == 0:
        return [{}] * (num_ranks + len(decode))
    chosen = environment.get(VISIBLE_DEVICES)
    usable = chosen.split(",") if chosen else [str(index) for index in range(count)]
    sizes = [gpus_of_a_rank] * num_ranks + list(decode)
    if len(usable) < sum(sizes):
        where = f"{VISIBLE_DEVICES}={chosen}" if chosen else "this machine"
        beside = decode and (
            f" and --decode-servers {len(decode)} need {sum(sizes)} GPUs, {decode[0]} for each of "
            "these"
        )
        each = "one" if gpus_of_a_rank == 1 else gpus_of_a_rank
        raise DwdpConfigError(
            f"--ranks {num_ranks}{beside or ''}: {where} has {len(usable)} GPUs, and every rank needs "
            f"{each} of its own. Use fewer ranks, or make more GPUs visible."
        )
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        {VISIBLE_DEVICES: ",".join(usable[start : start + size])}
        for start, size in zip(starts, sizes, strict=True)
    ]


def count_gpus() -> int:
    """Count the GPUs of this machine: 0 without a driver or where the driver finds no device.

    Raises:
        DwdpConfigError: there is a driver, and nvidia-ml-py to ask it is not installed.
    """
    if not has_driver():
        return 0
    try:
        import pynvml
    except ImportError as error:
        raise DwdpConfigError(
            "this machine has an NVIDIA driver, and nvidia-ml-py, which counts its GPUs, is not "
            "installed. Install it with `pip install nvidia-ml-py` (the extra `cuda`)."
        ) from error
    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        # Containers may have the driver's library without a device; a rank that needs one says so.
        logger.warning(
            "DWDP gives no rank a GPU: the NVIDIA driver does not answer (%s). See nvidia-smi",
            error,
        )
        return 0


def find_topology(nvml: Any, imex_channels: Path = IMEX_CHANNELS) -> Topology:
    """Ask NVML; `nvml` is the module `pynvml`.

    Raises:
        pynvml.NVMLError: the driver does not answer.
    """
    nvml.nvmlInit()
    try:
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
        ]
        pairs = [(a, b) for a in range(len(handles)) for b in range(a + 1, len(handles))]

        def works(pair: tuple[int, int], kind: int) -> bool:
            first, second = (handles[index] for index in pair)
            return all(
                nvml.nvmlDeviceGetP2PStatus(reader, owner, kind) == P2P_OK
                for reader, owner in ((first, second), (second, first))
            )

        readable = [pair for pair in pairs if works(pair, P2P_READ)]
        return Topology(
            cuda_version=nvml.nvmlSystemGetCudaDriverVersion(),
            gpus=tuple(_describe(nvml, handle) for handle in handles),
            readable=frozenset(readable),
            linked=frozenset(pair for pair in readable if works(pair, P2P_NVLINK)),
            imex_channels=_open_channels(imex_channels),
        )
    finally:
        nvml.nvmlShutdown()


def _describe(nvml: Any, handle: Any) -> Gpu:
    name = nvml.nvmlDeviceGetName(handle)
    name = name.decode() if isinstance(name, bytes) else name
    info = nvml.c_nvmlGpuFabricInfo_t()
    try:
        nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
    except nvml.NVMLError:
        return Gpu(name=name)
    if info.state == 0:
        return Gpu(name=name)
    state = FABRIC_STATES[info.state] if info.state < len(FABRIC_STATES) else str(info.state)
    return Gpu(name=name, fabric=state, clique=f"{bytes(info.clusterUuid).hex()}/{info.cliqueId}")


def _open_channels(folder: Path) -> tuple[str, ...]:
    """List the IMEX channels that this process may open; fabric handles are imported through one."""
    if not folder.is_dir():
        return ()
    return tuple(
        sorted(path.name for path in folder.iterdir() if os.access(path, os.R_OK | os.W_OK))
    )
