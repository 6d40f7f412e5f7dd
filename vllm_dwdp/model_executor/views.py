"""Which way the layers of a rank see all experts: in place, through a prefetch ring, or either.

Built once at start from the mapped memory, in the worker's main thread. A device whose copies run beside
the kernels has both views; then each forward takes the one that suits its size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from vllm_dwdp.compat.worker.reachable import reachable_tensors
from vllm_dwdp.errors import DwdpMemoryError, DwdpUnsupportedError
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView
from vllm_dwdp.model_executor.measure import check_views
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.model_executor.routed_experts import Binding, RingPosition
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer
from vllm_dwdp.prefetch.mode_policy import Mode, ModePolicy

logger = init_logger(__name__)


class ExpertViews:
    """The views of one rank, of which one is in place at any time.

    Args:
        layers: of the rank, in the order of the layout.
        bindings: what each layer serves from in each mode, in the order of `layers`; the layers serve
            from those of the last mode.
        policy: chooses between the modes.
        rings: of the prefetch mode; None where nothing is copied.
    """

    def __init__(
        self,
        layers: Sequence[ShardedLayer],
        bindings: Mapping[Mode, Sequence[Binding]],
        policy: ModePolicy,
        rings: PrefetchRings | None,
    ) -> None:
        assert policy.modes == set(bindings)
        self.policy = policy
        self.rings = rings
        self._layers = layers
        self._bindings = bindings
        self._mode = list(bindings)[-1]

    @property
    def mode(self) -> Mode:
        """The mode whose view is in place."""
        return self._mode

    def begin_forward(self, num_tokens: int) -> Mode:
        """Put the view for a forward of `num_tokens` in place; returns the mode that it runs in."""
        if len(self._bindings) > 1:
            self._use(self.policy.mode_for(num_tokens))
        if self.rings is not None and self._mode is Mode.PREFETCH:
            self.rings.begin_forward()
        return self._mode

    def whole_layers(self) -> Iterator[Any]:
        """Yield vLLM's layers, each while its tensors read all its experts. No forward runs meanwhile.

        A tensor over a slot reads the layer that the slot holds, so slots are filled layer by layer.
        """
        if Mode.DIRECT in self._bindings:
            self._use(Mode.DIRECT)
        for index, entry in enumerate(self._layers):
            if self._mode is Mode.PREFETCH and self.rings is not None:
                self.rings.hold(index)
            yield entry.layer

    def check_all_follow(self) -> None:
        """Prove that no tensor which was made since the views were bound lies over one of them.

        Such a tensor would stay where it is when another view is put in place.

        Raises:
            DwdpUnsupportedError: a kernel made one in its first forwards.
        """
        if len(self._bindings) < 2:
            return
        for index, entry in enumerate(self._layers):
            bound = [pair for listed in self._bindings.values() for pair in listed[index].tensors]
            known = {id(tensor) for tensor, _ in bound}
            addresses = {placed.untyped_storage().data_ptr() for _, placed in bound}
            for path, tensor in reachable_tensors(entry.layer).items():
                is_over = tensor.untyped_storage().data_ptr() in addresses
                if is_over and id(tensor) not in known:
                    raise DwdpUnsupportedError(
                        f"{entry.layer.layer_name}: {path} was made over the experts in a first "
                        "forward, so it would not follow when a step reads them another way. Set dwdp "
                        'mode to "direct" or "prefetch" instead of "auto".'
                    )

    def _use(self, mode: Mode) -> None:
        if mode is not self._mode:
            for entry, binding in zip(self._layers, self._bindings[mode], strict=True):
                entry.layer.use(binding)
            self._mode = mode


def bind_views(
    mapper: CompositeMapper, policy: ModePolicy, slice_bytes: int | None, undo: ExitStack
) -> ExpertViews:
    """Map the views that `policy` chooses between, and bind every layer to them.

    Args:
        mapper: of this rank; it maps into `undo`.
        slice_bytes: size of one copy; None for the device's, 0 for whole runs.
        undo: closes the rings.
    """
    indices = range(len(mapper.layout.layers))
    direct: Sequence[LayerView] = ()
    rings: PrefetchRings | None = None
    if Mode.DIRECT in policy.modes:
        direct = _map_in_place(mapper, undo, is_needed=Mode.PREFETCH not in policy.modes)
        policy = policy if direct else policy.without_direct()
    if Mode.PREFETCH in policy.modes:
        rings = PrefetchRings(mapper, ring_members(mapper.layers), slice_bytes)
        undo.callback(rings.close)
    if rings is not None and direct:
        _check_a_fill(mapper, rings, direct)
    bindings: dict[Mode, list[Binding]] = {}
    if direct:
        bindings[Mode.DIRECT] = [_bind(mapper.layers[n], direct[n]) for n in indices]
    if rings is not None:
        bindings[Mode.PREFETCH] = [
            _bind(mapper.layers[n], rings.views[n], rings.positions[n]) for n in indices
        ]
    return ExpertViews(mapper.layers, bindings, policy, rings)


def _map_in_place(
    mapper: CompositeMapper, undo: ExitStack, *, is_needed: bool
) -> Sequence[LayerView]:
    """Return the direct view of every layer, or of none where the device refuses one.

    Raises:
        DwdpMemoryError: it refuses one, and no other view can serve instead.
    """
    try:
        with ExitStack() as mapped:
            each = replace(mapper, resources=mapped)
            views = [each.direct_view(index) for index in range(len(mapper.layout.layers))]
            undo.push(mapped.pop_all())
            return views
    except DwdpMemoryError as error:
        if is_needed:
            raise DwdpMemoryError(
                f'peers\' experts cannot be mapped in place, as dwdp mode "direct" needs: {error}. '
                'Set dwdp mode to "prefetch", which copies them.'
            ) from error
        logger.warning(
            "DWDP rank %d copies experts in every step, because they cannot be mapped in place: %s",
            mapper.dwdp_rank,
            error,
        )
        return ()


def _bind(
    sharded: ShardedLayer, view: LayerView, ring_position: RingPosition | None = None
) -> Binding:
    """Put the layer's tensors over the memory of a view; the layer serves from it at once."""
    binding = Binding(
        tensors=tuple(
            (placed.tensor, view.tensors[placed.path])
            for weight in sharded.weights
            for placed in weight.tensors
        ),
        ring_position=ring_position,
    )
    sharded.layer.use(binding)
    return binding


def ring_members(layers: Sequence[ShardedLayer]) -> list[list[int]]:
    """Return indices into `layers` of each model's layers, in the order in which they run."""
    rings: dict[int, list[int]] = {}
    for index in sorted(range(len(layers)), key=lambda index: layers[index].run_index):
        rings.setdefault(layers[index].model_number, []).append(index)
    return list(rings.values())


def _check_a_fill(
    mapper: CompositeMapper, rings: PrefetchRings, direct: Sequence[LayerView]
) -> None:
    """Fetch the first layer that has remote pages, and compare it in both views."""
    layers, rank = mapper.layout.layers, mapper.dwdp_rank
    index = next((n for n, layer in enumerate(layers) if layer.remote_bytes(rank)), None)
    if index is not None:
        rings.hold(index)
        weights = [weight.name for weight in layers[index].weights]
        check_views(layers[index].name, weights, direct[index], rings.views[index])
