"""New weights for this rank, together with its group: from the first pause to the first forward after.

::

    pause, lock -> take weights -> write experts -> all have written -> copy edges -> all are whole
        -> small tensors and slots anew -> serve

Whatever fails once all ranks are locked leaves this rank refusing to serve, until an update succeeds or
the group is restarted. Worker's main thread, while no forward runs.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import msgspec
import torch

from vllm_dwdp.compat.worker import checkpoint_reader, moe, reloading
from vllm_dwdp.device.base import Device, Mapping
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.errors import WeightUpdateError
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.arrivals import Arrivals
from vllm_dwdp.model_executor.expert_shard import ExpertShard
from vllm_dwdp.model_executor.incoming import ModelUpdate
from vllm_dwdp.model_executor.peers import PeerShards
from vllm_dwdp.model_executor.start_cost import StartCost
from vllm_dwdp.model_executor.views import ExpertViews

logger = init_logger(__name__)


class WeightRenewal:
    """Writes new weights into the memory of a rank that has joined its group.

    Args:
        device: that holds the experts.
        membership: agrees with the peers.
        shard: this rank's.
        layout: of all experts over the group.
        views: whose slots hold copies.
    """

    def __init__(
        self,
        device: Device,
        membership: Membership,
        shard: ExpertShard,
        layout: ModelLayout,
        views: ExpertViews,
    ) -> None:
        self._device = device
        self._membership = membership
        self._shard = shard
        self._layout = layout
        self._views = views
        self._begun: tuple[ModelUpdate, Mapping, Arrivals, ExitStack] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether weights are awaited."""
        return self._begun is not None

    @property
    def refusal(self) -> str:
        """Why this rank must not serve; empty if it may."""
        return self._membership.weights.refusal

    def check(self) -> None:
        """Check that this rank may run a forward.

        Raises:
            WeightUpdateError: it must not, and the sentence says what to do.
        """
        if self._begun is not None:
            raise WeightUpdateError(
                "this rank is taking new weights. Call finish_weight_update before it serves"
            )
        if refusal := self.refusal:
            raise WeightUpdateError(refusal)

    def begin(
        self,
        model: torch.nn.Module,
        building: Callable[[], AbstractContextManager[None]],
        *,
        from_checkpoint: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Pause together with the group, and let `model` take new weights, as vLLM reloads them.

        Args:
            building: in which vLLM builds and processes layers.
            from_checkpoint: whether `finish` says what the weights are; else what comes is digested.
            check: raises if this rank cannot take them; then all go on with the weights that they have.

        Raises:
            WeightUpdateError: not all ranks came; the sentence says whether this one goes on.
        """
        if self._begun is not None:
            raise WeightUpdateError(
                "this rank is taking new weights already. Call finish_weight_update before the next "
                "update"
            )
        self._device.synchronize()
        if self._views.rings is not None:
            self._views.rings.synchronize()
        self._membership.weights.lock(check)
        try:
            with ExitStack() as undo:
                mapping = self._shard.memory.map_writable()
                undo.callback(mapping.unmap)
                before = "" if from_checkpoint else self._membership.fingerprint.checkpoint_digest
                arrivals = Arrivals(before)
                update = ModelUpdate(self._shard, self._layout, model, mapping.address, building)
                undo.callback(update.abandon)
                undo.enter_context(
                    reloading.watched_loading(model, update.begin_loading, arrivals.note)
                )
                undo.enter_context(checkpoint_reader.mapped_experts())
                undo.enter_context(
                    checkpoint_reader.split_experts(
                        lambda: any(
                            moe.copies_fused_tensors(each.layer) for each in self._shard.layers
                        )
                    )
                )
                self._begun = update, mapping, arrivals, undo.pop_all()
        except BaseException as error:
            self.fail(error)
            raise

    def finish(self, fingerprint_of: Callable[[], Fingerprint] | None = None) -> None:
        """Write what has come, agree with the group, and serve with it.

        Args:
            fingerprint_of: what a rank that is started with these weights will say it is; None for
                weights that are no checkpoint.

        Raises:
            DwdpError: something failed; this rank refuses to serve.
        """
        assert self._begun is not None
        update, mapping, arrivals, opened = self._begun
        try:
            update.finish()
            if not arrivals.digests:
                raise WeightUpdateError(
                    "no weights came by way of the model's load_weights; a transfer that writes into "
                    "its tensors itself cannot renew shared experts. Use the backend nccl or ipc"
                )
            if fingerprint_of is None:
                before = self._membership.fingerprint
                fingerprint = msgspec.structs.replace(before, checkpoint_digest=arrivals.identity())
            else:
                fingerprint = fingerprint_of()
            self._agree(update, mapping, fingerprint)
        except BaseException as error:
            self.fail(error)
            raise
        self._begun = None
        opened.close()  # unmaps what was writable; nothing is abandoned, all is in place
        logger.info(
            "DWDP rank %d serves update %d of its group's weights (%s)",
            self._shard.dwdp_rank,
            self._membership.weights.update,
            fingerprint.checkpoint_digest[:19],
        )

    def fail(self, error: BaseException) -> None:
        """Refuse to serve, and put vLLM's layers back."""
        begun, self._begun = self._begun, None
        last = "" if begun is None else begun[2].last
        self._membership.weights.fail(error, last)
        logger.error("DWDP: %s", self.refusal)
        if begun is not None:
            begun[-1].close()

    def _agree(self, update: ModelUpdate, mapping: Mapping, fingerprint: Fingerprint) -> None:
        shard, layout, weights = self._shard, self._layout, self._membership.weights
        for entry in shard.published:
            entry.facts = update.facts.get(entry.layer.layer_name, entry.facts)
        facts = shard.layout_facts()
        private = shard.private_tensors(layout)
        private.publish(mapping.address + layout.composite_bytes[shard.dwdp_rank])
        self._device.synchronize()  # peers read our experts as soon as we say so
        weights.agree(hashlib.sha256(fingerprint.checkpoint_digest.encode() + facts).digest())
        peers = PeerShards(self._device, layout, facts, StartCost())
        with ExitStack() as undo:
            undo.callback(peers.close)
            peers.map_all(
                {
                    rank: replace(held, layout=facts, is_lent=False)
                    for rank, held in self._membership.held().items()
                }
            )
            shard.copy_edges(layout, peers.mapped, mapping.address)
            self._device.synchronize()
            said = weights.complete(shard.memory.digest())
            private.complete(peers.mapped)
            self._device.synchronize()
        if self._views.rings is not None:
            self._views.rings.forget()
        weights.finish(fingerprint, facts, said)
