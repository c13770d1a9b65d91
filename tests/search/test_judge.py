"""The judge: halves that do not meet, intervals that cover, scores that are refused in one line."""

import numpy as np
import pytest
import torch
from torch import nn

from perjoule import Workload
from perjoule.core.budget import Budget
from perjoule.core.errors import WorkloadError
from perjoule.search.judge import Judge, cosine, fidelity, flips, neighbour_agreement
from perjoule.search.original import every_other


def workload(score=None, examples=40):
    x = torch.zeros(examples, 3)
    return Workload(
        model=nn.Linear(3, 3), calibration=[x], evaluation=[x], score=score, score_name="points" if score else ""
    )


def answers(examples=40, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((examples, width)).astype(np.float32)


def test_identical_answers_are_exactly_as_good():
    reference = answers()
    judge = Judge(workload(), reference)
    assert judge.search_half(reference[::2]) == (1.0, 0.0)
    for half in ("search", "verdict", "all"):
        found = judge(reference.copy(), half)
        for estimate in (found.quality, found.relative):
            assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)
    assert found.details["fidelity (mean cosine)"] == 1.0
    assert found.details["same nearest neighbour"] == found.details["same ten neighbours"] == 1.0


def test_answers_of_zero_are_like_themselves():
    assert cosine(np.zeros((2, 3)), np.array([[0, 0, 0], [1, 0, 0]])).tolist() == [1, 0]


def test_cosine_by_hand():
    a, b = np.array([[1.0, 0], [3, 4], [1, 1]]), np.array([[0.0, 2], [6, 8], [-1, -1]])
    assert cosine(a, b) == pytest.approx([0, 1, -1])
    assert cosine(a.reshape(3, 1, 2), b.reshape(3, 2, 1)) == pytest.approx([0, 1, -1])  # any shape behind axis 0


def test_one_number_an_example_is_judged_by_its_size_not_its_sign():
    """Answers 10 times as large keep every sign: their cosine is 1."""
    b = np.array([1.0, 2, 3, 6])  # variance 3.5
    assert fidelity(np.add(b, [0, 1, 0, 2]), b) == pytest.approx([1, 1 - 1 / 3.5, 1, 1 - 4 / 3.5])
    assert fidelity(10 * b, b).min() == -1
    for shape in ((40,), (40, 1)):
        reference = answers().reshape(40, -1)[:, 0].reshape(shape)
        judge = Judge(workload(), reference)
        assert judge.search_half(reference[::2]) == (1.0, 0.0)
        near, far = judge(1.1 * reference, "all"), judge(2 * reference, "all")
        assert 0.98 < near.relative.value < 1
        assert far.relative.value < 0.6
        assert near.details["fidelity (share of the variance)"] == near.quality.value


def test_a_score_that_does_not_look_at_the_answers_is_refused():
    reference = answers()
    Judge(workload(lambda y: y[:, 0] + 9), reference).refuse_a_constant()
    Judge(workload(), reference).refuse_a_constant()
    with pytest.raises(WorkloadError, match="the score 'points' does not look at the answers") as caught:
        Judge(workload(lambda y: 1.0), reference).refuse_a_constant()
    assert "\n" not in str(caught.value)


def test_the_halves_are_disjoint_and_together_all():
    """A score that is the example's own number shows which examples each half looks at."""
    numbers = np.arange(1, 41.0)
    judge = Judge(workload(lambda found: found[:, 0]), numbers[:, None])
    shown = {half: [] for half in ("search", "verdict", "all")}
    for half, seen in shown.items():
        for number in range(40):
            changed = numbers.copy()
            changed[number] += 1000
            if judge(changed[:, None], half).quality.value != judge(numbers[:, None], half).quality.value:
                seen.append(number)
    assert shown == {"search": list(range(0, 40, 2)), "verdict": list(range(1, 40, 2)), "all": list(range(40))}
    assert judge(numbers[:, None], "verdict").quality.value == numbers[1::2].mean()
    assert "over 20 examples" in judge(numbers[:, None], "verdict").quality.source


@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 1, 1, 1), (2, 7), (8,)])
def test_batches_are_halved_by_number_not_by_batch(sizes):
    numbers = torch.arange(sum(sizes))
    batches = [{"x": part, "y": 10 * part} for part in numbers.split(list(sizes))]
    for first in (0, 1):
        halved = every_other(batches, first)
        assert torch.cat([b["x"] for b in halved]).tolist() == list(range(first, sum(sizes), 2))
        assert all(torch.equal(b["y"], 10 * b["x"]) and len(b["x"]) for b in halved)


def test_half_of_the_answers_are_judged_as_the_half_of_all():
    reference, changed = answers(), answers() + 0.1 * answers(seed=1)
    judge = Judge(workload(), reference)
    whole, half = judge(changed, "verdict"), judge(changed[1::2], "verdict")
    assert half.quality == whole.quality
    assert half.relative == whole.relative
    assert judge.search_half(changed[::2])[0] == pytest.approx(judge(changed, "search").quality.value)


def test_a_score_sees_all_answers_even_if_half_of_them_count():
    seen = []

    def score(found):
        seen.append(len(found))
        return found[:, 0]

    judge = Judge(workload(score), np.ones((40, 2)))
    assert judge.needs_all
    changed = np.ones((40, 2))
    changed[1::2] = 0.0  # only the other half
    assert judge.search_half(changed) == (1.0, 0.0)
    assert judge(changed, "verdict").relative.value == 0
    assert set(seen) == {40}
    assert not Judge(workload(), np.ones((40, 2))).needs_all


