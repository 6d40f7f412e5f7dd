"""What a rank knows of its peers, and what it therefore answers."""

import pytest

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.messages import Borrow, Failed, Hello
from vllm_dwdp.errors import RendezvousError


@pytest.mark.parametrize("asks_first", ["for its own earlier shard", "for ours"])
def test_a_peer_that_starts_again_has_not_failed(asks_first: str) -> None:
    """It asks what we have of it long before it has loaded and says hello."""
    state = GroupState(0, 2, fingerprint())
    state.answer(Failed(1, 1, "no memory"))
    with pytest.raises(RendezvousError, match="rank 1 of group 0 failed to start: no memory"):
        state.raise_failures(0)
    request = Hello(1, 2, fingerprint())
    state.answer(request if asks_first == "for ours" else Borrow(1, 2, fingerprint(), 1))
    state.raise_failures(0)
    state.answer(Failed(1, 2, "again"))
    with pytest.raises(RendezvousError, match="again"):
        state.raise_failures(0)
