"""In the place of vLLM's FP8 kernels where there is no GPU: vLLM's CPU build has them for AMX only.

Everything before the kernel is vLLM's: the config, the parameters, their loading. So what a CPU can show
of FP8 is that weights and scales are sharded, assembled and read together; nothing about a kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F

from gpu_checks.number_formats import FP8_BLOCK


def install() -> None:
    """Let vLLM build the stand-in from now on."""
    from vllm.model_executor.layers.quantization import fp8

    class Fp8MoEMethod(fp8.Fp8MoEMethod):
        """vLLM's method with products in float32, expert by expert."""

        is_monolithic = False

        def _setup_kernel(self, layer: Any, *weights: torch.Tensor | None) -> None:
            self._init_moe_kernel(layer)

        def _init_moe_kernel(self, layer: Any) -> None:
            """Keep the scales, as vLLM's kernels do: a layer that changes its view must change them."""
            self.scales = layer.w13_weight_scale_inv, layer.w2_weight_scale_inv

        def apply(
            self,
            layer: Any,
            x: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            *_: Any,
            **__: Any,
        ) -> torch.Tensor:
            output = torch.zeros(x.shape, dtype=torch.float32)
            for expert in topk_ids.unique().tolist():
                tokens, place = (topk_ids == expert).nonzero(as_tuple=True)
                w13 = dequantised(layer.w13_weight[expert], self.scales[0][expert])
                w2 = dequantised(layer.w2_weight[expert], self.scales[1][expert])
                gate, up = (x[tokens].float() @ w13.T).chunk(2, dim=-1)
                product = (F.silu(gate) * up) @ w2.T
                output.index_add_(0, tokens, product * topk_weights[tokens, place].unsqueeze(-1))
            return output.to(x.dtype)

    fp8.Fp8MoEMethod = Fp8MoEMethod


def dequantised(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return one expert's weight in float32; a scale for every block of 128 by 128."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    return (blocks * scales[:, None, :, None]).view(rows, columns)
