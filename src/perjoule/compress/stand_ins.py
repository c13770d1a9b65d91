"""Stand-ins: layers that compute what torch's own do, with their weights in linear layers and tables.

    Bag      EmbeddingBag over one row of entries per bag:   sum, mean or max over n of  table[i_Bn]
    Cell     LSTMCell, GRUCell, RNNCell:                     gates from  W_ih x + b_ih  and  W_hh h + b_hh

A table and a linear layer are sites (sites.py); an EmbeddingBag and a cell are not. They are called as torch's are.

Cost     that of torch's own: a bag is read entry by entry, so B N D numbers are there at once.
Left out bags given by offsets; `max_norm`.
Shapes   B bags or examples, N entries of a bag, D features, H units, G gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perjoule.compress.structure.attention import linear

State = Tensor | tuple[Tensor, Tensor]


class Bag(nn.Module):
    """In the place of an nn.EmbeddingBag that is called with (B, N) entries."""

    def __init__(self, like: nn.EmbeddingBag) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(like.weight.detach().clone(), freeze=not like.weight.requires_grad)
        self.mode, self.padding_idx = like.mode, like.padding_idx
        self.embedding_dim, self.num_embeddings = like.embedding_dim, like.num_embeddings
        self.train(like.training)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag, without offsets."""
        e_BND: Tensor = self.table(input)
        if self.padding_idx is None:
            there_BN1 = torch.ones_like(input[..., None], dtype=torch.bool)
        else:
            there_BN1 = (input != self.padding_idx)[..., None]
        if self.mode == "max":
            top_BD = e_BND.masked_fill(~there_BN1, -torch.inf).amax(1)
            return torch.where(there_BN1.any(1), top_BD, torch.zeros_like(top_BD))
        if per_sample_weights is not None:
            e_BND = e_BND * per_sample_weights[..., None]
        total_BD = (e_BND * there_BN1).sum(1) if self.padding_idx is not None else e_BND.sum(1)
        return total_BD if self.mode == "sum" else total_BD / there_BN1.sum(1).clamp_min(1)


class Cell(nn.Module):
    """In the place of an nn.LSTMCell, nn.GRUCell or nn.RNNCell."""

    def __init__(self, like: nn.LSTMCell | nn.GRUCell | nn.RNNCell) -> None:
        super().__init__()
        self.kind = type(like).__name__
        self.nonlinearity = getattr(like, "nonlinearity", "tanh")
        self.hidden_size = like.hidden_size
        self.ih, self.hh = linear(like.weight_ih, like.bias_ih), linear(like.weight_hh, like.bias_hh)
        self.train(like.training)

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As torch's cell: the next state, of an LSTM with the next memory."""
        h, c = hx if isinstance(hx, tuple) else (hx, None)
        if h is None:
            h = input.new_zeros(*input.shape[:-1], self.hidden_size)
        into, back = self.ih(input), self.hh(h)
        if self.kind == "GRUCell":
            r, z, n = into.chunk(3, -1)
            back_r, back_z, back_n = back.chunk(3, -1)
            z = torch.sigmoid(z + back_z)
            n = torch.tanh(n + torch.sigmoid(r + back_r) * back_n)
            return (1 - z) * n + z * h
        if self.kind == "RNNCell":
            total = into + back
            return torch.tanh(total) if self.nonlinearity == "tanh" else torch.relu(total)
        i, f, g, o = (into + back).chunk(4, -1)
        fresh = torch.sigmoid(i) * torch.tanh(g)
        c = fresh if c is None else torch.sigmoid(f) * c + fresh
        return torch.sigmoid(o) * torch.tanh(c), c
