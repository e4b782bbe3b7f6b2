"""Each process of a machine on cores of its own, near one memory. Linux alone lets a process choose its cores.

CPUs are what Linux numbers: the hardware threads of a core are several of them. A NUMA node is a part of a machine
whose cores share a memory, in most machines a socket.
"""

import contextlib
import glob
import os
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

__all__ = ["Core", "bind", "cores_of_process", "describe", "format_cpus", "nodes", "parse_cpus", "read_cores", "share"]

SYSTEM = "/sys/devices/system"


class Core(NamedTuple):
    """A physical core."""

    node: int
    cpus: Tuple[int, ...]
    """Its hardware threads, ascending."""


def parse_cpus(text: str) -> List[int]:
    """[0, 1, 2, 3, 8] of "0-3,8", as Linux writes lists of CPUs."""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return [cpu for first, *last in ends for cpu in range(int(first), int((last or [first])[0]) + 1)]


def format_cpus(cpus: Iterable[int]) -> str:
    """The reverse."""
    runs: List[List[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_cores(cpus: Set[int], system: str = SYSTEM) -> List[Core]:
    """The cores that have these CPUs, with no others, node after node. Where Linux does not say, all are one node, and
    each CPU is a core."""
    node_of: Dict[int, int] = {}
    for path in glob.glob(f"{system}/node/node[0-9]*/cpulist"):
        node = int(os.path.basename(os.path.dirname(path))[len("node") :])
        node_of.update(dict.fromkeys(read_cpus(path), node))
    siblings = {cpu: read_cpus(f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list") or [cpu] for cpu in cpus}
    cores = {tuple(sorted(cpus & set(threads))) for threads in siblings.values()}
    return sorted(Core(node_of.get(threads[0], 0), threads) for threads in cores)


def read_cpus(path: str) -> List[int]:
    try:
        with open(path) as file:
            return parse_cpus(file.read())
    except FileNotFoundError:
        return []


def share(cores: Sequence[Core], rank: int, size: int) -> List[Core]:
    """The cores of process `rank` of `size`: as many as the others have or one more, one after the other, so on as few
    nodes as that allows. Where there are fewer cores than processes, several have the same."""
    first, end = rank * len(cores) // size, (rank + 1) * len(cores) // size
    return list(cores[first : max(end, first + 1)])


def nodes(cores: Sequence[Core]) -> List[List[Core]]:
    """The cores of each node."""
    return [[core for core in cores if core.node == node] for node in sorted({core.node for core in cores})]


def cores_of_process() -> Optional[Tuple[List[Core], int]]:
    """The cores for this process, and how many they are of: torchrun's processes on a machine share those that torchrun
    may use. A process that has others than torchrun keeps them: a launcher has chosen them, or `bind`. None where
    processes cannot choose."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    mine, all_cpus = os.sched_getaffinity(0), os.sched_getaffinity(os.getppid())
    cores = read_cores(mine)
    if mine != all_cpus:
        return cores, len(read_cores(all_cpus))
    rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return share(cores, rank, size), len(cores)


def describe(cores: Sequence[Core], count: int) -> str:
    """`2 of 4 cores: 0-1`; what follows the colon are CPUs."""
    return f"{len(cores)} of {count} cores: {format_cpus(cpu for core in cores for cpu in core.cpus)}"


def bind(cores: Sequence[Core]) -> None:
    """Keeps this process to these cores, with a thread for each, whatever OMP_NUM_THREADS says: torchrun sets it to 1.
    Processes that it started before stay where they are."""
    import torch

    cpus = {cpu for core in cores for cpu in core.cpus}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cpus)
    torch.set_num_threads(len(cores))
