"""Everything that is asked of a GPU, in one list, the most valuable first.

A question is a function that returns what it found and fails by an exception, named here by its module
so that listing needs no torch. Its tag says what an answer is worth:

    fact    what the hardware or the driver does; whatever it is, it is no failure
    must    what our code must do
    bench   a measurement

Nothing here has run on a GPU yet (docs/gpu.md).
"""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

Tag = Literal["fact", "must", "bench"]


@dataclass(frozen=True)
class Question:
    """One question, or the same question with several arguments.

    Args:
        cost_s: how long one answer takes on a GPU, roughly.
        function: `module:name` within `gpu_checks`.
        needs: a package beside torch, without which it is skipped.
        alone: whether nothing else may run on the device meanwhile.
        limit_s: no answer in this time is a failure, or of a fact that it hangs.
        simulated: the arguments that can be asked over the fake driver, by default all.
        shares_process: whether cases that follow each other run in one process.
        breaks_context: whether its process cannot end tidily, whatever it found.
        num_gpus: how many GPUs it needs.
    """

    name: str
    tag: Tag
    cost_s: int
    function: str
    text: str
    _: KW_ONLY
    arguments: tuple[str, ...] = ("",)
    needs: str = "torch"
    alone: bool = False
    limit_s: float = 120
    simulated: tuple[str, ...] | None = None
    shares_process: bool = False
    breaks_context: bool = False
    num_gpus: int = 1


@dataclass(frozen=True)
class Case:
    """A question with one of its arguments."""

    question: Question
    argument: str

    @property
    def title(self) -> str:
        """The name that `--only` takes: `name` or `name:argument`."""
        return ":".join(filter(None, (self.question.name, self.argument)))

    def limited_to(self, limit_s: float) -> "Case":
        """Return the case with another limit of time."""
        return replace(self, question=replace(self.question, limit_s=limit_s))

    @property
    def can_be_simulated(self) -> bool:
        """Whether it can be asked over the fake driver."""
        return self.question.simulated is None or self.argument in self.question.simulated


