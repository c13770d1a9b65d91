"""What is refused before anything is measured, in one line each."""

import pytest
import torch
from torch import nn

from perjoule import Workload
from perjoule.core.errors import WorkloadError
from perjoule.core.record import Untreated
from perjoule.search.original import Known, refuse_chance
from perjoule.search.prospect import _refuse_nothing


def known(model, x):
    return Known(Workload(model=model, calibration=[x, x]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_named(kind):
    with pytest.raises(WorkloadError, match=f"weights are {str(kind)[6:]}; give model.float") as caught:
        known(nn.Linear(3, 2).to(kind), torch.randn(4, 3, dtype=kind))
    assert "\n" not in str(caught.value)


def test_weights_without_shape_or_values_are_named():
    with pytest.raises(WorkloadError, match=r"weight '0\.weight' has no shape yet; run the model once"):
        known(nn.Sequential(nn.LazyLinear(2)), torch.randn(4, 3))
    with pytest.raises(WorkloadError, match="weight 'weight' is on the meta device"):
        known(nn.Linear(3, 2, device="meta"), torch.randn(4, 3))


class Answering(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(3, 2), how

    def forward(self, x):
        y = self.inner(x)
        return {"twice": lambda: torch.cat([y, y]), "mean": lambda: y.mean(), "noisy": lambda: y + torch.rand(2),
                "text": lambda: {"name": "digits", "logits": y}}[self.how]()  # fmt: skip


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("twice", r"calibration: the model answers \(8, 2\) to 4 examples; axis 0 of its first tensor must count"),
        ("mean", r"calibration: the model answers \(\) to 4 examples"),
        ("text", "calibration: the model returned str; it must return a tensor first"),
    ],
)
def test_answers_that_cannot_be_judged_one_by_one(how, line):
    with pytest.raises(WorkloadError, match=line) as caught:
        known(Answering(how), torch.randn(4, 3))
    assert "\n" not in str(caught.value)


def test_a_model_that_draws_its_answers_is_refused():
    x = torch.randn(4, 3)
    with pytest.raises(WorkloadError, match="answers the same batch differently the second time"):
        refuse_chance(known(Answering("noisy"), x).workload)
    refuse_chance(known(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), x).workload)


def test_a_model_that_does_not_take_its_calibration_data():
    with pytest.raises(WorkloadError, match="calibration: the model fails on batch 0"):
        known(nn.Linear(3, 2), torch.randn(4, 5))


def test_the_given_model_is_what_is_measured_and_an_opened_one_is_treated():
    given = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    found = known(given, torch.randn(4, 3))
    found.find()
    assert nn.utils.parametrize.is_parametrized(found.workload.model[0])
    assert [s.name for s in found.sites] == ["0"]
    assert found.notes == ["reparametrised weights of 1 layer were folded into plain ones; the answers are the same"]


def test_nothing_to_treat_says_why():
    with pytest.raises(WorkloadError, match=r"can be compressed \(it has no weights\); `perjoule count`"):
        _refuse_nothing([], [])
    one = Untreated(site="a", kind="Own", reason="no form knows Own", nbytes=4)
    with pytest.raises(WorkloadError, match=r"\(2 layers: no form knows Own\)"):
        _refuse_nothing([], [one, one])
