"""Memory that can be had, from files as Linux has them."""

from __future__ import annotations

import pytest

from fastinterp.system.available_memory import available_memory

MB = 1 << 20
STAT = f"anon 5\ninactive_file {30 * MB}\nactive_file {20 * MB}\n"


def made(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9999999 kB\nMemAvailable:  1024000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * MB),
        ({"proc/self/cgroup": "0::/none/of/these\n"}, 1000 * MB),
        (  # v2: the limit may be that of a group around; files that are cached make room
            {
                "proc/self/cgroup": "0::/pods/one\n",
                "sys/fs/cgroup/pods/memory.max": f"{400 * MB}\n",
                "sys/fs/cgroup/pods/memory.current": f"{150 * MB}\n",
                "sys/fs/cgroup/pods/memory.stat": STAT,
                "sys/fs/cgroup/pods/one/memory.max": "max\n",
                "sys/fs/cgroup/pods/one/memory.current": f"{150 * MB}\n",
                "sys/fs/cgroup/pods/one/memory.stat": STAT,
            },
            300 * MB,
        ),
        (  # v2 in a container, which sees its own group at the top
            {
                "proc/self/cgroup": "0::/../one\n",
                "sys/fs/cgroup/memory.max": f"{100 * MB}\n",
                "sys/fs/cgroup/memory.current": f"{200 * MB}\n",
                "sys/fs/cgroup/memory.stat": STAT,
            },
            0,
        ),
        (  # v1
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
                "sys/fs/cgroup/memory/memory.stat": STAT,
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{200 * MB}\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{100 * MB}\n",
                "sys/fs/cgroup/memory/x/memory.stat": f"total_inactive_file {40 * MB}\ntotal_active_file 0\n" + STAT,
            },
            140 * MB,
        ),
    ],
    ids=["none", "unknown", "v2", "container", "v1"],
)
def test_the_tightest_limit_counts(tmp_path, files, expected):
    assert available_memory(made(tmp_path, MACHINE | files)) == expected


def test_of_this_machine():
    assert available_memory() > 0
