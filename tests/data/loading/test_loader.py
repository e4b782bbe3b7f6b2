import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from data.errors import InputError, LoaderDied
from data.foreign.nvidia import write_nvidia
from data.loading.loader import Loader, LoaderSettings, batches_in_order
from data.loading.order import Order, Window
from data.loading.shard_files import open_shards
from data.loading.windows import ShardFiles, locate
from data.masking import CHOICES, mask_dynamic, masking_of
from data.rows import unpacked_batch
from data.samples import Samples
from data.shards import read_samples, write_shard
from data.subprocesses import PROJECT
from tests.data.test_packing import samples_of
from tests.make_samples import bert_samples, write_random_shards

SIZES = [700, 0, 300, 500, 1]
TOTAL = sum(SIZES)


def open_loader(files, batch_size, position=0, skipped=None, **settings):
    """A loader of 100 tokens' shards, under seed 5 if nothing else is asked for."""
    skipped = dict(skipped or {})
    shards = open_shards(files, vocab_size=100, skipped=skipped if settings.get("skip_bad") else None)
    return Loader(shards, LoaderSettings(batch_size, **{"seed": 5, **settings}), position, skipped)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_random_shards(tmp_path_factory.mktemp("shards"), SIZES)


@pytest.fixture
def own_files(files, tmp_path):
    return [shutil.copy(path, str(tmp_path)) for path in files]


def reference_samples(files, seed, samples_seen, count):
    """The next `count` samples, looked up one window at a time in all samples."""
    shards = open_shards(files)
    everything = [read_samples(shard.path, 0, shard.num_samples) for shard in shards]
    parts, have = [], 0
    for window in Order([len(part) for part in everything], seed, 16).windows(samples_seen):
        blocks = [everything[shard].take(slice(start, stop)) for shard, start, stop in window.blocks.tolist()]
        parts.append(Samples.concatenate(blocks).take(window.rows))
        have += len(window.rows)
        if have >= count:
            return Samples.concatenate(parts).take(slice(0, count))


def reference_batch(files, batch_size, seed, index, samples_seen=0):
    return unpacked_batch(reference_samples(files, seed, samples_seen + index * batch_size, batch_size))


def stream(files, batch_size, count, **options):
    """`count` batches of a loader, copied."""
    with open_loader(files, batch_size, **options) as loader:
        batches = []
        for _ in range(count):
            batch = loader.next()
            assert batch.samples == batch_size
            assert batch.counts["mlm_weights"] == np.count_nonzero(batch.arrays["mlm_weights"])
            batches.append({name: array.copy() for name, array in batch.arrays.items()})
        return batches


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype and actual[name].tobytes() == expected[name].tobytes(), name


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(pid, seconds=3):
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


@pytest.mark.parametrize("workers, slots", [(1, 2), (2, 3), (5, 6)])
def test_batches_are_the_reference_bit_for_bit_with_any_workers_and_slots(files, workers, slots):
    # 12 batches of 256 are two epochs and a bit: batches span their ends.
    for index, batch in enumerate(stream(files, 256, 12, workers=workers, slots=slots)):
        assert_same(batch, reference_batch(files, 256, 5, index))


def test_windows_are_read_one_after_another(files, monkeypatch):
    # Windows of 2**27 tokens are beyond a test: a loader process with small ones.
    code = "import data.loading.order, data.loading.process as p; data.loading.order.WINDOW_TOKENS = 512 * 16; p.main()"
    start = subprocess.Popen
    with monkeypatch.context() as patched:
        patched.setattr(
            subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", code, command[-1]], **options)
        )
        actual = stream(files, 200, 20)
    monkeypatch.setattr("data.loading.order.WINDOW_TOKENS", 512 * 16)
    assert Order(SIZES, 5, 16).window_samples < TOTAL / 2
    for index, batch in enumerate(actual):
        assert_same(batch, reference_batch(files, 200, 5, index))


