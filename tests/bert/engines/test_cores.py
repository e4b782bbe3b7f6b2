"""Which cores each process of a machine gets, on machines made up of files as Linux has them."""

import os
import subprocess
import sys

import pytest

from bert.engines.choosing import choose_device
from bert.engines.cores import Core, describe, format_cpus, nodes, parse_cpus, read_cores, share
from tests import ROOT


def make_machine(folder, sockets, cores, threads):
    """A machine of several sockets, which numbers its CPUs as x86 servers do: the first thread of every core, then the
    second of every core."""
    count = sockets * cores
    for socket in range(sockets):
        (folder / "node" / f"node{socket}").mkdir(parents=True)
        own = range(socket * cores, (socket + 1) * cores)
        cpus = [core + count * thread for thread in range(threads) for core in own]
        (folder / "node" / f"node{socket}" / "cpulist").write_text(format_cpus(cpus) + "\n")
        for core in own:
            siblings = [core + count * thread for thread in range(threads)]
            for cpu in siblings:
                place = folder / "cpu" / f"cpu{cpu}" / "topology"
                place.mkdir(parents=True)
                (place / "thread_siblings_list").write_text(format_cpus(siblings) + "\n")
    return str(folder)


@pytest.mark.parametrize("text, cpus", [("0-3,8\n", [0, 1, 2, 3, 8]), ("5", [5]), ("0,2-3", [0, 2, 3]), ("\n", [])])
def test_lists_of_cpus_are_read_and_written_as_linux_writes_them(text, cpus):
    assert parse_cpus(text) == cpus and format_cpus(reversed(cpus)) == text.strip()


def test_hyperthreads_of_a_core_stay_together_and_each_process_gets_a_socket(tmp_path):
    cores = read_cores(set(range(16)), make_machine(tmp_path, sockets=2, cores=4, threads=2))
    assert len(cores) == 8 and cores[0] == Core(0, (0, 8)) and cores[4] == Core(1, (4, 12))
    assert [share(cores, rank, 2) for rank in range(2)] == nodes(cores)
    assert describe(share(cores, 1, 2), 8) == "4 of 8 cores: 4-7,12-15"


@pytest.mark.parametrize("sockets, cores, threads", [(1, 7, 1), (2, 3, 2), (2, 8, 1), (4, 5, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_even_and_have_each_core_once(tmp_path, sockets, cores, threads, size):
    every = read_cores(set(range(sockets * cores * threads)), make_machine(tmp_path, sockets, cores, threads))
    shares = [share(every, rank, size) for rank in range(size)]
    assert [core for part in shares for core in part] == every
    counts = [len(part) for part in shares]
    assert max(counts) - min(counts) <= 1
    if size % sockets == 0 and cores % (size // sockets) == 0:
        assert all(len(nodes(part)) == 1 for part in shares)


def test_only_cpus_that_the_process_may_use_are_shared(tmp_path):
    machine = make_machine(tmp_path, sockets=2, cores=4, threads=2)
    cores = read_cores({2, 3, 4, 11}, machine)  # 11 is the second thread of core 3
    assert cores == [Core(0, (2,)), Core(0, (3, 11)), Core(1, (4,))]
    assert share(cores, 0, 2) == cores[:1] and share(cores, 1, 2) == cores[1:]


def test_more_processes_than_cores_share_them_evenly(tmp_path):
    cores = read_cores({0, 1, 4, 5}, make_machine(tmp_path, sockets=1, cores=4, threads=2))
    assert [share(cores, rank, 4) for rank in range(4)] == [cores[:1], cores[:1], cores[1:], cores[1:]]


def test_where_linux_says_nothing_each_cpu_is_a_core(tmp_path):
    assert read_cores({3, 1}, str(tmp_path)) == [Core(0, (1,)), Core(0, (3,))]


BOUND = """
import os, torch
from bert.engines.choosing import choose_device, take_cores
before = choose_device("cpu")
take_cores()
print(before == choose_device("cpu"), before[1], sorted(os.sched_getaffinity(0)), torch.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot choose cores here")
def test_processes_bind_themselves_to_their_share_but_keep_what_a_launcher_gave_them():
    allowed = os.sched_getaffinity(0)
    cores = read_cores(allowed)

    def run(rank, cpus=None):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        bind = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
        environment = {**os.environ, **ranks, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
        command = [sys.executable, "-c", BOUND]
        return subprocess.run(command, env=environment, preexec_fn=bind, check=True, capture_output=True, text=True)

    def expected(own):
        cpus = sorted(cpu for core in own for cpu in core.cpus)
        return f"True cpu ({describe(own, len(cores))}) {cpus} {len(own)}\n"

    assert run(1).stdout == expected(share(cores, 1, 2))
    if len(cores) > 1:
        assert run(0, set(cores[-1].cpus)).stdout == expected(cores[-1:])


def test_a_process_alone_says_its_threads():
    assert "threads" in choose_device("cpu")[1]
