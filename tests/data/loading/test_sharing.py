"""One loader process for all processes of a machine, and its parts of a global batch."""

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError, LoaderDied
from data.loading import sharing
from data.loading.loader import Loader, LoaderSettings
from data.loading.process import serve
from data.loading.ring import SlotRows, ring_bytes, ring_slots, shared_file
from data.loading.shard_files import open_shards
from data.loading.sharing import LocalRanks, connect, listen
from data.loading.windows import ShardFiles
from data.masking import choice_reference
from data.rows import WHOLE, Part
from data.shards import write_shard
from data.subprocesses import PROJECT
from tests.data.loading.test_loader import assert_ends, assert_same, is_running
from tests.make_samples import bert_samples, write_random_shards

# Two processes of a pipeline have the same part.
PARTS = [Part(0, 2), Part(1, 2), Part(0, 2)]
SLOTS = 3


class Enough(Exception):
    pass


def assembled(shards, options, parts, count):
    """The first `count` batches as the loader's process assembles them: for each (arrays of each part, message)."""
    rows, layout = SlotRows(parts, options.batch_size), None
    layout = options.layout(shards[0], rows.count)
    batches, choose = [], choice_reference(shards[0].masked_units)
    with shared_file(ring_bytes(layout, options.slots)) as file:
        slots = ring_slots(file.fileno(), layout, options.slots)

        def tell(message):
            slot = slots[message.pop("slot")]
            places = [
                range(rows.first(part), rows.first(part) + message["filled"][i]) for i, part in enumerate(rows.parts)
            ]
            batches.append(
                ({p: {n: a[place].copy() for n, a in slot.items()} for p, place in zip(rows.parts, places)}, message)
            )
            del message["filled"]
            if len(batches) == count:
                raise Enough

        request = {"settings": vars(options), "position": 0, "memory": file.fileno(), "choose": choose}
        with pytest.raises(Enough):
            serve(request, ShardFiles(shards), parts, queue.Queue(), tell)
    return batches


@pytest.fixture(scope="module")
def data_sets():
    """By masking: static, or dynamic of tokens or words; some words do not fit what is left to mask."""
    with tempfile.TemporaryDirectory() as folder:
        static = write_random_shards(folder, [90, 41])
        by_masking = {"static": open_shards(static)}
        samples = bert_samples(np.random.default_rng(1), 130, 32, 5)
        for name in ("mlm_positions", "mlm_labels", "mlm_counts"):
            getattr(samples, name)[:] = 0
        inner = np.packbits(np.arange(104) % 3 > 0).tobytes().hex()
        masking = {"masking": "dynamic", "mask_share": 0.15, "special_ids": [0, 1, 2, 3, 4], "continuations": inner}
        for units in ("tokens", "words"):
            path = os.path.join(folder, f"{units}.h5")
            write_shard(path, samples, 100, "0" * 64, {}, masking, 2)
            with h5py.File(path, "a") as file:
                file.attrs["masked_units"] = units
            by_masking[units] = open_shards([path])
        yield by_masking


