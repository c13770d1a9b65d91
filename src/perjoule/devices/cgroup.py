"""CPU seconds of control groups: of a container, a systemd unit, a batch job, whatever comes and goes inside it.

    v2   cpu.stat        usage_usec, microseconds
    v1   cpuacct.usage   nanoseconds, in the hierarchy of cpuacct

The kernel keeps both for all processes that the group and the groups below it have ever held, so one that lived between
two readings is in them too, which no walk over processes can give. One small file a reading, about 15 us.

A group that has gone (a container that has ended) keeps what it had used; one made again under the same name (a unit
that was restarted) starts at zero and is added to it.

Names: a path, or what `systemd-cgls` prints, taken below /sys/fs/cgroup. Groups that lie one inside the other are
refused together: the outer one has the inner one's seconds already.
Source   Documentation/admin-guide/cgroup-v2.rst (CPU interface files), cgroup-v1/cpuacct.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from perjoule.core.errors import BadInput

ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup/cpuacct"))
_S_PER_US, _S_PER_NS = 1e-6, 1e-9


class CgroupTime:
    """CPU seconds of `groups` together, as one figure that only grows. Only differences mean anything."""

    def __init__(self, groups: Iterable[str], *, roots: tuple[Path, ...] = ROOTS) -> None:
        self._files = [_file(name, roots) for name in groups]
        folders = [file.parent.resolve() for file in self._files]
        for one in folders:
            for other in folders:
                if one in other.parents or (one == other and folders.count(one) > 1):
                    raise BadInput(f"cgroup {other.name} lies inside cgroup {one.name}; give the outer one alone")
        self.name = f"cgroup {', '.join(dict.fromkeys(f.name for f in folders))}"
        self._before_s = [0.0] * len(folders)
        self._last_s = [_used_s(file) or 0.0 for file in self._files]

    def cpu_s(self, now_s: float = 0.0) -> float:
        """Seconds of work so far."""
        for i, file in enumerate(self._files):
            used_s = _used_s(file)
            if used_s is None:
                continue
            if used_s < self._last_s[i]:
                self._before_s[i] += self._last_s[i]
            self._last_s[i] = used_s
        return sum(self._before_s) + sum(self._last_s)


def _file(name: str, roots: tuple[Path, ...]) -> Path:
    """The file of a group that shows its CPU time."""
    relative = name.strip("/")
    for folder in (Path(name), *(root / relative for root in roots)):
        for file in (folder / "cpu.stat", folder / "cpuacct.usage"):
            if folder.is_absolute() and _used_s(file) is not None:
                return file
    raise BadInput(
        f"no control group '{name}' with CPU times (cpu.stat or cpuacct.usage) below {roots[0]}; "
        "give its path there, as systemd-cgls or /proc/PID/cgroup show it"
    )


def _used_s(file: Path) -> float | None:
    """CPU seconds in a file; None where there is none, or none of its own (cpu.stat of a v1 hierarchy)."""
    try:
        text = file.read_text()
        if file.name == "cpuacct.usage":
            return int(text) * _S_PER_NS
        fields = dict(line.split(maxsplit=1) for line in text.splitlines())
        return int(fields["usage_usec"]) * _S_PER_US
    except (OSError, ValueError, KeyError):
        return None
