"""A rank with real shared memory, run by `test_folders` in namespaces of its own, as in a container.

    python -m tests.multiprocess.contained_rank FOLDER RANK

It writes one line of JSON once it has met its peer, and one more for each line it is given.
"""

import json
import os
import sys

from tests.multiprocess.members import rank
from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.distributed.meeting import parse_endpoint

NUM_BYTES = 4096


def main(folder: str, number: int) -> None:
    device = HostDevice()
    with rank(parse_endpoint(f"unix://{folder}"), number, join_timeout_s=30.0) as member:
        kept = next(member.recover(), None)
        if kept is None:
            shard = device.new_shard("contained")
            content = f"from rank {number}".encode()
            mapping = shard.append((NUM_BYTES,))
            os.pwrite(shard.fd, content, 0)
        else:
            shard = device.adopt_shard(Handles(fds=kept.fds, num_bytes=kept.handle_bytes))
            mapping = shard.append((NUM_BYTES,))
        shard.seal()
        handles = shard.export()
        member.publish(handles.fds, handles.num_bytes)
        (peer,) = member.meet().values()
        member.announce_ready(shard.digest())
        member.wait_ready()
        view = device.open_peer(Handles(fds=peer.fds, num_bytes=peer.handle_bytes))
        while True:
            said = {
                "pid": os.getpid(),
                "adopted": kept is not None,
                "own": text_at(mapping.address),
                "peer": text_at(view.address),
                "states": [state.state for state in member.peers().values()],
            }
            print(json.dumps(said), flush=True)
            if not sys.stdin.readline():
                break
        view.close()
        handles.close()
        shard.close()


def text_at(address: int) -> str:
    """Return the text at the beginning of mapped memory."""
    import ctypes

    return ctypes.string_at(address).decode()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
