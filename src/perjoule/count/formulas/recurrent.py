"""Recurrent layers as one operator: nn.RNN, nn.GRU, nn.LSTM and their cells.

Per layer, direction and time step, with N = batch (packed sequences: N*T = total steps):

    matmul   2*N*(numel(W_ih) + numel(W_hh) [+ numel(W_hr)])         G = 1, 3, 4 gates: W_ih (G*H, I), W_hh (G*H, H)
    other    biases (two per gate row), the sum of both products, gate functions, state update

    per state element:   RNN  add 1 + tanh 1
                         GRU  r, z: 2*(add 1 + sigmoid 4); n: mul 1, add 1, tanh 1; h: sub 1, mul 1, add 1
                         LSTM i, f, g, o: 4 adds; 3 sigmoids 12, tanh 1; c: 2 mul, 1 add; h: tanh 1, mul 1

Bytes   The input products of all steps are one matrix product, so W_ih is read once per layer. The recurrence
is a true sequence: W_hh (and W_hr) are read again at every step, as if nothing stays in cache.
Left out   dropout between layers (0 in inference).

The way back is in recurrent_back.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perjoule.count.registry import Call, Cost, composite, formula, nbytes, packets, result

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
UPDATE = {"lstm": 22, "gru": 16, "rnn_tanh": 2, "rnn_relu": 2}
"""Other FLOPs per state element and step, biases apart; derived in the docstring above."""

KINDS = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "rnn_tanh",
    torch.rnn_relu_cell: "rnn_relu",
}


def recurrence(kind: str, weights: Sequence[Tensor], *, rows: int, steps: int) -> tuple[int, int, int]:
    """(matmul FLOPs, other FLOPs, weight bytes) for flat `weights`, `rows` = steps summed over the batch."""
    matrices = [w for w in weights if w.dim() == 2]
    biases = sum(w.numel() for w in weights if w.dim() == 1)
    hidden = [w for w in matrices if w.shape[0] % GATES[kind] == 0]
    # Every cell has exactly one input matrix and one recurrent matrix; a third one projects the state (W_hr).
    per_cell = 3 if projected(kind, matrices) else 2
    cells = len(matrices) // per_cell
    state = sum(m.shape[0] // GATES[kind] for m in matrices[::per_cell]) if hidden else 0
    assert cells * per_cell == len(matrices)
    products = 2 * rows * sum(m.numel() for m in matrices)
    moved = 0
    for index, weight in enumerate(matrices):
        moved += nbytes(weight) * (1 if index % per_cell == 0 else steps)
    moved += sum(nbytes(w) for w in weights if w.dim() == 1)
    return products, rows * (biases + UPDATE[kind] * state), moved


def projected(kind: str, matrices: Sequence[Tensor]) -> bool:
    """An LSTM with proj_size: the third matrix is (P, H) with P < H, not the next layer's (4H, ...)."""
    return kind == "lstm" and len(matrices) % 3 == 0 and matrices[2].shape[0] < matrices[0].shape[0] // 4


def operands(call: Call) -> tuple[str, Tensor, Tensor | None, Any, list[Tensor], bool, bool]:
    """(kind, input, batch_sizes or None, state, weights, bidirectional, batch_first)."""
    kind = KINDS[call.op]
    args = call.args
    if isinstance(args[2], list | tuple):  # (input, hx, weights, has_biases, layers, dropout, train, bi, batch_first)
        return kind, args[0], None, args[1], list(args[2]), bool(args[7]), bool(args[8])
    return kind, args[0], args[1], args[2], list(args[3]), bool(args[8]), False


@composite(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _layers(call: Call) -> Cost:
    kind, x, batch_sizes, state, weights, _, batch_first = operands(call)
    steps = batch_sizes.numel() if batch_sizes is not None else x.shape[1 if batch_first else 0]
    rows = x.numel() // max(1, x.shape[-1])
    products, other, weight_bytes = recurrence(kind, weights, rows=rows, steps=steps)
    states = list(state) if isinstance(state, list | tuple) else [state]
    y, *_ = call.outputs
    written = nbytes(y) + sum(map(nbytes, states))
    read = nbytes(x) + weight_bytes + sum(map(nbytes, states))
    return Cost(matmul_flops=products, other_flops=other, read_bytes=read, write_bytes=written, operator=_shown(kind))


@result(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _layers_result(call: Call) -> tuple[Tensor, ...]:
    _, x, _, state, _, both_ways, _ = operands(call)
    states = list(state) if isinstance(state, list | tuple) else [state]
    width = states[0].shape[-1] * (2 if both_ways else 1)
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device="meta")
    return (y, *(torch.empty(tuple(s.shape), dtype=s.dtype, device="meta") for s in states))


@composite(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def _cell(call: Call) -> Cost:
    kind = KINDS[call.op]
    x = call.arg(0, "input")
    weights = [t for t in (call.arg(i, n) for i, n in enumerate(("w_ih", "w_hh", "b_ih", "b_hh"), 2)) if t is not None]
    rows = x.numel() // max(1, x.shape[-1])
    products, other, _ = recurrence(kind, weights, rows=rows, steps=1)
    return call.cost(matmul=products, other=other, operator=f"{_shown(kind)}_cell")


@result(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def _cell_result(call: Call) -> Any:
    state = call.arg(1, "hx")
    if isinstance(state, list | tuple):
        return tuple(torch.empty(tuple(s.shape), dtype=s.dtype, device="meta") for s in state)
    return torch.empty(tuple(state.shape), dtype=state.dtype, device="meta")


def _shown(kind: str) -> str:
    return kind.split("_")[0]


@formula(*packets("mkldnn_rnn_layer"))
def cpu_lstm_layer(call: Call) -> Cost:
    """One layer, one direction: (input, W_ih, W_hh, b_ih, b_hh, hx, cx, ...)."""
    x, *weights = call.args[:5]
    products, other, _ = recurrence("lstm", weights, rows=x.numel() // x.shape[-1], steps=1)
    return call.cost(matmul=products, other=other, operator="lstm")


@formula(*packets("_cudnn_rnn", "miopen_rnn"))
def gpu_layers(call: Call) -> Cost:
    """(input, flat weights, ...): the products only; the gates' share depends on an opaque mode number."""
    x, weights = call.args[:2]
    rows = x.numel() // x.shape[-1]
    return call.cost(matmul=2 * rows * sum(w.numel() for w in weights if w.dim() == 2), operator="rnn")


@result(*packets("_pack_padded_sequence"))
def pack_result(call: Call) -> tuple[Tensor, Tensor]:
    """Lengths are data, but small data: pack a width-1 stand-in for real and keep its bookkeeping."""
    x, lengths, batch_first = call.args[:3]
    stand_in, batch_sizes = call.op(torch.zeros((*x.shape[:2], 1)), lengths, batch_first)
    return torch.empty((stand_in.shape[0], *x.shape[2:]), dtype=x.dtype, device="meta"), batch_sizes


@result(*packets("_pad_packed_sequence"))
def _unpack_result(call: Call) -> tuple[Tensor, Tensor]:
    data, batch_sizes, batch_first, value, total = call.args[:5]
    stand_in, lengths = call.op(torch.zeros((data.shape[0], 1)), batch_sizes, batch_first, value, total)
    return torch.empty((*stand_in.shape[:2], *data.shape[1:]), dtype=data.dtype, device="meta"), lengths
