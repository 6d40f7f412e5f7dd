"""How the only API server of a front end spreads requests over its ranks, without vLLM's coordinator.

With several API servers none knows what the others have sent, and a process of its own tells all of
them how busy each rank is. One alone hears that from the ranks, with their outputs.
"""

from typing import Any

from vllm.v1.engine.core_client import DPLBAsyncMPClient


class OnlyClient(DPLBAsyncMPClient):
    """Sends a request to the rank with the least to do: what it has sent, and what the rank said."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM wakes ranks that wait for each other; independent ranks run when they have requests.
        self.engines_running = True
        self._said = [[0, 0, 0.0] for _ in self.core_engines]

    def _ensure_stats_update_task(self) -> None:
        """No process publishes them."""

    def get_core_engine_for_request(self, request: Any) -> Any:
        """As vLLM's, which adds to a count until the next one is published: ours is exact."""
        self.lb_engines = [list(counts) for counts in self._said]
        return super().get_core_engine_for_request(request)

    @staticmethod
    async def process_engine_outputs(client: Any, outputs: Any) -> None:
        """As vLLM's; also note how busy the rank is."""
        await DPLBAsyncMPClient.process_engine_outputs(client, outputs)
        if stats := outputs.scheduler_stats:
            said = [stats.num_waiting_reqs, stats.num_running_reqs, stats.kv_cache_usage]
            client._said[outputs.engine_index - client.engine_ranks_managed[0]] = said
