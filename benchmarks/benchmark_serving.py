"""`vllm bench serve` for several deployments of one model, in turn: DWDP and what else there is.

    python benchmarks/benchmark_serving.py --model MODEL --deployments dwdp,replica,tp,disagg \
        --dataset-name random --random-input-len 8192 --random-output-len 1024 --request-rate 4 \
        --goodput ttft:2000 tpot:50

Every flag of `vllm bench serve` but those that name a server; `--help` lists them, and ours. It starts
the deployments, measures them round by round with the same requests, writes one JSON file (vLLM's
`--result-dir` and `--result-filename`) and prints a table.
"""

from vllm_dwdp.entrypoints.bench.benchmark_serving import main

if __name__ == "__main__":
    main()
