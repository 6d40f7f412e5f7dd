"""One worker of a rank that cannot take new weights twice, while the others of the rank can."""

import os
from typing import Any

from vllm_dwdp.executor import worker
from vllm_dwdp.model_executor.incoming import ModelUpdate


def fail() -> None:
    """Let tensor rank 1 of rank 0 fail to read in the second update, and to write in the third."""
    stock_check, stock_finish, num_updates = worker.check_readable, ModelUpdate.finish, 0

    def check(*args: Any) -> None:
        nonlocal num_updates
        num_updates += 1
        if is_here() and num_updates == 2:
            raise OSError("this worker cannot read")
        stock_check(*args)

    def finish(self: ModelUpdate) -> None:
        if is_here() and num_updates == 3:
            raise OSError("this worker cannot write")
        stock_finish(self)

    worker.check_readable = check
    ModelUpdate.finish = finish  # type: ignore[method-assign]


def is_here() -> bool:
    from vllm.distributed import get_tp_group

    return os.environ["VLLM_DP_RANK"] == "0" and get_tp_group().rank_in_group == 1
