"""How much memory this process may take: of the machine, of its control group, and by its own limits. Framework-neutral."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["of_process"]


def of_process() -> int | None:
    """The least of the machine's memory, the control group's limit and RLIMIT_AS and RLIMIT_DATA; None where none is known."""
    found = [limit for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA) if (limit := resource.getrlimit(which)[0]) >= 0]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    except OSError:
        pass
    return min(found, default=None)