@pytest.mark.parametrize("samples_seen", [3 * 128, TOTAL - 1, 2 * TOTAL + 77])
def test_going_on_from_any_sample_is_the_uninterrupted_stream(files, samples_seen):
    for index, batch in enumerate(stream(files, 128, 4, position=samples_seen)):
        assert_same(batch, reference_batch(files, 128, 5, index, samples_seen))


def test_an_epoch_holds_every_sample_once_though_batches_span_its_end(files):
    batches = stream(files, 7 * 79, 3)  # 3 * 553 = 1659 samples of 1501
    actual = np.concatenate([batch["input_ids"] for batch in batches])[:TOTAL]
    expected = np.concatenate([read_samples(path, 0, size).input_ids for path, size in zip(files, SIZES)])
    assert sorted(map(bytes, actual)) == sorted(map(bytes, expected.astype(np.int32)))


def test_a_batch_may_be_larger_than_the_data_set(files):
    for index, batch in enumerate(stream(files, 4000, 2)):
        assert_same(batch, reference_batch(files, 4000, 5, index))


def test_the_loader_works_from_any_folder(files, tmp_path, monkeypatch):
    # A folder with packages of the same name, and shards named relative to it.
    for name in ("data", "numpy"):
        os.makedirs(str(tmp_path / name))
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not this one')")
    for path in files:
        shutil.copy(path, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with open_loader(["shard-*.hdf5"], 64) as loader:
        assert_same(loader.next().arrays, reference_batch(files, 64, 5, 0))


def test_arrays_stay_as_they_are_until_the_next_call(files):
    with open_loader(files, 64, slots=2) as loader:
        loader.next()
        batch = loader.next()
        before = {name: array.copy() for name, array in batch.arrays.items()}
        time.sleep(0.3)
        assert_same(batch.arrays, before)
        views = batch.arrays
    assert_same(views, before)


def test_closing_leaves_no_process_no_file_and_no_open_pipe(files):
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    before = set(os.listdir("/proc/self/fd"))
    loader = open_loader(files, 64)
    pid = loader._process.process.pid
    loader.next()
    loader.close()
    loader.close()
    assert not is_running(pid)
    assert not os.path.isdir("/dev/shm") or set(os.listdir("/dev/shm")) <= shared
    assert set(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def drain(loader):
    """The error that ends a loader, which must come within 2 seconds."""
    deadline = time.monotonic() + 2
    with pytest.raises((InputError, RuntimeError)) as error:
        while True:
            assert time.monotonic() < deadline, "no error came"
            loader.next()
    return error.value


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_loader_process_is_an_error_that_says_so(files, after):
    with open_loader(files, 64) as loader:
        for _ in range(after):
            loader.next()
        process = loader._process.process
        os.kill(process.pid, signal.SIGKILL)
        assert "was killed by SIGKILL: the machine may have run out of memory" in str(drain(loader))
        assert process.returncode == -signal.SIGKILL and not is_running(process.pid)


def test_a_loader_process_that_hangs_is_an_error_after_the_timeout(files):
    with Loader(open_shards(files), LoaderSettings(64, 5), timeout=60) as loader:
        loader.next()
        process, loader._timeout = loader._process.process, 0.2
        os.kill(process.pid, signal.SIGSTOP)
        assert "has sent nothing for 0.2 s" in str(drain(loader))
        assert not is_running(process.pid)


def test_a_loader_process_that_cannot_start_is_an_error_that_says_so(files, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with open_loader(files, 64) as loader:
        assert "ended with exit status 1" in str(drain(loader))


def test_an_unforeseen_error_comes_with_its_traceback(files):
    with open_loader(files, 64) as loader:
        loader.next()
        loader._send("not a slot")
        error = drain(loader)
        assert isinstance(error, RuntimeError) and "in free_slots" in str(error) and "ValueError" in str(error)


def test_interrupts_are_the_parents_to_handle(files):
    with open_loader(files, 64) as loader:
        loader.next()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(loader._process.process.pid, number)
        for index in range(1, 6):
            assert_same(loader.next().arrays, reference_batch(files, 64, 5, index))


PARENT = f"""
import json, os, sys, time
sys.path.insert(0, {PROJECT!r})
from data.loading.loader import Loader, LoaderSettings
from data.loading.shard_files import open_shards
loader = Loader(open_shards(json.loads(sys.argv[1])), LoaderSettings(64, 5))
loader.next()
if sys.argv[2] == "forks" and os.fork() == 0:
    time.sleep(60)
print(loader._process.process.pid, flush=True)
if sys.argv[2] != "ends":
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["is killed", "forks", "ends"])
def test_the_loader_process_ends_with_its_parent_however_that_ends(files, how):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(files), how],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    pid = int(parent.stdout.readline())
    try:
        if how != "ends":
            parent.kill()
        parent.wait(10)
        assert_ends(pid)
    finally:
        if how == "forks":
            os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def test_a_removed_file_is_named(own_files):
    with open_loader(own_files, 64) as loader:
        loader.next()
        os.remove(own_files[2])
        error = drain(loader)
        assert isinstance(error, InputError) and own_files[2] + ": was removed while in use" in str(error)


def test_a_file_that_is_cut_off_is_named(own_files):
    with open_loader(own_files, 64) as loader:
        loader.next()
        os.truncate(own_files[2], 3000)
        error = drain(loader)
        assert isinstance(error, InputError) and str(error).startswith(own_files[2] + ": was c")


def test_a_short_read_is_an_error_that_names_the_file(own_files):
    shards = ShardFiles(open_shards(own_files))
    os.truncate(own_files[3], 3000)
    with pytest.raises(InputError, match="shard-0003.hdf5: was cut off while in use: samples 256 to 500"):
        shards.read(3, 256, 500, Samples.empty(244, 16, 4, 100))


LIMITED = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, int(sys.argv[2])))
from data.loading.loader import Loader, LoaderSettings
from data.loading.shard_files import open_shards
with Loader(open_shards(json.loads(sys.argv[1])), LoaderSettings(64, 5)) as loader:
    print(loader.next().samples)
"""


@pytest.mark.parametrize("hard_limit, code, answer", [(1000, 0, "64"), (40, 1, "need 124 open files, 40 are allowed")])
def test_more_shards_than_open_files_work_up_to_the_hard_limit(tmp_path, hard_limit, code, answer):
    paths = write_random_shards(tmp_path, [5] * 60)
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(paths), str(hard_limit)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == code and answer in ended.stdout


@pytest.mark.parametrize(
    "name, place, message",
    [
        ("input_ids", (431, 0), r"sample 431: input_ids\[0\] is 60000, expected below the vocabulary's 100"),
        ("mlm_positions", (7, 3), r"sample 7: mlm_positions\[3\] is 60000"),
    ],
)
def test_a_bad_sample_is_named_before_the_first_batch(own_files, name, place, message):
    with h5py.File(own_files[3], "a") as file:
        file[name][place] = 60000
    with open_loader(own_files, 64) as loader, pytest.raises(InputError, match="shard-0003.hdf5: " + message):
        loader.next()
    with pytest.raises(InputError, match="shard-0003.hdf5: " + message):
        list(batches_in_order(open_shards(own_files), 64))


@pytest.mark.parametrize(
    "option, message",
    [
        (dict(batch_size=0), "batch_size is 0, expected 1 or more"),
        (dict(seed=-1), "seed is -1"),
        (dict(position=-1), "position is -1"),
        (dict(workers=0), "workers is 0"),
        (dict(slots=1), "slots is 1, expected 2"),
    ],
)
def test_bad_options_are_refused_before_a_process_starts(files, monkeypatch, option, message):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(InputError, match=message):
        open_loader(files, **{"batch_size": 64, **option})


@pytest.mark.parametrize("in_memory", [True, False])
def test_too_large_a_batch_says_how_much_memory_it_needs(files, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with pytest.raises(InputError, match=r"need \d+\.\d MB in .*, \d+\.\d MB are available"):
        open_loader(files, 10**12)


def test_it_works_without_files_in_memory(files, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert_same(stream(files, 64, 1)[0], reference_batch(files, 64, 5, 0))


@pytest.mark.parametrize("batch_size", [1, 64, 5000])
def test_evaluation_sees_every_sample_once_in_file_order(files, batch_size):
    expected = Samples.concatenate([read_samples(path, 0, size) for path, size in zip(files, SIZES)])
    first = 0
    for batch in batches_in_order(open_shards(files), batch_size):
        samples = expected.take(slice(first, first + batch_size))
        assert batch.counts == {"nsp_weights": len(samples), "mlm_weights": samples.mlm_counts.sum()}
        assert_same(batch.arrays, unpacked_batch(samples))
        first += len(samples)
    assert first == TOTAL


def test_evaluation_refuses_an_empty_batch(files):
    with pytest.raises(InputError, match="batch_size is 0"):
        next(batches_in_order(open_shards(files), 0))


def test_the_data_package_imports_without_torch():
    code = (
        "import sys, data.loading.loader, data.loading.process; assert not {'torch', 'bert', 'ops'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def packed_stream(files, batch_size, count, **options):
    actual = []
    with open_loader(files, batch_size, **options) as loader:
        for _ in range(count):
            batch = loader.next()
            actual.append(({name: array.copy() for name, array in batch.arrays.items()}, batch.samples, batch.position))
    return actual


@pytest.mark.parametrize("per_row", [1, 3])
def test_a_packed_batch_holds_the_samples_of_the_unpacked_one_in_fewer_rows(files, per_row):
    plain = stream(files, 256, 12)
    for (actual, samples, position), expected, index in zip(
        packed_stream(files, 256, 12, packing="samples", samples_per_row=per_row), plain, range(12)
    ):
        assert (samples, position) == (256, 256 * (index + 1))
        assert samples_of(actual) == samples_of(expected)
        assert len(actual["input_ids"]) == 256 if per_row == 1 else len(actual["input_ids"]) < 200
        for name in ("mlm_weights", "nsp_weights"):
            assert actual[name].sum() == pytest.approx(1, abs=1e-5)


def test_fixed_rows_lose_no_sample_and_go_on_from_any_batch(files):
    batches = packed_stream(files, 150, 12, packing="rows", samples_per_row=3)
    position = 0
    for actual, samples, end in batches:
        assert len(actual["input_ids"]) == 150 and end == position + samples and samples > 150
        expected = unpacked_batch(reference_samples(files, 5, position, samples))
        assert samples_of(actual) == samples_of(expected)
        position = end
    assert position > TOTAL
    again = packed_stream(files, 150, 3, packing="rows", samples_per_row=3, position=batches[6][2], workers=1)
    for (actual, _, _), (expected, _, _) in zip(again, batches[7:]):
        assert_same(actual, expected)


def test_bad_shards_are_left_out_where_that_is_asked_for(own_files):
    os.truncate(own_files[3], 1000)
    with h5py.File(own_files[2], "a") as file:
        file["input_ids"][7, 1] = 60000
    with pytest.raises(InputError, match="shard-0003"):
        packed_stream(own_files, 50, 1)
    good = [own_files[0], own_files[4]]
    with open_loader(own_files, 701, skip_bad=True) as loader:
        for _ in range(2):
            batch = loader.next()
            expected = unpacked_batch(
                Samples.concatenate([read_samples(path, 0, size) for path, size in zip(good, (700, 1))])
            )
            assert samples_of(batch.arrays) == samples_of(expected)
        assert sorted(batch.skipped) == sorted(own_files[2:4]) and "sample 7" in batch.skipped[own_files[2]]
    os.remove(own_files[0])
    with h5py.File(own_files[4], "a") as file:
        file["lengths"][0] = 99
    with open_loader(own_files, 10, skip_bad=True) as loader, pytest.raises(InputError, match="every shard is bad"):
        loader.next()


def test_a_shard_that_is_cut_off_while_in_use_is_left_out_where_that_is_asked_for(own_files, monkeypatch):
    with open_loader(own_files, 100, skip_bad=True, slots=2) as loader:
        loader.next()
        os.truncate(own_files[3], 1000)
        deadline, skipped = time.monotonic() + 10, {}
        while not skipped and time.monotonic() < deadline:
            skipped = loader.next().skipped
        assert list(skipped) == [own_files[3]]
        for _ in range(40):
            assert loader.next().samples == 100


def test_what_was_left_out_stays_out_when_a_run_goes_on(own_files, monkeypatch):
    # Small windows, and a bad sample in the second: its shard is left out from there on.
    monkeypatch.setattr("data.loading.order.WINDOW_TOKENS", 512 * 16)
    windows = Order(SIZES, 5, 16).windows()
    next(windows)
    shard, bad, _ = max(next(windows).blocks.tolist(), key=lambda block: block[2] - block[1])
    with h5py.File(own_files[shard], "a") as file:
        file["input_ids"][bad, 1] = 60000
    code = "import data.loading.order, data.loading.process as p; data.loading.order.WINDOW_TOKENS = 512 * 16; p.main()"
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", code, command[-1]], **options)
    )
    options = dict(skip_bad=True, packing="samples")
    with open_loader(own_files, 90, **options) as loader:
        batches = [
            (samples_of(batch.arrays), batch.position, batch.skipped) for batch in (loader.next() for _ in range(30))
        ]
    assert len({len(skipped) for _, _, skipped in batches}) == 2  # found on the way
    for first in range(0, 24, 5):
        with open_loader(own_files, 90, *batches[first][1:], **options) as loader:
            assert [samples_of(loader.next().arrays) for _ in range(5)] == [
                batch for batch, _, _ in batches[first + 1 : first + 6]
            ]


@pytest.mark.parametrize("fault", ["kill", "remove"])
def test_a_long_step_learns_within_two_seconds_that_the_loader_failed(own_files, fault):
    with open_loader(own_files, 100) as loader:
        loader.next()
        time.sleep(0.3)  # all slots are full
        loader.check()
        if fault == "kill":
            loader._process.kill()
        else:
            os.remove(own_files[2])
        began = time.monotonic()
        with pytest.raises(
            LoaderDied if fault == "kill" else InputError, match="SIGKILL" if fault == "kill" else "shard-0002"
        ):
            while time.monotonic() - began < 2:
                loader.check()
                time.sleep(0.01)


def test_nvidias_files_are_loaded_as_they_are(files, tmp_path):
    whole = [bert_samples(np.random.default_rng(n), 150, 16, 4) for n in range(2)]
    paths = [str(tmp_path / (f"{n}.h5")) for n in range(2)]
    for path, samples in zip(paths, whole):
        write_nvidia(path, [samples])
    expected = samples_of(unpacked_batch(Samples.concatenate(whole)))
    with open_loader(paths, 300, packing="samples") as loader:
        assert samples_of(loader.next().arrays) == samples_of(loader.next().arrays) == expected
    assert [samples_of(batch.arrays) for batch in batches_in_order(open_shards(paths, vocab_size=100), 300)] == [
        expected
    ]


def write_unmasked(path, segments=2):
    """A shard with dynamic masking; of samples of one segment, some have a single token to mask."""
    samples = bert_samples(np.random.default_rng(3), 400, 32, 5)
    for name in ("mlm_positions", "mlm_labels", "mlm_counts"):
        getattr(samples, name)[:] = 0
    if segments == 1:
        samples.lengths[:200], samples.input_ids[:200, 3:] = 3, 0
        samples.first_lengths[:] = samples.lengths
    masking = {"masking": "dynamic", "mask_share": 0.15, "special_ids": [0, 1, 2, 3, 4], "continuations": ""}
    write_shard(path, samples, 100, "0" * 64, {}, masking, segments)
    return path


@pytest.fixture
def unmasked_file(tmp_path):
    return write_unmasked(str(tmp_path / "dynamic.h5"))


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("packing", ["off", "samples", "rows"])
def test_masking_anew_is_a_function_of_epoch_and_sample_alone(tmp_path, packing, segments):
    unmasked_file = write_unmasked(str(tmp_path / "dynamic.h5"), segments)
    info = open_shards([unmasked_file])[0]
    order = Order([400], 5, 32)
    plain = read_samples(unmasked_file, 0, 400)
    windows = order.windows(0)
    expected = []
    for epoch in range(2):
        window = next(windows)
        numbers = np.concatenate([np.arange(start, stop) for _, start, stop in window.blocks])[window.rows]
        expected.append(mask_dynamic(plain.take(numbers), numbers, 5, epoch, masking_of(info)))
    expected = Samples.concatenate(expected)
    assert (expected.mlm_counts > 0).all()
    for workers in (1, 3):
        with open_loader([unmasked_file], 130, packing=packing, workers=workers) as loader:
            position = 0
            while position < 540:
                batch = loader.next()
                assert samples_of(batch.arrays) == samples_of(
                    unpacked_batch(expected.take(slice(position, batch.position)))
                )
                position = batch.position


def test_evaluation_masks_unmasked_samples_the_same_each_time(unmasked_file):
    shards = open_shards([unmasked_file])
    first, second = [[samples_of(batch.arrays) for batch in batches_in_order(shards, 400)] for _ in range(2)]
    assert first == second and all(sample[2] for sample in first[0])


def test_where_the_samples_of_a_window_are():
    # Shards of 10, 0, 5 and 300 samples, of which the window has three blocks.
    blocks = np.array([[3, 256, 300], [0, 0, 10], [2, 0, 5]])
    block, numbers = locate(Window(blocks, np.array([0, 43, 44, 58, 54, 53])), np.array([0, 10, 10, 15]))
    assert block.tolist() == [0, 0, 1, 2, 2, 1]
    assert numbers.tolist() == [15 + 256, 15 + 299, 0, 14, 10, 9]


def test_the_loaders_process_imports_what_a_notebook_can(unmasked_file, tmp_path, monkeypatch):
    # A notebook has "" on its path, for the folder that it is in.
    (tmp_path / "fork.py").write_text(
        "import numpy as np\n"
        "from data.masking import CHOICES, choose_tokens\n"
        "def choose_mine(candidates):\n    return choose_tokens(candidates)\n"
        "CHOICES['tokens'] = choose_mine\n"
    )
    code = NOTEBOOK.format(project=PROJECT, file=unmasked_file)
    assert (
        b"64" in subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
    )


NOTEBOOK = """
import sys
sys.path.append({project!r})
import fork
from data.loading.loader import Loader, LoaderSettings
from data.loading.shard_files import open_shards
with Loader(open_shards([{file!r}]), LoaderSettings(64, 5)) as loader:
    print(loader.next().samples)
"""


def choose_first_tokens(candidates):
    """The first tokens of a sample, as many as its budget."""
    place = np.cumsum(~candidates.special, axis=1)
    rows, positions = np.nonzero(~candidates.special & (place <= candidates.budget[:, None]))
    return rows, positions


def test_another_way_to_choose_tokens_reaches_the_loaders_process(unmasked_file, monkeypatch):
    with h5py.File(unmasked_file, "a") as file:
        file.attrs["masked_units"] = "first"
    with pytest.raises(InputError, match="dynamic.h5: 'first' .* expected tokens or words"):
        open_loader([unmasked_file], 100)
    monkeypatch.setitem(CHOICES, "first", choose_first_tokens)
    with open_loader([unmasked_file], 100) as loader:
        batch = loader.next().arrays
    used = batch["mlm_weights"] > 0
    assert used.any(axis=1).all() and (batch["mlm_positions"][:, 0] == 1).all()
    sep = batch["token_type_ids"].argmax(axis=1)[:, None] - 1
    for slot in range(1, used.shape[1]):
        step = batch["mlm_positions"][:, slot] - batch["mlm_positions"][:, slot - 1]
        expected = 1 + (batch["mlm_positions"][:, slot - 1] + 1 == sep[:, 0])
        assert (step == expected)[used[:, slot]].all()
