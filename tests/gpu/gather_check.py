"""What `test_gather.py` and the GPU scenario run: the gather kernel against the weights it must make."""

import torch

from gpu_checks.accelerator import accelerator
from gpu_checks.expert_ranks import ExpertShape, local_ranks, same_bytes
from gpu_checks.moe_kernels import Routing
from vllm_dwdp.model_executor import ops


def check_gather() -> None:
    """Routed experts are whole, remote ones that nobody was routed to keep the slot's poison."""
    from benchmarks.expert_gather import ExpertGather

    gpu = accelerator()
    shape = ExpertShape(num_experts=7, hidden_size=256, intermediate_size=704, top_k=2)
    memory = gpu.open_memory()
    with local_ranks(memory, shape, 2, 3) as ranks:
        rank = ranks[1]
        rings = rank.rings()
        tick = torch.zeros(1, device=gpu.device)
        for layer in range(2):
            ops.wait_layer(tick, 0, layer)
        gpu.synchronize()
        view, whole = rings.views[1], rank.whole(1)
        gather = ExpertGather.plan(rank.mapper(), 1, view)
        weights = rank.layout.layers[1].weights
        for seed, num_tokens in ((1, 1), (2, 2), (3, 200)):
            for number, weight in enumerate(weights):
                content = view.tensors[weight.name].view(torch.uint8).flatten()
                for copy in weight.remote_copies(1):
                    content[copy.span.start : copy.span.stop] = 0xFF
                assert view.addresses[number] == content.data_ptr()
            routing = Routing.random(num_tokens, 7, 2, gpu.device, seed)
            gather.launch(routing.topk_ids)
            gpu.synchronize()
            routed = set(routing.topk_ids.flatten().tolist())
            num_remote = 0
            for name, expected in whole.items():
                for expert in range(7):
                    equal = same_bytes(view.tensors[name][expert], expected[expert])
                    remote = any(
                        copy.span.start < (expert + 1) * weight.expert_bytes
                        and copy.span.stop > expert * weight.expert_bytes
                        for weight in weights
                        if weight.name == name
                        for copy in weight.remote_copies(1)
                    )
                    num_remote += remote and expert in routed
                    assert equal == (expert in routed or not remote), (name, expert, num_tokens)
            assert (gather.gathered_bytes(routing.topk_ids) > 0) == (num_remote > 0)
    memory.close()


if __name__ == "__main__":
    check_gather()
    print("ok")
