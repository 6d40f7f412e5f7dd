"""What is planned of a batch."""

from typing import Any


def plans_of_all_layers() -> None:
    """Plan for layers of DeepSeek-V4.1 too, which are asked for on CPUs whatever the model."""
    from vllm.models.deepseek_v4.cpu import cpu_mla

    builders = [each for each in vars(cpu_mla).values() if hasattr(each, "build_tile_scheduler")]
    for each in builders:
        stock = each.build_tile_scheduler

        def plan(self: Any, *args: Any, stock: Any = stock) -> dict[str, Any]:
            return {"c1a": None, "c2a": None} | stock(self, *args)

        each.build_tile_scheduler = plan
