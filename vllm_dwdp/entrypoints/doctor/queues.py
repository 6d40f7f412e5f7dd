"""Room in /dev/shm for vLLM's queues between an engine and its worker processes.

vLLM asks for the room of each queue when it makes it, ends where there is less, and fills next to
nothing of it: so it is the largest queue that counts. Every stock server on a CPU has a worker process;
on GPUs those of several devices have. A rank of one worker has none, unless its executor is `mp`.
"""

import contextlib
import shutil

from vllm_dwdp.errors import DwdpConfigError

SHM_FOLDER = "/dev/shm"
WORKER_QUEUE_BYTES = 10 * (24 * 2**20 + 4096)
"""Of a worker's answers; the queue of its orders takes 160 MiB."""
ENLARGE = (
    f"mount a larger {SHM_FOLDER}: docker run --shm-size=1g, shm_size: 1gb in a compose file, in "
    "Kubernetes an emptyDir of medium Memory"
)


def free_bytes() -> int:
    """Return how much may be asked for; 0 where nothing is mounted."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(SHM_FOLDER).free
    return 0


def says(free: int) -> str:
    """Return what is there, in words."""
    return f"{free / 2**20:.0f} MiB free in {SHM_FOLDER}"


def check_queues(who: str, free: int) -> None:
    """Refuse to start servers whose vLLM would end at once.

    Args:
        who: has a worker process; for the sentence.
        free: bytes.

    Raises:
        DwdpConfigError: there is too little, with what to change.
    """
    if free < WORKER_QUEUE_BYTES:
        raise DwdpConfigError(
            f"{who} cannot start with {says(free)}: vLLM asks for {WORKER_QUEUE_BYTES / 2**20:.0f} MiB "
            f"for the queue of a worker process. Please {ENLARGE}."
        )
