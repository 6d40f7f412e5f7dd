"""Questions about kernels on expert memory: torch's own, fused-MoE kernels, and one that gathers.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception.
"""

import ctypes
import os
from collections.abc import Mapping
from functools import partial

import torch

from gpu_checks.accelerator import accelerator
from gpu_checks.driver_memory import driver_call
from gpu_checks.expert_ranks import same_bytes
from gpu_checks.moe_kernels import Routing, choose_kernel
from gpu_checks.ring_check import provoke_races
from gpu_checks.views import NUM_LAYERS, SHAPE, group
from vllm_dwdp.model_executor import ops


def torch_on_composites() -> str:
    """Compare torch's products and copies with those on torch's own memory."""
    gpu = accelerator()
    facts = []
    with group(gpu, num_layers=1) as ranks, torch.no_grad():
        rank = ranks[0]
        view, whole = rank.direct_views()[0], rank.whole(0)
        wrong = []
        for name, expected in whole.items():
            tensor = view.tensors[name]
            x = torch.randn(5, tensor.shape[2], device=gpu.device, dtype=torch.bfloat16)
            on_view = torch.matmul(x, tensor.transpose(-1, -2))
            if not same_bytes(on_view, torch.matmul(x, expected.transpose(-1, -2))):
                wrong.append(f"matmul on {name}")
            if not same_bytes(tensor.cpu(), expected.cpu()):
                wrong.append(f"copy of {name} to the host")
            if not same_bytes(tensor.clone(), expected):
                wrong.append(f"copy of {name} on the device")
        assert not wrong, wrong
        address = view.addresses[0]
        if gpu.is_real:
            facts = [
                f"memory type {pointer_attribute(address, 2, ctypes.c_uint())}",
                f"device {pointer_attribute(address, 9, ctypes.c_int())}",
                f"range size {pointer_attribute(address, 12, ctypes.c_size_t())} of "
                f"{rank.layout.layers[0].weights[0].mapped.stop} mapped",
                f"torch says {view.tensors['w13_weight'].device}",
            ]
    return "; ".join(["bitwise as on torch's memory", *facts])


def pointer_attribute(
    address: int, attribute: int, value: ctypes.c_uint | ctypes.c_int | ctypes.c_size_t
) -> str:
    """Return an attribute of an address as the driver knows it; the product does not ask."""
    status = driver_call(
        "cuPointerGetAttribute", ctypes.byref(value), attribute, ctypes.c_uint64(address)
    )
    return str(value.value) if status == 0 else f"status {status}"


def moe_outputs(mode: str) -> str:
    """Run a fused-MoE kernel through the ring, in place and on full weights."""
    gpu = accelerator()
    name, kernel = choose_kernel(SHAPE.num_experts, SHAPE.dtype, gpu.device)
    provoke_races(1000)

    def batch(num_tokens: int) -> tuple[torch.Tensor, Routing]:
        x = torch.randn(num_tokens, SHAPE.hidden_size, device=gpu.device).to(torch.bfloat16)
        return x, Routing.random(num_tokens, SHAPE.num_experts, SHAPE.top_k, gpu.device)

    def output(tensors: Mapping[str, torch.Tensor], x: torch.Tensor, to: Routing) -> torch.Tensor:
        return kernel(x, tensors["w13_weight"], tensors["w2_weight"], to.topk_weights, to.topk_ids)

    with group(gpu) as ranks, torch.no_grad(), gpu.on_stream():
        rank = ranks[0]
        direct, rings = rank.direct_views(), rank.rings()
        x, routing = batch(33)
        through_ring = [torch.zeros_like(x) for _ in range(NUM_LAYERS)]

        def layers(numbers: range) -> None:
            for layer in numbers:
                ops.wait_layer(x, 0, layer)
                through_ring[layer].copy_(output(rings.views[layer].tensors, x, routing))
                ops.record_layer(x, 0, layer)

        layers(range(NUM_LAYERS))
        gpu.synchronize()
        size = {"eager": 0, "piecewise": 1, "full": NUM_LAYERS}[mode]
        starts = range(0, NUM_LAYERS, size) if size else range(0)
        replays = [gpu.capture(partial(layers, range(at, at + size))) for at in starts]
        for _ in range(4):
            for each in through_ring:
                each.fill_(float("nan"))
            for replay in replays or [partial(layers, range(NUM_LAYERS))]:
                replay()
        gpu.synchronize()
        batches = {1: batch(1), 17: batch(17), 33: (x, routing), 300: batch(300)}
        for layer in range(NUM_LAYERS):
            whole = rank.whole(layer)
            for num_tokens, (inputs, to) in batches.items():
                expected = output(whole, inputs, to)
                in_place = output(direct[layer].tensors, inputs, to)
                where = f"layer {layer}, {num_tokens} tokens"
                assert expected.isfinite().all() and expected.abs().sum() > 0, where
                assert same_bytes(in_place, expected), f"{where}, in place"
                if inputs is x:
                    assert same_bytes(through_ring[layer], expected), f"{where}, through the ring"
        gpu.synchronize()
        rings.queue.drain()
    return f"{name}: the same bits"


def gather() -> str:
    """Gather: routed experts become whole, the other remote ones keep the slot's poison."""
    gpu = accelerator()
    if not gpu.is_real:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernel is made
    from gpu_checks.expert_gather import ExpertGather

    num_gathered = 0
    with group(gpu, num_layers=2) as ranks:
        rank = ranks[1]
        rings = rank.rings()
        tick = torch.zeros(1, device=gpu.device)
        for layer in range(2):
            ops.wait_layer(tick, 0, layer)
        gpu.synchronize()
        view, whole = rings.views[1], rank.whole(1)
        kernel = ExpertGather.plan(rank.mapper(), 1, view)
        weights = rank.layout.layers[1].weights
        for seed, num_tokens in ((1, 1), (2, 2), (3, 200)):
            for number, weight in enumerate(weights):
                content = view.tensors[weight.name].view(torch.uint8).flatten()
                for copy in weight.remote_copies(1):
                    content[copy.span.start : copy.span.stop] = 0xFF
                assert view.addresses[number] == content.data_ptr()
            routing = Routing.random(num_tokens, 7, 2, gpu.device, seed)
            kernel.launch(routing.topk_ids)
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
            gathered = kernel.gathered_bytes(routing.topk_ids)
            assert (gathered > 0) == (num_remote > 0)
            num_gathered += gathered
    return f"whole and nothing else; {num_gathered / 2**20:.0f} MiB were gathered"
