"""The fits: algorithms that find the point of a form under a metric."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from perjoule.compress.fit.learned import learned
from perjoule.compress.fit.nearest import nearest
from perjoule.compress.fit.second_order import second_order
from perjoule.compress.forms.base import Form, Metric, Packed
from perjoule.compress.placed import beside

Fit = Callable[[Form, Tensor, Metric], Packed]


def _placed(fit: Fit) -> Fit:
    """`fit` on whatever device the weights are."""

    @wraps(fit)
    def there(form: Form, w_OI: Tensor, metric: Metric) -> Packed:
        with beside(w_OI):
            return fit(form, w_OI, metric)

    return there


FITS: dict[str, Fit] = {
    "nearest": _placed(nearest),
    "second_order": _placed(second_order),
    "learned": _placed(learned),
}
