"""Data transfer: bytes of a block of code, its local joules, and apart from them what the network may have drawn.

    local     what the meter measured on this machine; it holds this machine's cards, disks and CPUs, and nothing else
    network   modelled, two methods, never added to the local joules:
        average   bytes x energy per byte of all networks over all traffic: what share of them is accounted to it
        marginal  bits x slope of the power model: what they draw more because of it, which is far less, since
                  networks draw nearly the same with and without traffic

    average   0.06 kWh/GB in 2015, halving every two years; 0.0065 kWh/GB in 2020. Upper bound: no better since 2020;
              lower: halving went on; value: their geometric middle. Core and access, no router at home, no server.
    marginal  0.03 W per Mbit/s of a fixed line's core and access; 0.01 to 0.05 as its interval (0.02 more for the
              equipment at the premises). The baseline of 1.5 W a line is drawn anyway and is not in it.

Cost     two looks at counters, some milliseconds.
Source   Aslan, Mayers, Koomey and France 2018, J. Ind. Ecol. 22 (785-798); Carbon Trust 2021, Carbon impact of video
         streaming, table 3 (0.0065); Malmodin 2020, Electronics Goes Green, section 4.5 and figure 8 (the slope);
         Mytton, Lunden and Malmodin 2024, J. Ind. Ecol. 28 (966-980): energy is not proportional to volume.
Left out mobile networks (1.5 W per Mbit/s), and traffic that stays inside a data centre, which costs less than both
         methods say: where bytes went is not known from counters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from perjoule.core.errors import MeterError
from perjoule.core.reading import Estimate, Reading
from perjoule.core.units import J_PER_KWH
from perjoule.devices.traffic import Traffic, traffic
from perjoule.measure.meter import Meter

KWH_PER_GB_2020 = 0.0065
HALVING_YEARS = 2.0
W_PER_MBIT_S = (0.03, 0.01, 0.05)
_GB, _MBIT = 1e9, 1e6


@dataclass(frozen=True, kw_only=True)
class Remote:
    """What the network may have drawn for it, by one method."""

    method: Literal["average", "marginal"]
    energy_j: Estimate


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Bytes and joules of a block."""

    moved: Traffic
    local: Reading
    """Of the whole block, on this machine."""
    remote: tuple[Remote, ...]
    """Of the network, apart; methods exclude each other, so they must not be added either."""
    notes: tuple[str, ...] = ()


class Moving:
    """Counts and measures a `with` block.

    with Moving() as moving:
        download()
    moving.found                        # Transfer
    """

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = tuple(pids)
        self._found: Transfer | None = None

    def __enter__(self) -> Self:
        self._meter = Meter(pids=self._pids).start()
        self._before = traffic(self._pids)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = traffic(self._pids)
        self._found = transfer(after.since(self._before), self._meter.stop())

    @property
    def found(self) -> Transfer:
        """What the block took; after its end."""
        if self._found is None:
            raise MeterError("the block has not ended; ask for `found` after `with Moving() as moving:`")
        return self._found


def transfer(moved: Traffic, local: Reading) -> Transfer:
    """What these bytes and this reading mean."""
    notes = ["network bytes are those of the whole machine: the system keeps no count per process"]
    if moved.unseen:
        notes.append(f"disk bytes of {moved.unseen} processes could not be read")
    return Transfer(moved=moved, local=local, remote=remote(_through(moved)), notes=tuple(notes))


def remote(nbytes: int, year: int | None = None) -> tuple[Remote, ...]:
    """Joules outside this machine for `nbytes` through a fixed network, by both methods. `year`: default, this one."""
    years = (time.localtime().tm_year if year is None else year) - 2020
    ends = sorted((1.0, 2 ** (-years / HALVING_YEARS)))
    average_j = nbytes / _GB * KWH_PER_GB_2020 * J_PER_KWH
    slope, low, high = (w * nbytes * 8 / _MBIT for w in W_PER_MBIT_S)
    return (
        Remote(
            method="average",
            energy_j=Estimate(
                value=average_j * math.sqrt(ends[0] * ends[1]), low=average_j * ends[0], high=average_j * ends[1],
                how="assumed", source="kWh per GB of fixed networks, Aslan 2018 and Carbon Trust 2021",
            ),
        ),
        Remote(
            method="marginal",
            energy_j=Estimate(
                value=slope, low=low, high=high, how="assumed", source="W per Mbit/s of a fixed line, Malmodin 2020",
            ),
        ),
    )  # fmt: skip


def _through(moved: Traffic) -> int:
    return moved.network_received_bytes + moved.network_sent_bytes
