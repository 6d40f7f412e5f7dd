"""How a child process begins: no signal is ignored in it, and it ends when its parent does.

A signal that is ignored stays ignored across exec. Shells start background jobs of scripts with SIGINT
ignored, and nohup ignores SIGHUP: without a reset a server that such a job starts could not be
interrupted. Start the child in a session of its own too (`start_new_session`): then neither the
terminal's Ctrl-C nor its hang-up reaches it, only what its parent decides.
"""

import ctypes
import os
import signal
from collections.abc import Callable

ENDING_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


def ending_with(parent: int) -> Callable[[], None]:
    """Make the `preexec_fn` of a child that gets SIGTERM when its parent ends, also by SIGKILL.

    In the child `ENDING_SIGNALS` have their default effect, whatever the parent does with them.

    Args:
        parent: the process id of the caller, whose main thread must be the one that forks.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)

    def begin() -> None:
        # Before the kernel is asked: until exec the parent's handler would swallow the signal.
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended before the kernel was asked
            os._exit(128 + signal.SIGTERM)

    return begin
