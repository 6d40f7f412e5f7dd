"""Rings in eager steps, piecewise and full graphs, in any order, on a device that knows what is ordered.

Longer rings than `test_every_order` walks, and what graphs and the host do of a forward.
"""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.prefetch.ordered_device import Model

NUM_SLOTS = 2


@settings(max_examples=150, deadline=None)
@given(num_layers=st.integers(1, 9), data=st.data())
def test_eager_piecewise_and_full_forwards_in_any_order(
    num_layers: int, data: st.DataObject
) -> None:
    model = Model(num_layers)
    for _ in range(data.draw(st.integers(1, 5))):
        cuts = data.draw(st.sets(st.integers(1, max(1, num_layers - 1)), max_size=num_layers))
        edges = [0, *sorted(cut for cut in cuts if cut < num_layers), num_layers]
        stop = data.draw(st.integers(1, len(edges) - 1))  # a forward may be cut short
        for start, end in list(pairwise(edges))[:stop]:
            layers = tuple(range(start, end))
            if data.draw(st.booleans()):
                model.piece(layers)
            else:
                model.run(layers)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 8])
def test_a_full_graph_fetches_its_own_layers_and_the_host_only_wraps_around(
    num_layers: int,
) -> None:
    model = Model(num_layers)
    whole = tuple(range(num_layers))
    model.piece(whole)
    _, graph = model.graphs[whole]
    assert graph.needs == list(range(min(NUM_SLOTS, num_layers)))
    assert graph.fills == list(range(NUM_SLOTS, num_layers))
    repairs, fills = model.eager.counters().repairs, model.eager.counters().fills
    for _ in range(3):
        model.piece(whole)
    assert model.eager.counters().repairs == repairs, "the wrap-around was missing"
    sharing = [len(range(slot, num_layers, NUM_SLOTS)) for slot in range(NUM_SLOTS)]
    per_step = sum(count for count in sharing if count > 1)
    assert model.eager.counters().fills - fills == 3 * per_step


def test_in_piecewise_graphs_the_host_fetches_everything_and_no_piece_joins_a_copy() -> None:
    model = Model(6)
    for _ in range(3):
        for layer in range(6):
            model.piece((layer,))
    for nodes, graph in model.graphs.values():
        assert not graph.fills
        assert [node.kind for node in nodes] == ["read"]
    counters = model.eager.counters()
    assert (counters.repairs, counters.first_fills) == (0, NUM_SLOTS)