# fmt: off
QUESTIONS: tuple[Question, ...] = (
    # The cheap ones.
    Question("which_device", "must", 8, "driver:which_device",
             "What is here, and do our pages fit its granularity?"),
    Question("killed_exporter", "must", 8, "peer_memory:killed_exporter",
             "Does exported memory outlive `kill -9` of its process: mapped before, imported after?"),
    Question("torch_on_composites", "must", 8, "kernels:torch_on_composites",
             "Do torch's kernels and copies work on a tensor assembled from several allocations?"),
    Question("digest", "must", 10, "views:digest",
             "Has a shard the digest on the device that its bytes have on the host, and how fast?"),
    Question("races", "must", 12, "rings:races",
             "Do late copies never show a kernel foreign bytes, but in rings broken on purpose?",
             arguments=("full", "piecewise", "eager")),
    Question("moe_outputs", "must", 15, "kernels:moe_outputs",
             "Does a fused-MoE kernel give the bits of full weights, through the ring and in place?",
             arguments=("eager", "piecewise", "full")),
    Question("batch_copy_under_capture", "must", 7, "driver:batch_copy_under_capture",
             "Do we refuse to issue into a capture, and what would a graph lack otherwise?"),
    Question("graph_seam", "must", 7, "rings:graph_seam",
             "Do torch's graphs tell a follower of capture and replay?", simulated=()),
    Question("driver_ring", "must", 7, "driver:driver_ring",
             "Do events order late copies and kernels on the bare copy queue?",
             arguments=("one_by_one", "back_to_back")),
    Question("read_only_peers", "must", 10, "peer_memory:read_only_peers",
             "Are views right over peers mapped writable, and can peers be mapped read-only here?",
             breaks_context=True),
    Question("long_copies", "must", 6, "driver:long_copies",
             "Does one copy over several allocations on both sides bring every byte?",
             arguments=("batch", "graph")),
    Question("empty_batch", "must", 6, "driver:empty_batch",
             "Is a batch without copies ready at once?"),
    Question("partial_mappings", "fact", 6, "driver:partial_mappings",
             "May a mapping start within an allocation, or end within it?"),
    Question("capture_misuse", "fact", 7, "driver:capture_misuse",
             "Is each misuse of a capture refused as documented, and the queue usable afterwards?",
             limit_s=30),
    Question("no_join", "must", 12, "rings:no_join",
             "Do copies for later layers leave the pieces before them alone (nothing joins)?",
             alone=True),
    # What copies cost, each with the limit beyond which something else would be built.
    Question("issue_blocked", "fact", 10, "copy_costs:issue_blocked",
             "How long does `issue` hold the host behind a busy stream, by number of copies?",
             alone=True),
    Question("copy_speed", "fact", 12, "copy_speed:copy_speed",
             "How fast are copies by flag, way and size, in the device and from pinned host memory?",
             alone=True),
    Question("capture_nodes", "fact", 15, "copy_costs:capture_nodes",
             "What do graphs of 1 to 127,000 copies cost to capture, to keep and to launch?",
             alone=True),
    Question("value_nodes", "fact", 10, "value_nodes:value_nodes",
             "Could graphs wait for values in the place of holding copies: order, overlap, launch?",
             alone=True, limit_s=30),
    Question("costs", "must", 10, "views:costs",
             "Does the measurement at start, by which `auto` chooses, find credible speeds?",
             alone=True),
    Question("leaks", "must", 12, "views:leaks",
             "Do device memory and descriptors return when a rank closes?", alone=True),
    # Expert memory without an engine.
    Question("views", "must", 20, "views:views",
             "Do both views equal `torch.cat` bit by bit on every rank, with and without redundancy?",
             arguments=("2", "3", "3/6")),
    Question("mixed_modes", "must", 30, "rings:mixed_modes",
             "Are eager, piecewise and full steps and forwards cut short right in any order?",
             arguments=("1", "2")),
    Question("adoption", "must", 20, "views:adoption",
             "Is a shard that is adopted from descriptors after its rank is gone the same memory?"),
    Question("failed_set_up", "must", 20, "views:failed_set_up",
             "Does a set-up that fails half-way give everything back?", alone=True),
    Question("gather", "must", 20, "kernels:gather",
             "Does the gather kernel fetch the routed remote experts, whole, and nothing else?",
             needs="triton"),
    Question("ranks_meet", "must", 25, "ranks:ranks_meet",
             "Do three processes meet and read the same weights, also when one of them is killed?",
             arguments=("and_close", "and_one_is_killed"), needs="msgspec"),
    # Two GPUs.
    Question("peers_apart", "must", 15, "two_gpus:peers_apart",
             "Do two processes that see one GPU each read each other's memory?", num_gpus=2),
    Question("mixed_access", "fact", 10, "two_gpus:mixed_access",
             "May one call set access over allocations of two GPUs?", num_gpus=2),
    Question("in_place_speed", "fact", 20, "two_gpus:in_place_speed",
             "How fast do a reduction and a matrix product read another GPU's memory in place?",
             alone=True, num_gpus=2),
    Question("reread_speed", "fact", 15, "two_gpus:reread_speed",
             "Does this GPU's cache keep lines of another GPU's memory?", alone=True, num_gpus=2),
    Question("peer_copy_speed", "fact", 20, "two_gpus:peer_copy_speed",
             "How fast are copies from another GPU, by chunk and by the number of GPUs that pull?",
             arguments=("chunks", "pullers"), alone=True, num_gpus=2),
    Question("fault_spread", "fact", 20, "two_gpus:fault_spread",
             "Does a kernel fault in a process break peers that map its memory?",
             alone=True, breaks_context=True, num_gpus=2),
    # vLLM.
    Question("vllm_generates", "must", 60, "engines:stock_generates",
             "Does stock vLLM generate here, without us?", needs="vllm", alone=True, limit_s=300),
    Question("dual_batch_overlap", "must", 20, "engines:dual_batch_overlap",
             "Is dual-batch overlap refused, on the configuration that vLLM makes for this device?",
             needs="vllm"),
    Question("engines", "must", 150, "engines:compare_engines",
             "Do two vLLM ranks on one GPU give the weights and tokens of one stock engine?",
             arguments=("eager", "full", "piecewise", "fp8", "auto_default", "full_v1", "default",
                        "async", "drafter"),
             needs="vllm", alone=True, limit_s=300, simulated=("fp8", "auto_default")),
    Question("a_rank_returns", "must", 150, "returning:kill_and_return",
             "Does a killed rank adopt its experts in vLLM, where a second copy has no room?",
             needs="vllm", alone=True, limit_s=300),
    Question("kv_sizing", "must", 150, "kv_sizing:compare_sizes",
             "Does vLLM's KV cache leave room for shards and slots that torch knows nothing of?",
             needs="vllm", alone=True, limit_s=300, simulated=()),
    # Measurements; from pinned host memory first: these decide whether copies are hidden.
    Question("steps", "bench", 25, "bench:steps",
             "What does a step with prefetched experts cost over one that has them all?",
             arguments=(
                 "qwen3-30b-a3b-bf16-host", "mixtral-8x7b-bf16-host",
                 "qwen3-30b-a3b-bf16", "mixtral-8x7b-bf16", "gpt-oss-20b-bf16",
                 "deepseek-v3/64-bf16", "qwen3-30b-a3b-fp8", "mixtral-8x7b-fp8",
                 "gpt-oss-20b-fp8", "deepseek-v3/64-fp8"),
             needs="triton", alone=True, limit_s=110, shares_process=True),
    Question("executors", "bench", 200, "executors:compare_executors",
             "What does a decode step of one process cost over one of an engine and a worker process?",
             needs="vllm", alone=True, limit_s=400, simulated=()),
)
# fmt: on
CASES: dict[str, Case] = {
    case.title: case
    for question in QUESTIONS
    for case in (Case(question, argument) for argument in question.arguments)
}
"""Every question with every argument, by title."""

NAMES = {*CASES, *(question.name for question in QUESTIONS), "fact", "must", "bench"}
"""What `--only` and `--skip` take: titles, names (all their arguments) and tags."""


def choose(only: list[str], skip: list[str]) -> list[Case]:
    """Return the cases to ask, in the order of `only`, or of the list."""

    def expand(names: list[str]) -> dict[str, Case]:
        return {
            title: case
            for name in names
            for title, case in CASES.items()
            if name in (title, case.question.name, case.question.tag)
        }

    skipped = expand(skip)
    chosen = expand(only) if only else CASES
    return [case for title, case in chosen.items() if title not in skipped]
