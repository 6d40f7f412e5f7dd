"""What DWDP adds to a vLLM worker: joining the group while the model loads, and refusing to sleep.

Mixed into the CPU and the GPU worker. Runs in the process of the rank, or of its worker.
"""

from contextlib import ExitStack, closing
from typing import Any

import torch

from vllm_dwdp.compat.worker import independent
from vllm_dwdp.device.base import Device
from vllm_dwdp.distributed.launch import Seat
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.executor.identity import open_membership
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.costs import ServedModel
from vllm_dwdp.model_executor.group import ExpertGroup
from vllm_dwdp.model_executor.joining import join_group

logger = init_logger(__name__)


class DwdpWorker:
    """Mixin over `vllm.v1.worker.gpu_worker.Worker` and its subclasses."""

    expert_group: ExpertGroup | None = None

    def make_device(self) -> Device:
        """Open the device that holds this rank's experts."""
        raise NotImplementedError

    @property
    def seat(self) -> Seat:
        """Which rank this is, and what the front end decided."""
        return independent.seat_of(self.vllm_config)  # type: ignore[attr-defined]

    def open_membership(self, undo: ExitStack) -> tuple[Device, Membership]:
        """Open the device and begin to answer the group; `undo` closes both."""
        device = undo.enter_context(closing(self.make_device()))
        vllm_config = self.vllm_config  # type: ignore[attr-defined]
        opened = open_membership(self.seat, vllm_config, device.page_bytes)
        return device, undo.enter_context(opened)

    def load_model(self, **kwargs: Any) -> None:
        """Load the model with this rank's experts only, meet the group, bind all experts."""
        seat = self.seat
        if not seat.launch.config.shares_experts:
            super().load_model(**kwargs)  # type: ignore[misc]
            logger.info("DWDP rank %d holds all experts itself (replica)", seat.rank)
            return

        def load() -> torch.nn.Module:
            super(DwdpWorker, self).load_model(**kwargs)  # type: ignore[misc]
            return self.model_runner.get_model()  # type: ignore[attr-defined]

        self.expert_group = join_group(seat, self.open_membership, load, self._served())

    def _served(self) -> ServedModel:
        vllm_config = self.vllm_config  # type: ignore[attr-defined]
        model = vllm_config.model_config
        config = model.hf_text_config.to_dict()
        quantisation = getattr(model.hf_config, "quantization_config", None)
        if isinstance(quantisation, dict):
            config["quantization_config"] = quantisation
        return ServedModel(
            config=config,
            max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            max_model_len=model.max_model_len,
        )

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; the rank serves afterwards."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self.expert_group is not None:
            self.expert_group.announce_warm()
        return times

    def dwdp_status(self) -> dict[str, Any]:
        """This rank's status, for `collective_rpc("dwdp_status")`."""
        return {"mode": "replica"} if self.expert_group is None else self.expert_group.status()

    def shutdown(self) -> None:
        """Stop the worker, then leave the group."""
        super().shutdown()  # type: ignore[misc]
        if self.expert_group is not None:
            group, self.expert_group = self.expert_group, None
            group.close()

    def _refuse(self, action: str) -> None:
        raise DwdpUnsupportedError(
            f"{action} is not supported with --distributed-executor-backend dwdp: this rank's "
            "experts are mapped by its peers. Restart the ranks instead."
        )

    def sleep(self, *args: Any, **kwargs: Any) -> None:
        """Refused: peers read this rank's experts."""
        self._refuse("sleep mode")

    def wake_up(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as `sleep`."""
        self._refuse("sleep mode")

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused: composite tensors are read-only."""
        self._refuse("reloading weights")

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as `reload_weights`."""
        self._refuse("updating weights")
