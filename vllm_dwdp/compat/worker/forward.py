"""What vLLM says of the forward that is running."""


def num_tokens_of_forward() -> int | None:
    """Tokens that the running forward computes, padding included; None where vLLM does not say.

    It does not outside of a forward, and while the V2 model runner captures a full graph.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    descriptor = get_forward_context().batch_descriptor
    return None if descriptor is None else int(descriptor.num_tokens)
