"""Attention and the rotation of its queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from graphopt.distill.operators.call import Call, Operator, Tensor


def _attention(call: Call) -> tuple[Tensor | None, ...]:
    """Attention of opset 23 on split or unsplit heads, also causal and with a cache of keys and values."""
    if call.at(6) is not None or call.outputs > 3:
        raise NotImplementedError("lengths of keys, and scores as an output")
    q, k, v = call.inputs[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    flat = q.dim() == 3
    if flat:
        heads, kv = call.attributes["q_num_heads"], call.attributes["kv_num_heads"]
        q, k, v = (_apart(each, count) for each, count in ((q, heads), (k, kv), (v, kv)))
    past = call.at(4)
    if past is not None:
        k, v = torch.cat((past, k), 2), torch.cat((call.inputs[5], v), 2)
    scale = call.get("scale", q.shape[-1] ** -0.5)
    causal = 0 if past is None else past.shape[2]
    offset = causal if call.get("is_causal", 0) else None
    cap = call.get("softcap", 0.0)
    k_all, v_all = (_repeated(each, q.shape[1]) for each in (k, v))
    scores = q @ k_all.transpose(-1, -2) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    made = _softmax(scores, call.at(3), offset) @ v_all
    return (made.transpose(1, 2).flatten(2) if flat else made, k, v)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values of fewer heads, each as often as queries share it."""
    groups = heads // x.shape[1]
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def _softmax(scores: Tensor, mask: Tensor | None, offset: int | None) -> Tensor:
    """Shares of attention.

    Args:
        scores: [batch, heads, rows, keys].
        mask: booleans that say what is seen, or numbers to add.
        offset: row i sees the keys up to i + offset; None for all.
    """
    if offset is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(offset)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


def _apart(flat: Tensor, heads: int) -> Tensor:
    """[batch, rows, heads * width] with the heads in front of the rows."""
    return flat.reshape(*flat.shape[:2], heads, -1).transpose(1, 2)


def _multi_head(call: Call) -> Tensor:
    """MultiHeadAttention of com.microsoft on separate queries, keys and values, without a cache."""
    q, k, v = (call.at(index) for index in range(3))
    if q is None or k is None or v is None or k.dim() != 3 or call.outputs > 1:
        raise NotImplementedError("packed inputs, a cache and further outputs")
    if any(call.at(index) is not None for index in (4, 6, 7)):
        raise NotImplementedError("key_padding_mask and a cache")
    bias = call.at(3)
    if bias is not None:
        widths = [each.shape[-1] for each in (q, k, v)]
        q, k, v = (each + part for each, part in zip((q, k, v), bias.split(widths), strict=True))
    heads = call.attributes["num_heads"]
    q, k, v = (_apart(each, heads) for each in (q, k, v))
    scale = call.get("scale", 0.0) or q.shape[-1] ** -0.5
    offset = 0 if call.get("unidirectional", 0) else None
    made = _softmax(q @ k.transpose(-1, -2) * scale, call.at(5), offset) @ v
    return made.transpose(1, 2).flatten(2)


def _rotary(call: Call) -> Tensor:
    """RotaryEmbedding of opset 23: x, cos, sin, [positions]; heads split, or `num_heads` of them side by side."""
    return _rotated(call, call.inputs[1], call.inputs[2], call.at(3))


def _rotary_microsoft(call: Call) -> Tensor:
    """RotaryEmbedding of com.microsoft: x, positions, cos, sin."""
    positions, cos = call.inputs[1], call.inputs[2]
    assert positions is not None
    assert cos is not None
    if positions.numel() == 1:
        rows = call.x.shape[-2]
        positions = positions.reshape(1, 1) + torch.arange(rows).expand(call.x.shape[0], rows)
    narrow = call.x.dim() == 3 and not call.get("num_heads", 0)
    heads = call.x.shape[-1] // (2 * cos.shape[-1]) if narrow else 0
    return _rotated(call, cos, call.inputs[3], positions, heads)


def _rotated(
    call: Call, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int = 0
) -> Tensor:
    flat = call.x.dim() == 3
    x = _apart(call.x, call.get("num_heads", 0) or heads) if flat else call.x
    width = call.get("rotary_embedding_dim", 0) or x.shape[-1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (each[:, None, :, : width // 2] for each in (cos, sin))
    turned, rest = x[..., :width], x[..., width:]
    if call.get("interleaved", 0):
        one, two = turned[..., ::2], turned[..., 1::2]
        pair = torch.stack((one * cos - two * sin, one * sin + two * cos), -1).flatten(-2)
    else:
        one, two = turned.chunk(2, -1)
        pair = torch.cat((one * cos - two * sin, one * sin + two * cos), -1)
    made = torch.cat((pair, rest), -1)
    return made.transpose(1, 2).flatten(2) if flat else made


OPERATORS: Mapping[str, Operator] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "RotaryEmbedding": _rotary,
}
MICROSOFT: Mapping[str, Operator] = {"RotaryEmbedding": _rotary_microsoft}
"""What means something else in com.microsoft."""
