"""Nearest: every weight for itself; optimal when the metric is diagonal."""

from __future__ import annotations

from torch import Tensor

from perjoule.compress.forms.base import Form, Metric, Packed, finite


def nearest(form: Form, w_OI: Tensor, metric: Metric) -> Packed:
    """The point of `form` nearest to w_OI under the metric's diagonal."""
    finite(w_OI, form.describe())
    return form.nearest(w_OI, metric)