@given(
    st.sampled_from(["static", "tokens", "words"]),
    st.sampled_from(["off", "samples", "rows"]),
    st.integers(1, 70),
    st.integers(1, 9),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_the_parts_of_all_machines_together_are_the_whole_batch(data_sets, masking, packing, batch_size, size, data):
    machines = data.draw(st.lists(st.lists(st.integers(0, size - 1), min_size=1, max_size=4), min_size=1, max_size=3))
    shards, options = data_sets[masking], LoaderSettings(batch_size, 5, packing, 3, slots=SLOTS)
    whole = assembled(shards, options, [WHOLE], SLOTS)
    for ranks in machines:
        parts = [Part(rank, size) for rank in ranks]
        for (arrays, message), (all_rows, expected) in zip(assembled(shards, options, parts, SLOTS), whole):
            assert message == expected and set(arrays) == set(parts)
            for part in parts:
                assert_same(arrays[part], part.of(all_rows[WHOLE]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_random_shards(tmp_path_factory.mktemp("shards"), [700, 501])


@pytest.fixture
def own_files(files, tmp_path):
    return [shutil.copy(path, str(tmp_path)) for path in files]


@contextlib.contextmanager
def endpoints(count):
    """A socket for each of `count` processes."""
    with contextlib.ExitStack() as closing:
        listener, address = listen()
        yield [closing.enter_context(s) for s in (listener, *(connect(address, rank) for rank in range(1, count)))]


OPTIONS = LoaderSettings(101, 5, "samples", 3)


@contextlib.contextmanager
def sharing_loaders(files):
    """A loader for each of PARTS, in this process."""
    with contextlib.ExitStack() as closing, endpoints(len(PARTS)) as sockets:
        shards = open_shards(files)
        yield [
            closing.enter_context(Loader(shards, OPTIONS, local=LocalRanks(PARTS, rank, endpoint)))
            for rank, endpoint in enumerate(sockets)
        ]


def copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def test_processes_get_their_parts_of_the_same_batches_at_their_own_pace(files):
    with Loader(open_shards(files), OPTIONS) as alone:
        expected = [(batch, copied(batch.arrays)) for batch in (alone.next() for _ in range(9))]
    with sharing_loaders(files) as loaders:

        def take(loader, part, seconds):
            for batch, arrays in expected:
                mine = loader.next()
                time.sleep(seconds)
                assert_same(mine.arrays, part.of(arrays))
                assert (mine.rows, mine.counts, mine.position) == (batch.rows, batch.counts, batch.position)

        for _ in range(OPTIONS.slots):  # the others get what is ready later
            loaders[0].next()
        del expected[: OPTIONS.slots]
        errors = run_together(
            lambda: take(loaders[0], PARTS[0], 0),
            lambda: take_from(loaders[1], OPTIONS.slots) or take(loaders[1], PARTS[1], 0.01),
            lambda: take_from(loaders[2], OPTIONS.slots) or take(loaders[2], PARTS[2], 0.03),
        )
        assert errors == [None] * 3


def take_from(loader, count):
    for _ in range(count):
        loader.next()


def run_together(*works):
    """What each raised, in threads of their own."""
    errors = [None] * len(works)

    def run(index):
        try:
            works[index]()
        except BaseException as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return errors


def test_an_error_reaches_every_process(own_files):
    def until_it_fails(loader):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            loader.check()
            time.sleep(0.01)

    with sharing_loaders(own_files) as loaders:
        take_from(loaders[1], 1)
        os.remove(own_files[1])
        errors = run_together(*(lambda loader=loader: until_it_fails(loader) for loader in loaders))
        assert all(isinstance(error, InputError) and f"{own_files[1]}: was removed" in str(error) for error in errors)


def test_a_slot_has_room_for_the_parts_alone():
    rows = [SlotRows([Part(rank, 8)], 65536).count for rank in range(8)]
    assert rows == [8192] * 8 and SlotRows([WHOLE], 65536).count == 65536
    assert SlotRows([Part(0, 8), Part(1, 8), Part(0, 8), Part(1, 8)], 100).count == 2 * 13


def is_refused(address):
    try:
        with connect(address, 1) as connection:
            return connection.recv(1) == b""
    except (LoaderDied, ConnectionResetError):
        return True


def test_another_users_process_gets_nothing_nor_does_one_that_says_nothing(files, monkeypatch):
    messages = queue.Queue()
    listener, address = listen()
    with shared_file(4096) as memory:
        clients = sharing.Clients(listener.detach(), 2, memory.fileno(), messages)
        monkeypatch.setattr(sharing.os, "getuid", lambda: os.geteuid() + 1)
        assert is_refused(address)
        monkeypatch.undo()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(f"\0{address}")
            clients.reply("missed")
            with connect(address, 1) as mine:
                descriptor = sharing.Connection(mine).receive_descriptor()
                assert os.fstat(descriptor).st_size == 4096
                os.close(descriptor)
                assert mine.recv(100) == b'"missed"\n'
                assert is_refused(address)  # all are there
                mine.sendall(b"[1, 2]\n")
                assert messages.get(timeout=10) == [1, 2]
                mine.shutdown(socket.SHUT_RDWR)
            assert messages.get(timeout=10) == [1, None]


def test_where_the_first_process_fails_before_it_opens_the_loader_the_others_learn_it(files):
    with endpoints(2) as (listener, endpoint):
        listener.close()
        with pytest.raises(LoaderDied, match="has ended, or the first process of this machine"):
            Loader(open_shards(files), OPTIONS, local=LocalRanks(PARTS[:2], 1, endpoint))
    listener, address = listen()
    listener.close()
    with pytest.raises(LoaderDied, match="the first process of this machine, which starts the loader, has ended"):
        connect(address, 1)


PROCESS = f"""
import json, sys
sys.path.insert(0, {PROJECT!r})
from data.loading.loader import Loader, LoaderSettings
from data.loading.shard_files import open_shards
from data.loading.sharing import LocalRanks, connect, listen
from data.rows import Part
files, rank, address = json.loads(sys.argv[1])
if rank == 0:
    endpoint, address = listen()
    print(address, flush=True)
else:
    endpoint = connect(address, rank)
parts = [Part(number, 3) for number in range(3)]
with Loader(open_shards(files), LoaderSettings(64, 5), local=LocalRanks(parts, rank, endpoint)) as loader:
    endpoint.close()
    print(loader._process.process.pid if rank == 0 else 0, flush=True)
    for line in sys.stdin:
        print(loader.next().position, flush=True)
"""


def has_sockets(address):
    with open("/proc/net/unix") as sockets:
        return address in sockets.read()


@contextlib.contextmanager
def three_processes(files):
    """Three processes that share a loader, and the loader's process id. A process takes a batch for each line."""
    started = []

    def start(rank, address):
        command = [sys.executable, "-c", PROCESS, json.dumps([files, rank, address])]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1].stdout.readline().strip()

    try:
        address = start(0, "")
        pid = int(started[0].stdout.readline())
        for rank in (1, 2):
            assert start(rank, address) == "0"
        yield started, pid
        for process in started:
            process.kill()
            process.wait()
        assert_ends(pid, 10)
        deadline = time.monotonic() + 10
        while has_sockets(address):
            assert time.monotonic() < deadline
    finally:
        for process in started:
            with process:
                process.kill()


def take_one(process):
    """The position of its next batch."""
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_where_a_process_ends_that_connected_the_others_go_on(files, how):
    with three_processes(files) as (started, _):
        assert [take_one(process) for process in started] == [64] * 3
        if how is None:
            started[2].stdin.close()
        else:
            started[2].send_signal(how)
        for batch in range(2, 10):
            assert [take_one(process) for process in started[:2]] == [64 * batch] * 2


@pytest.mark.parametrize("killed", ["first process", "loader"])
def test_where_the_first_process_or_the_loader_is_killed_all_end(files, killed):
    with three_processes(files) as (started, pid):
        assert [take_one(process) for process in started] == [64] * 3
        os.kill(pid if killed == "loader" else started[0].pid, signal.SIGKILL)
        for process in started[killed != "loader" :]:
            began = time.monotonic()
            _, errors = process.communicate("\n" * 5, timeout=20)
            assert process.returncode == 1 and "LoaderDied: the loader's process " in errors
            assert time.monotonic() - began < 10
        assert_ends(pid, 10)
