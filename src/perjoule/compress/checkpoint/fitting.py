"""One matrix, or several that read the same inputs, from weights to what is stored.

Without data, a form that takes rows apart is fitted a portion of rows at a time: besides the codes only one portion is
in memory. With data, matrices of the same inputs, form and fit are stacked one below the other where the form takes
rows apart: one factorisation of H and one sweep serve all of them.

Shapes   O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from perjoule.compress.apply import metric_for
from perjoule.compress.checkpoint.choice import Chosen
from perjoule.compress.checkpoint.inputs import matrix_of
from perjoule.compress.checkpoint.stored import joined, split
from perjoule.compress.checkpoint.tensors import Held
from perjoule.compress.fit import FITS
from perjoule.compress.forms import Packed
from perjoule.compress.saliency import Statistics
from perjoule.compress.sites import Site
from perjoule.core.errors import BadInput, ConfigError

PORTION = 1 << 20
"""Weights that are fitted at once where rows are apart and no data are looked at."""


def site_of(what: Chosen) -> Site:
    """The site that other parts of the package know it as."""
    return Site(name=what.site, kind="linear", layer="Linear", parameters=("weight",), shapes=(what.shape,))


def blind(what: Chosen, held: Held, seed: int) -> Packed:
    """A tensor, fitted without data."""
    rows, columns = what.shape
    apart = what.form.rows_apart and what.saliency == "identity" and len(held.shape) == 2
    portion = max(1, PORTION // columns) if apart else rows
    parts: list[Packed] = []
    for start in range(0, rows, portion):
        w = held.read(slice(start, start + portion)) if apart else held.read().reshape(what.shape)
        parts.append(_fitted([what], w.float(), None, seed))
    return joined(parts)


def seeing(whats: Sequence[Chosen], held: Mapping[str, Held], stats: Statistics | None, seed: int) -> list[Packed]:
    """Matrices that read the same inputs, fitted under their statistics; None: no input was ever seen, M = 1."""
    together: dict[int, list[Chosen]] = {}
    for what in whats:
        alike = next((k for k, v in together.items() if _stackable(v[0], what)), len(together))
        together.setdefault(alike, []).append(what)
    found: dict[str, Packed] = {}
    for group in together.values():
        w_OI = torch.cat([matrix_of(w, held[w.tensor]).float() for w in group])
        packed = _fitted(group, w_OI, stats or _unseen(group[0]), seed)
        del w_OI
        sizes = [w.shape[0] for w in group]
        found |= {w.key: p for w, p in zip(group, split(packed, sizes), strict=True)}
    return [found[w.key] for w in whats]


def _stackable(a: Chosen, b: Chosen) -> bool:
    same = a.form == b.form and a.fit == b.fit and a.saliency == b.saliency and a.shape[1] == b.shape[1]
    return same and a.form.rows_apart and a.saliency != "random"


def _unseen(what: Chosen) -> Statistics:
    columns = what.shape[1]
    zero = torch.zeros(columns)
    return Statistics(h_II=torch.eye(columns), mean_I=zero, g_O=None, low=0.0, high=0.0, step2=0.0, rows=0)


def _fitted(group: Sequence[Chosen], w_OI: Tensor, stats: Statistics | None, seed: int) -> Packed:
    what = group[0]
    names = ", ".join(w.site for w in group)
    try:
        metric = metric_for(site_of(what), w_OI, what.saliency, stats, seed)
        return FITS[what.fit](what.form, w_OI, metric)
    except ConfigError as error:
        raise ConfigError(f"{names}: {error}") from error
    except LinAlgError as error:
        raise BadInput(f"{names}: its calibration inputs are not finite, or nearly alike: no factor of H") from error
