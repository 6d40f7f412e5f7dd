"""What DWDP adds to a vLLM worker: joining the group while the model loads, and new weights with it.

Mixed into the CPU and the GPU worker. Runs in the process of the rank, or of its worker.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace

from vllm_dwdp.compat.worker import checksums, independent, reloading
from vllm_dwdp.compat.worker.signals import end_with_engine, vllm_watches_engine
from vllm_dwdp.device.base import Device
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.launch import Seat
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.errors import DwdpUnsupportedError, WeightUpdateError
from vllm_dwdp.executor.identity import open_membership
from vllm_dwdp.executor.readable import check_readable
from vllm_dwdp.executor.source import follow_revision, reloaded_source
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.costs import ServedModel
from vllm_dwdp.model_executor.group import ExpertGroup
from vllm_dwdp.model_executor.joining import join_group

logger = init_logger(__name__)


class DwdpWorker:
    """Mixin over `vllm.v1.worker.gpu_worker.Worker` and its subclasses."""

    expert_group: ExpertGroup | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_engine()
        super().__init__(*args, **kwargs)

    def make_device(self) -> Device:
        """Open the device that holds this rank's experts."""
        raise NotImplementedError

    @property
    def seat(self) -> Seat:
        """Which worker of which rank this is, and what the front end decided.

        vLLM numbers the workers of an engine; without pipeline stages that is the tensor rank.
        """
        return independent.seat_of(self.vllm_config, self.rank)  # type: ignore[attr-defined]

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
        follow_revision(self.vllm_config, self.expert_group.membership.fingerprint)  # type: ignore[attr-defined]

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
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
        )

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; the rank serves afterwards."""
        vllm_watches_engine()
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self.expert_group is not None:
            self.expert_group.announce_warm()
        return times

    def dwdp_status(self) -> dict[str, Any]:
        """Return this rank's status, for `collective_rpc("dwdp_status")`."""
        return {"mode": "replica"} if self.expert_group is None else self.expert_group.status()

    def shutdown(self) -> None:
        """Stop the worker, then leave the group."""
        super().shutdown()  # type: ignore[misc]
        if self.expert_group is not None:
            group, self.expert_group = self.expert_group, None
            group.close()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, if the weights of the group are whole.

        Raises:
            WeightUpdateError: an update failed half-way, or is under way.
        """
        self.check_weights()
        return super().execute_model(*args, **kwargs)  # type: ignore[misc]

    def check_weights(self) -> None:
        """Check that this rank may run a forward.

        Raises:
            WeightUpdateError: an update failed half-way, or is under way.
        """
        if self.expert_group is not None:
            self.expert_group.weights.check()

    def refusal(self) -> str:
        """Return why this worker must not serve; empty if it may."""
        return "" if self.expert_group is None else self.expert_group.weights.refusal

    def refuse(self, reason: str) -> str:
        """Serve no more, until new weights come: an update failed on some worker of this rank.

        Returns:
            Why this worker does not serve.
        """
        if self.expert_group is None:
            return reason
        weights = self.expert_group.weights
        if not weights.refusal:
            weights.fail(WeightUpdateError(f"not all workers of it took them: {reason}"))
        return weights.refusal

    def reload_weights(
        self,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """As vLLM's; returns once all ranks of the group have reloaded.

        Raises:
            DwdpUnsupportedError: the weights are not those of a checkpoint.
            WeightUpdateError: a rank has not; the sentence says whether this one goes on.
        """
        group = self.expert_group
        given = (weights_iterator, weights_path, is_checkpoint_format)
        if group is None:
            super().reload_weights(*given)  # type: ignore[misc]
            return
        if not is_checkpoint_format:
            raise DwdpUnsupportedError(
                "reload_weights(is_checkpoint_format=False) writes into the tensors of kernels, and "
                "those of the experts lie in the memory of several ranks. Give weights as a checkpoint "
                "has them."
            )
        from_checkpoint = weights_iterator is None
        model = self.get_model()  # type: ignore[attr-defined]
        check = partial(check_readable, self.vllm_config, model, weights_path)  # type: ignore[attr-defined]
        self._begin_update(model, check if from_checkpoint else None)
        with self._failing_group(group):
            super().reload_weights(*given)  # type: ignore[misc]
        group.weights.finish(self._fingerprint if from_checkpoint else None)

    def compute_weight_checksums(self) -> dict[str, str]:
        """As vLLM's, for `/weight_checker`; of experts as kernels read them, not as slots hold them."""
        found: dict[str, str] = super().compute_weight_checksums()  # type: ignore[misc]
        if self.expert_group is None or self.expert_group.views.rings is None:
            return found
        layers = self.expert_group.views.whole_layers()
        return found | checksums.of_layers(found, self.get_model(), layers)  # type: ignore[attr-defined]

    def reset_weights(self) -> None:
        """As vLLM's, which zeroes the weights in place; refused where experts are shared.

        Raises:
            DwdpUnsupportedError: this worker is a rank of a group.
        """
        if self.expert_group is not None:
            raise DwdpUnsupportedError(
                "reset_weights zeroes the tensors of a model in place, and those of the experts lie in "
                "the memory of several ranks. Reload the weights instead."
            )
        super().reset_weights()  # type: ignore[misc]

    def start_weight_update(self) -> None:
        """As vLLM's; returns once all ranks of the group have paused for it."""
        self._start_transfer(self.get_model(), super().start_weight_update)  # type: ignore[misc, attr-defined]

    def start_draft_weight_update(self) -> None:
        """As `start_weight_update`, for the drafter."""
        model = self.get_draft_model()  # type: ignore[attr-defined]
        self._start_transfer(model, super().start_draft_weight_update)  # type: ignore[misc]

    def _start_transfer(self, model: torch.nn.Module | None, start: Callable[[], None]) -> None:
        group = self.expert_group
        if group is None or model is None or self.weight_transfer_engine is None:  # type: ignore[attr-defined]
            start()  # no experts are shared, or vLLM says what is missing
            return
        self._begin_update(model)
        with self._failing_group(group):
            start()

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        with self._failing_group(self.expert_group):
            super().update_weights(*args, **kwargs)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        """As vLLM's; returns once all ranks of the group serve the new weights."""
        with self._failing_group(self.expert_group):
            super().finish_weight_update()  # type: ignore[misc]
        if self.expert_group is not None:
            self.expert_group.weights.finish()

    def _begin_update(
        self, model: torch.nn.Module, check: Callable[[], None] | None = None
    ) -> None:
        """Pause with the group; `check` is of a checkpoint, and None for weights that are none."""
        assert self.expert_group is not None
        building = partial(
            reloading.building,
            self.vllm_config,  # type: ignore[attr-defined]
            self.device,  # type: ignore[attr-defined]
        )
        weights = self.expert_group.weights
        if check is None:
            weights.begin(model, building, from_checkpoint=False)
        else:
            weights.begin(model, building, from_checkpoint=True, check=check)

    @contextmanager
    def _failing_group(self, group: ExpertGroup | None) -> Iterator[None]:
        """While active, an error during an update is the group's."""
        try:
            yield
        except BaseException as error:
            if group is not None and group.weights.is_under_way:
                group.weights.fail(error)
            raise

    def _fingerprint(self) -> Fingerprint:
        """Return what every rank says that has read the same checkpoint, now or at its start."""
        assert self.expert_group is not None
        source = reloaded_source(self.vllm_config)  # type: ignore[attr-defined]
        return replace(self.expert_group.membership.fingerprint, **asdict(source))
