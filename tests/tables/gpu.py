"""Features that no CPU can run: the rows that no test carries, with the command that asks a GPU.

docs/gpu.md says what each check asks, and what else is unverified.
"""

CHECK = "python3 -m gpu_checks --only "

WAITS_FOR_A_GPU = {
    "CUDA graphs, full and piecewise": "engines",
    "CUDA graphs in breakable pieces": "engines",
    "torch.compile on a GPU": "engines",
    "Model runners V1 and V2 on a GPU": "engines",
    "Asynchronous scheduling": "engines:async",
    "Speculative decoding with a draft model, on a GPU": "engines:drafter",
    "FP8 experts with a GPU kernel": "engines:fp8",
    "Mode `auto` on a GPU": "engines:auto_default",
    "Worker processes (`executor` `mp`) under asynchronous scheduling": "executors",
    "KV cache sizing beside shards and slots": "kv_sizing",
    "A killed rank returns to its GPU": "a_rank_returns",
    "Dual-batch overlap is refused on a GPU": "dual_batch_overlap",
}
"""Row to checks of `gpu_checks`."""
