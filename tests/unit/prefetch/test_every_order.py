"""Everything that a ring may meet, walked: until nothing new comes, not for a number of steps.

The state of a ring and of what its device knows is finite (`ordered_device`), so forwards of any number
and kind are covered for rings of one to five layers on one and two slots: eager layers and graphs of any
cut in any mixture, graphs whose capture failed or that were awaited and not launched, layers that are
skipped, forwards that are cut short before or after any wait, kernel or record, and fills that the
driver refuses in their middle. The host is ahead by any number of steps, because nothing here depends
on how far the device has got.

Rings that are broken on purpose show that the walk finds what it is for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.unit.prefetch.broken_rings import (
    EarlyMark,
    EarlyNote,
    FillBeforeRecord,
    ForgottenGraph,
    LateJoin,
    NoAfter,
    NoRecord,
    NoWait,
    RefillBeforeLaunch,
    RepairWithoutRecord,
    WaitBeforeFill,
)
from tests.unit.prefetch.ordered_device import Broken, Model, OrderedDevice
from vllm_dwdp.errors import TransferError
from vllm_dwdp.prefetch.captured_ring import CapturedRing
from vllm_dwdp.prefetch.ring import Ring

Action = tuple[str, int, int, int]
"""What the host does, with the layer, for a graph the layer behind its last one, and which of the fills
that it leads to fails; 0 if none does."""


IDLE, WAITED, RAN = "idle", "waited", "ran"


@dataclass(frozen=True)
class State:
    """Between two actions of the host.

    Args:
        schedule: what it believes of each slot.
        written: what was written last in each.
        is_read: whether it was read since.
        known: what the device has ordered.
        layer: next layer of the forward; the last was run if it is the number of layers.
        phase: of that layer.
    """

    schedule: tuple[tuple[int | None, int | None], ...]
    written: tuple[int | None, ...]
    is_read: tuple[bool, ...]
    known: tuple[int, ...]
    layer: int = 0
    phase: str = IDLE

    @classmethod
    def of(cls, model: Model, layer: int, phase: str) -> "State":
        """Return the state of a model."""
        device = model.device
        return cls(
            model.eager._schedule.state,
            tuple(device.holds),
            tuple(device.is_read),
            tuple(device.known),
            layer,
            phase,
        )

    def put_into(self, model: Model) -> None:
        """Bring a model back to it."""
        model.eager._schedule.state = self.schedule
        model.device.holds[:] = self.written
        model.device.is_read[:] = self.is_read
        model.device.known[:] = self.known


def actions(state: State, num_layers: int) -> Iterator[Action]:
    """All that may come next. Any forward may end here, and the next begin, with its hook or without."""
    layer = state.layer
    yield "cut short", 0, 0, 0
    for fails_in in range(3):
        yield "begin", 0, 0, fails_in
        if state.phase == RAN:
            yield "record", layer, 0, fails_in
        elif state.phase == IDLE and layer < num_layers:
            yield "wait", layer, 0, fails_in
            for stop in range(layer + 1, num_layers + 1):
                yield "graph", layer, stop, fails_in
                yield "await a graph", layer, stop, fails_in
    if state.phase == WAITED:
        yield "kernels", layer, 0, 0
    elif state.phase == IDLE and layer < num_layers:
        yield "skip", layer, 0, 0


def act(model: Model, action: Action) -> tuple[int, str]:
    """Do it; the layer that comes next and its phase. A fill that fails ends the forward."""
    name, layer, stop, model.device.fails_in = action
    try:
        return act_out(model, name, layer, stop)
    except TransferError:
        return 0, IDLE
    finally:
        model.device.fails_in = 0


def act_out(model: Model, name: str, layer: int, stop: int) -> tuple[int, str]:
    match name:
        case "begin":
            model.ring.begin_forward()
            return 0, IDLE
        case "cut short":
            return 0, IDLE
        case "wait":
            model.ring.wait(layer)
            return layer, WAITED
        case "kernels":
            model.device.kernels(layer)
            return layer, RAN
        case "record":
            model.ring.record(layer)
            return layer + 1, IDLE
        case "graph":
            model.piece(tuple(range(layer, stop)))
            return stop, IDLE
        case "await a graph":
            _, graph = model.graph_of(tuple(range(layer, stop)))
            model.ring.before_launch(graph)
            return 0, IDLE  # the launch failed
    return layer + 1, IDLE


@dataclass
class Walk:
    """What was walked.

    Args:
        num_states: that can be reached; the walk ends at the first that is broken.
        num_steps: actions tried.
        broken: what is wrong there; empty if nothing is anywhere.
        path: the shortest way there.
    """

    num_states: int
    num_steps: int
    broken: str = ""
    path: tuple[Action, ...] = ()


CameFrom = dict[State, tuple[State, Action] | None]


def path_to(state: State, came_from: CameFrom) -> tuple[Action, ...]:
    """Return the actions that lead to a state."""
    before = came_from[state]
    return () if before is None else (*path_to(before[0], came_from), before[1])


def walk(model: Model) -> Walk:
    """Try every action in every state that can be reached, breadth first."""
    start = State.of(model, 0, IDLE)
    came_from: CameFrom = {start: None}
    pending, steps = [start], 0
    for state in pending:
        for action in actions(state, model.num_layers):
            steps += 1
            state.put_into(model)
            try:
                layer, phase = act(model, action)
            except Broken as error:
                way = (*path_to(state, came_from), action)
                return Walk(len(came_from), steps, str(error), way)
            reached = State.of(model, layer, phase)
            if reached not in came_from:
                came_from[reached] = (state, action)
                pending.append(reached)
    return Walk(len(came_from), steps)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_nothing_that_a_forward_may_do_breaks_a_ring(num_slots: int) -> None:
    for num_layers in range(1, 6):
        walked = walk(Model(num_layers, num_slots))
        print(f"{num_slots} slots, {num_layers} layers: {walked}")
        assert not walked.broken, walked
        if num_slots == 2:
            assert walked.num_states > 5 * num_layers, "hardly anything was walked"


BROKEN = [
    (Model(3, device=NoWait), "does not wait for its copies"),
    (Model(3, device=NoRecord), "enqueued before the record"),
    (Model(3, device=NoAfter), "race with kernels"),
    (Model(3, device=EarlyMark), "race with kernels"),
    (Model(3, device=LateJoin), "does not wait for its copies"),
    (Model(3, ring=FillBeforeRecord), "enqueued before the record"),
    (Model(3, ring=WaitBeforeFill), "is enqueued before its fill"),
    (Model(3, ring=RepairWithoutRecord), "enqueued before the record"),
    (Model(3, ring=EarlyNote), "reads layer -1|is enqueued before its fill"),
    (Model(3, captured_ring=RefillBeforeLaunch), "enqueued before the record|reads layer"),
    (Model(3, captured_ring=ForgottenGraph), "is enqueued before its fill"),
]


@pytest.mark.parametrize(
    ("model", "expected"),
    BROKEN,
    ids=[
        part.__name__
        for model, _ in BROKEN
        for part in (type(model.device), type(model.eager), type(model.ring))
        if part not in (OrderedDevice, Ring, CapturedRing)
    ],
)
def test_a_ring_that_is_broken_is_found_out(model: Model, expected: str) -> None:
    walked = walk(model)
    print(walked)
    assert any(words in walked.broken for words in expected.split("|")), walked
    assert walked.path
