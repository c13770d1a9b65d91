"""What every form must do, as a suite to subclass: a new form inherits its tests.

    class TestMyForm(FormConformance):
        bad = ({"share": 0.0}, {"share": 1.5})

        @pytest.fixture
        def form(self) -> Form:
            return MyForm(share=0.25)

Shapes   O outputs, I inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from perjoule.compress.fit import FITS
from perjoule.compress.forms import FORMS, Form, Metric, Packed
from perjoule.compress.forms.base import from_config
from perjoule.core.errors import ConfigError
from perjoule.testing.saliencies import statistics


class FormConformance:
    """Subclass and provide one `form` fixture."""

    shape: ClassVar[tuple[int, int]] = (12, 64)
    """Rows and columns of the matrices that the form is tried on; it must accept them."""
    shapes: ClassVar[Sequence[tuple[int, int]]] = ((1, 16), (8, 32), (7, 48), (13, 64), (5, 33), (3, 130), (31, 272))
    """Further shapes, odd ones among them; a form may refuse some, with one clear line."""
    bad: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Fields that must be refused. At least one."""
    second_order: ClassVar[bool] = True
    """Whether the form has a second-order fit."""

    @pytest.fixture
    def form(self) -> Form:
        raise NotImplementedError("provide a `form` fixture")

    def finish(self, packed: Packed) -> Packed:
        """What applying the form to a whole model adds to `packed`; most forms are complete as they are."""
        return packed

    def candidates(self, packed: Packed) -> list[Tensor]:
        """Other members of the set, which the nearest point must not be worse than."""
        dense = packed.dense()
        return [torch.zeros_like(dense), 0.5 * dense, 0.9 * dense, 1.1 * dense]

    def weight(self, shape: tuple[int, int] | None = None, seed: int = 3) -> Tensor:
        return torch.randn(shape or self.shape, generator=torch.Generator().manual_seed(seed))

    def metric(self, shape: tuple[int, int] | None = None, *, rows: bool = False) -> Metric:
        """The second-order metric of correlated inputs."""
        o, i = shape or self.shape
        stats = statistics(i, o)
        diagonal_OI = stats.h_II.diagonal()[None]
        return Metric(diagonal_OI=diagonal_OI, full_II=stats.h_II, rows_O=stats.g_O if rows else None)

    def fits(self) -> list[str]:
        return [name for name in FITS if name == "nearest" or self.second_order]

    def test_its_configuration_is_json_that_rebuilds_it(self, form: Form) -> None:
        text = json.dumps(form.config())
        rebuilt = from_config(json.loads(text), {**FORMS, type(form).__name__: type(form)})
        assert rebuilt == form
        assert type(rebuilt) is type(form)

    def test_bytes_are_known_before_it_is_fitted(self, form: Form) -> None:
        for shape in (self.shape, *self.shapes):
            w_OI, metric = self.weight(shape), self.metric(shape)
            try:
                predicted = form.nbytes(*shape)
            except ConfigError:
                assert shape != self.shape, "the form refuses the shape that its suite is for"
                with pytest.raises(ConfigError) as caught:  # what has no size cannot be fitted either
                    form.nearest(w_OI, metric)
                assert "\n" not in str(caught.value)
                continue
            for fit in self.fits():
                packed = self.finish(FITS[fit](form, w_OI, metric))
                assert packed.nbytes == predicted, f"{form.describe()} on {shape}, {fit} fit"

    def test_decoding_gives_a_matrix_like_the_original(self, form: Form) -> None:
        for fit in self.fits():
            dense = FITS[fit](form, self.weight(), self.metric()).dense()
            assert dense.shape == self.shape
            assert dense.dtype == torch.float32
            assert torch.isfinite(dense).all()

    def test_it_is_deterministic(self, form: Form) -> None:
        for fit in self.fits():
            first, second = (FITS[fit](form, self.weight(), self.metric()) for _ in range(2))
            assert first.tensors().keys() == second.tensors().keys()
            for name, tensor in first.tensors().items():
                assert torch.equal(tensor, second.tensors()[name])

    def test_what_is_given_stays_as_it_is(self, form: Form) -> None:
        for fit in self.fits():
            w_OI, metric = self.weight(), self.metric(rows=True)
            FITS[fit](form, w_OI, metric)
            assert torch.equal(w_OI, self.weight())
            assert metric.full_II is not None
            untouched = self.metric().full_II
            assert untouched is not None
            assert torch.equal(metric.full_II, untouched)

    def test_a_member_of_the_set_is_not_moved(self, form: Form) -> None:
        for fit in self.fits():
            member = form.nearest(self.weight(), self.metric()).dense()
            again = FITS[fit](form, member, self.metric()).dense()
            assert torch.allclose(again, member, atol=2e-4, rtol=1e-4), fit

    def test_no_candidate_is_nearer(self, form: Form) -> None:
        for rows in (False, True):
            full = self.metric(rows=rows)
            diagonal = Metric(diagonal_OI=full.diagonal_OI, rows_O=full.rows_O)
            packed = form.nearest(self.weight(), diagonal)
            error = diagonal.error(self.weight() - packed.dense())
            for number, other in enumerate(self.candidates(packed)):
                assert error <= diagonal.error(self.weight() - other) * (1 + 1e-6), f"candidate {number} is nearer"

    def test_second_order_is_better_on_correlated_inputs(self, form: Form) -> None:
        metric = self.metric()
        if not self.second_order:
            with pytest.raises(ConfigError) as caught:
                FITS["second_order"](form, self.weight(), metric)
            assert "\n" not in str(caught.value)
            return
        for seed in range(3):
            w_OI = self.weight(seed=seed)
            simple, better, best = (metric.error(w_OI - FITS[f](form, w_OI, metric).dense()) for f in self.fits())
            assert better <= simple * (1 + 1e-5)
            assert best <= better * (1 + 1e-5)

    def test_second_order_needs_a_second_order_metric(self, form: Form) -> None:
        if self.second_order:
            with pytest.raises(ConfigError, match="second_order"):
                FITS["second_order"](form, self.weight(), Metric(diagonal_OI=torch.ones(1, self.shape[1])))

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_broken_weights_are_refused(self, form: Form, poison: float) -> None:
        for fit in self.fits():
            w_OI = self.weight()
            w_OI[0, 0] = poison
            with pytest.raises(ConfigError) as caught:
                FITS[fit](form, w_OI, self.metric())
            assert "\n" not in str(caught.value)

    def test_fields_outside_their_range_are_refused(self, form: Form) -> None:
        assert self.bad, "say which fields are bad"
        for fields in self.bad:
            with pytest.raises(ConfigError) as caught:
                type(form)(**{**{k: v for k, v in form.config().items() if k != "name"}, **fields})
            assert "\n" not in str(caught.value), fields
            assert str(caught.value), fields

    def test_it_says_what_it_is_and_where_it_comes_from(self, form: Form) -> None:
        assert form.describe()
        assert "\n" not in form.describe()
        assert form.cite, "a method names its source"
        assert all(re.search(r"\b(19|20)\d\d\b", source) for source in form.cite)
