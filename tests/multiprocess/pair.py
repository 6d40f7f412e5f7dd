"""Two ranks that a holder outlives."""

import os

from tests.multiprocess.members import meet_all, publish, rank
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.endpoint import Endpoint


class Pair:
    """Two ranks that have met; `end` lets both die."""

    def __init__(self, endpoint: Endpoint, **options: object) -> None:
        self.members = [rank(endpoint, number, **options) for number in range(2)]
        self.fds = [publish(member) for member in self.members]
        self.inodes = [os.fstat(fd).st_ino for fd in self.fds]
        meet_all(self.members)

    def end(self) -> None:
        for member in self.members:
            member.close()
        messages.close_all(self.fds)
