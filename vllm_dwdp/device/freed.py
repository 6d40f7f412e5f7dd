"""Memory of a device that a dead process still holds: a start waits until the driver has it back.

A process that was killed is gone before its memory on a GPU is. vLLM looks once how much is free, and
refuses to start with less than its share of the device.
"""

import time

from vllm_dwdp.device.base import Device
from vllm_dwdp.logger import format_gib, init_logger

logger = init_logger(__name__)

WAIT_S = 60.0
STEADY_S = 10.0
"""So long may nothing be freed before it is taken for what others need."""
POLL_S = 0.25


def wait_until_freed(device: Device, num_bytes: int, rank: int) -> None:
    """Return once `num_bytes` of the device are free, nothing is freed any more, or it took too long.

    The code that asks for the memory says what is wrong with less.
    """
    began = freed_at = time.monotonic()
    before = free = device.memory_info()[0]
    if free >= num_bytes:
        return
    logger.info(
        "DWDP rank %d waits for memory of its device, which a dead process may still hold: "
        "%s free, %s needed. %s",
        rank,
        format_gib(free),
        format_gib(num_bytes),
        device.users(),
    )
    while free < num_bytes and (now := time.monotonic()) < min(freed_at + STEADY_S, began + WAIT_S):
        time.sleep(POLL_S)
        free, before = device.memory_info()[0], free
        freed_at = now if free > before else freed_at
    logger.info(
        "DWDP rank %d waited %.1f s for memory of its device: %s free%s",
        rank,
        time.monotonic() - began,
        format_gib(free),
        "" if free >= num_bytes else f", {format_gib(num_bytes)} needed. {device.users()}",
    )