def test_distance_is_the_relative_squared_change_of_the_search_half():
    reference = np.ones((40, 2), np.float32)
    changed = reference.copy()
    changed[0] = [3, 1]
    changed[1] = [100, 100]  # not looked at
    _, distance = Judge(workload(lambda found: np.ones(40)), reference).search_half(changed)
    assert distance == pytest.approx(4 / 40)


def test_the_paired_interval_covers_and_is_narrower_than_an_unpaired_one():
    """Accuracies of 0.8 and 0.76 over 400 examples that agree on nearly all of them; 200 worlds, 90 % intervals."""
    covered, widths = 0, []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        theirs = (generator.random(800) < 0.8).astype(float)
        mine = np.where(generator.random(800) < 0.05, 0.0, theirs)  # loses one in twenty
        judge = Judge(workload(lambda found: found[:, 0], 800), theirs[:, None])
        found = judge(mine[:, None], "verdict")
        assert found.relative.low <= found.relative.value <= found.relative.high
        covered += found.relative.low <= 0.95 <= found.relative.high
        widths.append(found.relative.high - found.relative.low)
        assert found.quality.high - found.quality.low > widths[-1]
    assert 0.85 * 200 <= covered <= 0.95 * 200
    assert found.relative.level == 0.9


def test_neighbours_by_hand():
    """Four points on a circle; in the second set the first and the third have changed places."""
    turn = np.deg2rad([0, 10, 90, 110])
    a = np.stack([np.cos(turn), np.sin(turn)], 1)
    b = a[[2, 1, 0, 3]]
    first, ten = neighbour_agreement(a, b)
    # nearest in a: 1, 0, 3, 2; in b: 3, 2, 1, 0
    assert first == 0.0
    assert ten == pytest.approx(3 / 10 + 1 / 10)  # three others, and the point itself at the end, in both
    assert neighbour_agreement(a, 7 * a) == (1.0, pytest.approx(0.4))


def test_answers_that_flipped_are_counted_for_classes():
    reference = np.eye(4)[np.arange(40) % 4]
    changed = reference.copy()
    changed[1:9:2] = np.roll(changed[1:9:2], 1, axis=1)
    found = Judge(workload(lambda x: np.ones(len(x))), reference)(changed, "verdict")
    assert found.details["answers that flipped"] == 4 / 20


def test_a_lost_class_is_named():
    """20 answers of class 0, 4 of class 1, 2 of class 2: all of class 2 and one of class 1 are lost."""
    theirs = np.repeat([0, 1, 2], [20, 4, 2])
    mine = theirs.copy()
    mine[[20, 24, 25]] = 0
    assert flips(mine, theirs) == {
        "answers that flipped": 3 / 26,
        "answers that flipped, class 2": 1.0,
        "answers that flipped, class 1": 0.25,
    }
    many = np.arange(40) // 4  # ten classes of four; class k loses k of its answers, at most four
    lost = np.where(np.arange(40) % 4 < np.minimum(many, 4), (many + 1) % 10, many)
    assert list(flips(lost, many))[1:] == [f"answers that flipped, class {k}" for k in (4, 5, 6)]  # the worst, not any
    assert flips(theirs, theirs) == {"answers that flipped": 0.0}


def test_sure_holds_the_lower_end():
    reference = answers()
    found = reference + np.random.default_rng(1).normal(0, 0.3, reference.shape)
    plain = Judge(workload(None), reference).search_half(found[::2])[0]
    sure = Judge(workload(None), reference, Budget(sure=True)).search_half(found[::2])[0]
    assert plain == pytest.approx(float(cosine(found[::2], reference[::2]).mean()))
    assert sure < plain


@pytest.mark.parametrize(
    ("score", "line"),
    [
        (lambda x: np.full(40, np.nan), "the score 'points' gave NaN or infinity"),
        (lambda x: np.r_[np.ones(39), np.inf], "the score 'points' gave NaN or infinity"),
        (lambda x: np.ones(39), "the score gave 39 values for 40 examples; give one each, or one in all"),
        (lambda x: np.zeros(40), "the original's points is 0; a share of it means nothing"),
        (lambda x: -1.0, "the original's points is -1; a share of it means nothing"),
        (lambda x: x["logits"], r"the score 'points' fails on answers of shape \(40, 8\): IndexError"),
        (lambda x: "good", r"the score 'points' fails on answers of shape \(40, 8\): ValueError"),
    ],
)
def test_a_bad_score_is_one_clear_line(score, line):
    with pytest.raises(WorkloadError, match=line) as error:
        Judge(workload(score), answers())
    assert "\n" not in str(error.value)


def test_one_score_for_all_examples_will_do():
    """Then there are no halves, and no interval from examples."""
    judge = Judge(workload(lambda found: float(found.mean())), np.full((40, 2), 2.0))
    found = judge(np.full((40, 2), 1.5), "verdict")
    assert (found.quality.value, found.relative.value) == (1.5, 0.75)
    assert (found.relative.low, found.relative.high) == (0.75, 0.75)
    assert judge.search_half(np.full((40, 2), 1.5))[0] == 0.75


def test_tensors_and_booleans_are_scores_too():
    judge = Judge(workload(lambda found: torch.from_numpy(found[:, 0] > 0)), np.ones((40, 2)))
    assert judge(np.ones((40, 2)), "all").relative.value == 1
