"""The threads that compute beside a thread of this process: OpenMP's, and where the kernel may run them.

A runtime binds its threads by variables that it reads when it is loaded, and torch has loaded it before
a rank knows its cores. So each thread of the team binds itself, in a parallel region of the runtime that
torch's kernels call: GNU's, or Intel's and LLVM's, which have the same entry point.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """While active, this thread stays on `core`; the threads that it starts before or after do not."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_team(cores: Sequence[int]) -> None:
    """Keep each thread that computes for this one on a core of its own: the n-th on the n-th of `cores`.

    This thread is the first, and stays as free as it is: use `on_core` while it computes. A team belongs
    to the thread that computes with it, and lives as long as no smaller one is asked for; torch asks for
    none (`num_threads` clauses are avoided in ATen/ParallelOpenMP.h).

    Where the runtime has no such entry point, threads are left to the kernel's scheduler, and a warning
    says so.
    """
    if len(cores) == 1:
        return
    try:
        runtime = ctypes.CDLL(None)
        parallel, number = runtime.GOMP_parallel, runtime.omp_get_thread_num
    except AttributeError as error:
        logger.warning("DWDP cannot pin the threads of this OpenMP runtime to cores: %s", error)
        return

    def pin(_: object) -> None:
        if thread := number():
            os.sched_setaffinity(0, {cores[thread]})

    parallel(_Body(pin), None, ctypes.c_uint(len(cores)), ctypes.c_uint(0))
