"""How many experts a model has, where vLLM does not look for the number: in a part of its text config.

DBRX counts them in `ffn_config`; vLLM takes it for a dense model, whose ranks its offline mode refuses.
"""

import contextlib
from typing import Any

from vllm_dwdp.compat.worker.attributes import replaced


def counted_in_parts() -> contextlib.AbstractContextManager[None]:
    """While active, vLLM's configs count the experts that a part of the text config has."""
    from transformers import PretrainedConfig
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    stock = ModelArchConfigConvertorBase.get_num_experts

    def get_num_experts(self: Any) -> Any:
        parts = [
            part
            for part in vars(self.hf_text_config).values()
            if isinstance(part, PretrainedConfig)
        ]
        of_parts = (stock(ModelArchConfigConvertorBase(self.hf_config, part)) for part in parts)
        return stock(self) or max(of_parts, default=0)

    return replaced(ModelArchConfigConvertorBase, get_num_experts=get_num_experts)
