"""ONNX attention and recurrent layers, with the costs of count/formulas/attention.py and recurrent.py.

    attention   2·B·H·L·S·(E + V) products; each score 1 to scale, 5 for softmax, 1 where something is added to it
    LSTM        per step and row: both matrices, all biases, 22 per state element; GRU 16, RNN 2

Costs follow the query heads, causality is not discounted, the scores are never written; a recurrent matrix is read
again at every step. Shapes   B batch, H query heads, K key heads, L queries, S keys, E head size, P cached keys.
"""

from __future__ import annotations

from perjoule.count.onnx_node import MICROSOFT, Node, Unfit, Value, Work, rule

SCORE = 6
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
UPDATE = {"LSTM": 22, "GRU": 16, "RNN": 2}
ROTARY = 3
"""Per element of queries and keys: two multiplies and an add."""


def _attend(node: Node, scores: int, widths: int, *, added: bool, projection: int = 0, extra: int = 0) -> Work:
    """`scores` = B·H·L·S; `widths` = E + V."""
    return Work(
        matmul=projection + 2 * scores * widths,
        other=scores * (SCORE + added) + extra,
        operator="multi_head_attention" if projection else "sdpa",
    )


def _cached(past: Value | None) -> int:
    """P of a cache (B,K,P,E) or (2,B,K,P,E)."""
    return past.shape[-2] if past is not None and past.shape else 0


@rule("Attention")
def attention(node: Node) -> Work:
    """Opset 23: (B,H,L,E), or (B,L,H·E) with the numbers of heads as attributes."""
    q, k, v = (node.takes(i).shape or () for i in range(3))
    past = _cached(node.given(4))
    added = node.given(3) is not None
    if len(q) == 3:
        heads, keys = node.attr("q_num_heads"), node.attr("kv_num_heads")
        scores = q[0] * heads * q[1] * (k[1] + past)
        return _attend(node, scores, q[2] // heads + v[2] // keys, added=added)
    return _attend(node, q[0] * q[1] * q[2] * (k[2] + past), q[3] + v[3], added=added)


@rule("Attention", "QAttention", domains=(MICROSOFT,))
def packed_attention(node: Node) -> Work:
    """Projection of x (B,L,D) by one matrix (D, 3D), then attention among its own tokens and a cache.

    QAttention has its mask at 5 and its cache at 8; Attention at 3, 4 and what is added to the scores at 5.
    """
    (b, length, _), w = node.takes(0).shape or (0, 0, 0), node.takes(1)
    quantised = node.op == "QAttention"
    widths = node.attr("qkv_hidden_sizes") or [(w.shape or (0, 0))[1] // 3] * 3
    heads = node.attr("num_heads")
    keys = length + _cached(node.given(8 if quantised else 4))
    biases = b * length * sum(widths) * (1 + 2 * quantised)
    added = node.given(5 if quantised else 3) is not None or (not quantised and node.given(5) is not None)
    made = _attend(
        node,
        b * heads * length * keys,
        widths[0] // heads + widths[2] // heads,
        added=added,
        projection=2 * b * length * w.count,
        extra=biases,
    )
    return made


@rule("MultiHeadAttention", "DecoderMaskedMultiHeadAttention", domains=(MICROSOFT,))
def separate_attention(node: Node) -> Work:
    """Query (B,L,D), key (B,S,D) or (B,K,S,E), value likewise; packed (B,L,H,3,E) and (B,S,H,2,E) too."""
    q = node.takes(0).shape or ()
    heads = node.attr("num_heads")
    added = node.given(4) is not None or node.given(5) is not None
    extra = (node.given(3) is not None) * node.takes(0).count * 3
    if len(q) == 5:
        return _attend(node, q[0] * heads * q[1] * q[1], 2 * q[4], added=added, extra=extra)
    k = node.takes(1).shape or ()
    keys = {3: k[1], 4: k[2] if len(k) == 4 else 0, 5: k[1]}[len(k)] + (len(k) == 3) * _cached(node.given(6))
    value = node.given(2)
    width = q[2] // heads
    if value is not None and value.shape:
        width = value.shape[3] if len(value.shape) == 4 else value.shape[2] // heads
    return _attend(node, q[0] * heads * q[1] * keys, q[2] // heads + width, added=added, extra=extra)


@rule("GroupQueryAttention", "SparseAttention", domains=(MICROSOFT,))
def grouped_attention(node: Node) -> Work:
    """Query (B,L,H·E), or all three packed as (B,L,(H+2K)·E); the cache is counted at its full length P."""
    heads, groups = node.attr("num_heads"), node.attr("kv_num_heads")
    b, length, width = node.takes(0).shape or (0, 0, 0)
    size = width // (heads + 2 * groups) if node.given(1) is None else width // heads
    rotary = ROTARY * b * length * (heads + groups) * size if node.attr("do_rotary", 0) else 0
    keys = length + _cached(node.given(3))
    return _attend(node, b * heads * length * keys, 2 * size, added=False, extra=rotary)


@rule("RotaryEmbedding", domains=("", MICROSOFT))
def rotary(node: Node) -> Work:
    """Rotate pairs: two multiplies and an add per element."""
    return Work(other=ROTARY * node.makes().count, operator="rotary_embedding")


@rule("LSTM", "GRU", "RNN")
@rule("DynamicQuantizeLSTM", domains=(MICROSOFT,))
def recurrent(node: Node) -> Work:
    """X (T,B,I), or (B,T,I) with layout 1; W (D, gates·H, I), R (D, gates·H, H), D directions, both in one node."""
    kind = node.op.removeprefix("DynamicQuantize")
    x, w, r = node.takes(0), node.takes(1), node.takes(2)
    hidden, directions = node.attr("hidden_size"), 2 if node.attr("direction", "forward") == "bidirectional" else 1
    if not x.shape or hidden is None:
        raise Unfit("its sizes are not known")
    steps = x.shape[1 if node.attr("layout", 0) else 0]
    rows = x.shape[0] * x.shape[1]
    bias, peephole = node.given(3), node.given(7) if kind == "LSTM" else None
    other = rows * ((bias.count if bias else 0) + UPDATE[kind] * directions * hidden)
    other += 2 * rows * peephole.count if peephole else 0
    read = node.read_bytes + (steps - 1) * r.nbytes
    return Work(matmul=2 * rows * (w.count + r.count), other=other, read=read, operator=kind.lower())
