"""Heads against torch's own layer, whole; fewer heads against the masked layer (test_families.py)."""

import pytest
import torch
from torch import nn

from perjoule.compress.structure.attention import Heads, Projections, exchanged


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both", "heads"])
def test_it_answers_like_torchs_own(batch_first, bias, weights, mask):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias).eval()
    ours = Heads(theirs)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    given = {}
    if mask in ("causal", "both"):
        given["attn_mask"] = torch.ones(5, 4, dtype=torch.bool).triu(1)
    if mask == "heads":
        given["attn_mask"] = torch.randn(6, 5, 4)
    if mask in ("padding", "both"):
        given["key_padding_mask"] = torch.tensor([[False, False, False, False], [False, False, True, True]])
    if weights != "none":
        given["average_attn_weights"] = weights == "mean"
    q, k, v = (t if batch_first else t.transpose(0, 1) for t in (q, k, v))
    with torch.no_grad():
        wanted = theirs(q, k, v, need_weights=weights != "none", **given)
        found = ours(q, k, v, need_weights=weights != "none", **given)
    assert torch.allclose(found[0], wanted[0], atol=1e-6)
    assert (found[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        assert torch.allclose(found[1], wanted[1], atol=1e-6)


@pytest.mark.parametrize("to_itself", [True, False])
@pytest.mark.parametrize("called", ["itself", "another"])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_answer_like_torchs_own_however_they_are_called(to_itself, called, bias):
    """One product for all three was the choice of a trace; a later call may be another one."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, bias=bias).eval()
    ours = Projections(theirs, to_itself=to_itself)
    q, k = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    given = (q, q, q) if called == "itself" else (q, k, k)
    with torch.no_grad():
        assert torch.allclose(ours(*given)[0], theirs(*given)[0], atol=1e-6)
    linears = [m for m in ours.modules() if type(m) is nn.Linear]
    assert len(linears) == (2 if to_itself else 4)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_one_example_without_a_batch_axis():
    theirs = nn.MultiheadAttention(12, 3).eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        for found, wanted in zip(Heads(theirs)(x, x, x), theirs(x, x, x), strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)


def test_parameters_keep_their_names_and_other_layers_stay():
    theirs = nn.MultiheadAttention(12, 3)
    assert list(Heads(theirs).state_dict()) == list(theirs.state_dict())
    assert exchanged(theirs, "in_proj_weight", 0) is not None
    assert exchanged(theirs, "in_proj_weight", 1) is None
    assert exchanged(nn.MultiheadAttention(12, 3, kdim=5), "in_proj_weight", 0) is None
    assert exchanged(nn.MultiheadAttention(12, 3, add_bias_kv=True), "in_proj_weight", 0) is None
    assert exchanged(nn.Linear(3, 3), "weight", 0) is None
