"""The fits: algorithms that find the point of a form under a metric."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from perjoule.compress.fit.learned import learned
from perjoule.compress.fit.nearest import nearest
from perjoule.compress.fit.second_order import second_order
from perjoule.compress.forms.base import Form, Metric, Packed

FITS: dict[str, Callable[[Form, Tensor, Metric], Packed]] = {
    "nearest": nearest,
    "second_order": second_order,
    "learned": learned,
}
