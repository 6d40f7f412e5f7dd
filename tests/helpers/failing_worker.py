"""One worker of a rank that cannot take new weights, while the others of the rank can."""

import os
from pathlib import Path
from typing import Any

from vllm_dwdp.executor import worker
from vllm_dwdp.model_executor.incoming import ModelUpdate


def fail() -> None:
    """Let tensor rank 1 of rank 0 fail to read what is called `unread`, and to write `unwritten`."""
    stock_check, stock_finish, place = worker.check_readable, ModelUpdate.finish, ""

    def check(vllm_config: Any, model: Any, path: str) -> None:
        nonlocal place
        place = Path(path).name
        if is_here() and place == "unread":
            raise OSError("this worker cannot read")
        stock_check(vllm_config, model, path)

    def finish(self: ModelUpdate) -> None:
        if is_here() and place == "unwritten":
            raise OSError("this worker cannot write")
        stock_finish(self)

    worker.check_readable = check
    ModelUpdate.finish = finish  # type: ignore[method-assign]


def is_here() -> bool:
    from vllm.distributed import get_tp_group

    return os.environ["VLLM_DP_RANK"] == "0" and get_tp_group().rank_in_group == 1
