"""The arithmetic of sparse latent attention: keys in FP8, the best of them, and what is seen.

T queries and S cached tokens of one sequence; H heads of an indexer or of the attention.
"""

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
GROUP = 128
"""Elements that share a scale."""


def quantise(x: torch.Tensor, group: int, powers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[..., size]` in FP8, and the scales `[..., size // group]`, powers of two if asked for."""
    groups = x.float().unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1).clamp(min=1e-10) / LARGEST
    if powers:
        scales = scales.log2().ceil().exp2()
    scaled = (groups / scales[..., None]).clamp(-LARGEST, LARGEST)
    return scaled.flatten(-2).to(FP8), scales


def packed(keys: torch.Tensor) -> torch.Tensor:
    """Return keys `[T, size]` as the bytes that a token has in an indexer's cache: FP8, then scales."""
    values, scales = quantise(keys, GROUP, powers=True)
    return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), -1)


def unpacked(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return `[S, size]`, float32, of the bytes that `packed` made."""
    values = rows[:, :size].contiguous().view(FP8).float()
    scales = rows[:, size:].contiguous().view(torch.float32)
    return values * scales.repeat_interleave(GROUP, -1)


def best(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, num_seen: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the places of each query's best keys, `[T, count]`, int32; -1 where there are fewer.

    Args:
        q: `[T, H, size]`.
        weights: of its heads, `[T, H]`.
        keys: `[S, size]`.
        num_seen: keys that each query may see, the first ones, `[T]`.
    """
    products = torch.einsum("thd,sd->ths", q.float(), keys).relu()
    scores = torch.einsum("ths,th->ts", products, weights.float())
    hidden = torch.arange(keys.shape[0]) >= num_seen[:, None]
    top = scores.masked_fill(hidden, -torch.inf).topk(min(count, keys.shape[0]), -1)
    places = top.indices.masked_fill(top.values == -torch.inf, -1)
    return torch.nn.functional.pad(places, (0, count - places.shape[1]), value=-1).int()


def attend(
    q: torch.Tensor,
    latents: torch.Tensor,
    chosen: torch.Tensor,
    rank: int,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what queries see of the chosen tokens' latents, `[T, H, rank]`.

    Args:
        q: `[T, H, rank + rope]`.
        latents: `[S, rank + rope]`; the first `rank` of a token are its value.
        chosen: places in `latents`, `[T, count]`; -1 for none.
        sinks: of the heads, `[H]`: logits of what has no value.
    """
    picked = latents[chosen.clamp(min=0).long()].float()
    logits = torch.einsum("thd,tkd->thk", q.float(), picked) * scale
    logits = logits.masked_fill(chosen[:, None] < 0, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.float()[None, :, None].expand(len(q), -1, 1)), -1)
    shares = logits.softmax(-1)[..., : chosen.shape[1]]
    return torch.einsum("thk,tkd->thd", shares, picked[..., :rank]).to(q.dtype)
