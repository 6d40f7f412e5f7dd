"""Signals that the process of the tests was started with as ignored."""

import signal

from vllm_dwdp.entrypoints.launch.process import ENDING_SIGNALS


def hear_ignored_signals() -> None:
    """Ignore in this process what it ignores, but not in the programs that it starts.

    A handler that does nothing takes the place of `SIG_IGN`; exec resets handlers to the default.
    """
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
