"""vLLM's checksums of a model's weights (`/weight_checker`), of layers that must be read one by one.

Private names used: `model_loader.weight_checksum.compute_tensor_digests`.
"""

from collections.abc import Iterable, Mapping

import torch


def of_layers(
    checksums: Mapping[str, str], model: torch.nn.Module, layers: Iterable[torch.nn.Module]
) -> dict[str, str]:
    """Return the checksums of some layers of a model, each taken when it is yielded.

    Args:
        checksums: vLLM's of the whole model; keys are `dp<rank>:...:<name of the tensor>`.
        layers: of the model; others are passed over.
    """
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

    keys = {key.rpartition(":")[2]: key for key in checksums}
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for layer in layers:
        if layer in names:
            for name, digest in compute_tensor_digests(layer).items():
                found[keys[f"{names[layer]}.{name}"]] = digest
    return found
