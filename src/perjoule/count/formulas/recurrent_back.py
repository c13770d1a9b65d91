"""Backpropagation through time (Werbos 1990) through nn.RNN, nn.GRU, nn.LSTM and their cells, in closed form.

With N rows (steps summed over the batch) and B sequences, per layer and direction:

    dW_ih, dW_hh, dW_hr   2*N*numel each, where the weight needs a gradient; biases: one add per row and element
    dX                    2*N*numel(W_ih), where the layer below, or the input, needs it
    dH                    2*(N - B)*numel(W_hh): the first step's state is the given one; 2*N* where that needs it too
    d(W_hr product)       2*N*numel(W_hr)

    per state element:    RNN   tanh 3 (relu 1), sum of the two ways into h 1
                          GRU   dz 2, dn 2, dh 1, tanh 3, dr 1, dhn 1, two sigmoids 6, sums 2
                          LSTM  sum into h 1, do 1, dc 5, di, dg, df 3, three sigmoids 9, tanh 3, dc of the last step 1

Bytes   as in the forward pass, with the gradient of the result read and the weights' gradients written; recurrent
matrices are read again at every step.
Kept    x, y, the given state, the results between layers, and per state element what a training kernel needs on the
way back: the gates' values, and the cell (LSTM) or the candidate's hidden part (GRU). A fused GPU kernel's reserve
holds this much and some padding; unfused loops on a CPU keep two to three times more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perjoule.count.formulas.recurrent import GATES, KINDS, operands, projected
from perjoule.count.registry import Call, Way, backward, nbytes

BACK = {"lstm": 23, "gru": 18, "rnn_tanh": 4, "rnn_relu": 2}
"""Other FLOPs per state element and step on the way back, biases apart; derived in the docstring above."""
KEPT = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
"""Kept values per state element and step beside x and the results of the layers."""


def _cells(kind: str, weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """The matrices of each layer and direction."""
    matrices = [w for w in weights if w.dim() == 2]
    each = 3 if projected(kind, matrices) else 2
    return [matrices[i : i + each] for i in range(0, len(matrices), each)]


def _products(
    kind: str, weights: Sequence[Tensor], needs: Callable[[Any], bool], *, rows: int, first: int, ways: int, below: bool
) -> int:
    """Multiply-adds of all cells; `first`: rows whose given state needs no gradient; `below`: the input needs one."""
    total = 0
    cells = _cells(kind, weights)
    for layer in range(0, len(cells), ways):
        here = cells[layer : layer + ways]
        trained = any(needs(w) for cell in here for w in cell)
        if not (trained or below) and first:
            continue  # nobody below waits for a gradient
        for w_ih, w_hh, *w_hr in here:
            total += sum(rows * w.numel() for w in (w_ih, w_hh, *w_hr) if needs(w))
            total += below * rows * w_ih.numel()
            total += (rows - first) * w_hh.numel() + rows * sum(w.numel() for w in w_hr)
        below = below or trained
    return total


@backward(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _layers(call: Call, needs: Callable[[Any], bool]) -> Way:
    kind, x, batch_sizes, state, weights, both_ways, batch_first = operands(call)
    states = list(state) if isinstance(state, list | tuple) else [state]
    rows = x.numel() // max(1, x.shape[-1])
    steps = batch_sizes.numel() if batch_sizes is not None else x.shape[1 if batch_first else 0]
    first = 0 if any(map(needs, states)) else states[0].shape[1]
    ways = 2 if both_ways else 1
    products = _products(kind, weights, needs, rows=rows, first=first, ways=ways, below=needs(x))
    cells = _cells(kind, weights)
    elements = rows * sum(cell[0].shape[0] // GATES[kind] for cell in cells)
    biases = rows * sum(w.numel() for w in weights if w.dim() == 1 and needs(w))
    y = call.outputs[0]
    between = rows * y.shape[-1] * (len(cells) // ways - 1)
    gates = KEPT[kind] * elements * x.element_size()
    read = nbytes(x) + 2 * nbytes(y) + gates + sum(nbytes(c[0]) + steps * sum(map(nbytes, c[1:])) for c in cells)
    write = sum(nbytes(t) for t in (x, *states, *weights) if needs(t))
    cost = call.cost(
        matmul=2 * products, other=biases + BACK[kind] * elements, read=read, write=write, operator=kind.split("_")[0]
    )
    extra = gates + between * x.element_size()
    return Way((cost,), keeps=(x, *states, *weights), extra_bytes=extra, keeps_result=True)


@backward(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def _cell(call: Call, needs: Callable[[Any], bool]) -> Way:
    kind = KINDS[call.op]
    x, state = call.arg(0, "input"), call.arg(1, "hx")
    states = list(state) if isinstance(state, list | tuple) else [state]
    weights = [t for t in (call.arg(i, n) for i, n in enumerate(("w_ih", "w_hh", "b_ih", "b_hh"), 2)) if t is not None]
    rows = x.numel() // max(1, x.shape[-1])
    first = 0 if any(map(needs, states)) else rows
    products = _products(kind, weights, needs, rows=rows, first=first, ways=1, below=needs(x))
    elements = rows * weights[0].shape[0] // GATES[kind]
    biases = rows * sum(w.numel() for w in weights if w.dim() == 1 and needs(w))
    gates = KEPT[kind] * elements * x.element_size()
    matrices = sum(nbytes(w) for w in weights if w.dim() == 2)
    read = nbytes(x) + 2 * sum(map(nbytes, call.outputs)) + gates + matrices
    write = sum(nbytes(t) for t in (x, *states, *weights) if needs(t))
    name = f"{kind.split('_')[0]}_cell"
    cost = call.cost(matmul=2 * products, other=biases + BACK[kind] * elements, read=read, write=write, operator=name)
    return Way((cost,), keeps=(x, *states, *weights), extra_bytes=gates, keeps_result=not gates)
