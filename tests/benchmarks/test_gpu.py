"""benchmarks/gpu.py, on the CPU in its tiny form: every result is kept, whatever happens to an item or the process."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from benchmarks.gpu_items import Results
from data.errors import InputError
from tests import ROOT

ON_CUDA_ALONE = {"steps", "finder"}


def start(folder, *options):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--output", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def read(folder):
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_what_is_done_and_goes_on_with_the_rest(tmp_path):
    process = start(tmp_path)
    for line in process.stdout:
        if line.startswith("resume: done"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    before = read(tmp_path)["results"]
    done = {name for name, record in before.items() if record["status"] == "done"}
    assert {"attention", "gradients", "resume"} <= done and "phase1-peer" not in done

    process = start(tmp_path)
    printed, _ = process.communicate()
    written = read(tmp_path)
    assert process.returncode == 0, printed
    assert {"date", "command", "device", "cpu", "torch", "source"} <= written["about"].keys()
    for name, record in written["results"].items():
        on_cuda_alone = name in ON_CUDA_ALONE or name.startswith("tests/")
        assert record["status"] == ("skipped" if on_cuda_alone else "done"), name
        assert not on_cuda_alone or "needs a CUDA GPU" in record["line"]
    assert all(written["results"][name] == before[name] for name in done)
    assert len(written["results"]["products"]["figures"]["products"]) == 12
    kernels = written["results"]["phase1-profile"]["figures"]["kernels"]
    assert sum(row["share"] for row in kernels) == pytest.approx(1) and (tmp_path / "phase1-profile.txt").exists()
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("sequences.png", "profile.png"))
    assert "times transformers" in printed and "attention: done before" in printed


@pytest.mark.slow
def test_an_item_that_fails_is_recorded_with_its_error_and_the_next_goes_on(tmp_path):
    obstacle = tmp_path / "phase1-profile.txt"
    obstacle.mkdir()
    process = start(tmp_path, "--only", "phase1-profile", "products", "phase2")
    printed, _ = process.communicate()
    results = read(tmp_path)["results"]
    assert process.returncode == 1 and "phase1-profile: failed" in printed
    assert results["products"]["status"] == results["phase2"]["status"] == "done"
    failed = results["phase1-profile"]
    assert "IsADirectoryError" in failed["line"] and str(obstacle) in failed["error"]
    assert "write_table" in "".join(failed["traceback"]) and failed["figures"]["kernels"]
    assert start(tmp_path, "--only", "phase9").wait() == 1


ITEMS = """
    import ctypes, json, signal, sys, time
    from benchmarks import gpu_items
    from benchmarks.gpu_items import Bench, Item, Results, run_items

    gpu_items.GRACE = 0.5
    path, kind, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

    def well(bench, figures):
        figures["value"] = 1
        return "well"

    def bad(bench, figures):
        figures["value"] = 2
        if kind == "lacks a package":
            import no_such_package.part
        if kind == "poisons":
            Bench.recover = lambda bench: False
        if kind in ("hangs", "hangs in a call"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as if the interrupt were not heeded
        if kind == "hangs in a call":
            ctypes.PyDLL(None).sleep(60)
        if kind == "is slow" or kind == "hangs":
            time.sleep(60)
        raise RuntimeError("device-side assert triggered")

    items = [Item("first", 0, well), Item("bad", 0, bad), Item("last", 0, well)]
    results = Results(path, {"device": "cpu"}, ["device"])
    sys.exit(run_items(items, Bench("cpu", True, "."), results, time.monotonic() + seconds))
"""


def run_bad_item(path, kind, seconds=3):
    command = [sys.executable, "-c", textwrap.dedent(ITEMS), str(path), kind, str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done, json.loads(path.read_text())["results"]


@pytest.mark.parametrize(
    "kind, status, line",
    [
        ("poisons", "failed", "device-side assert"),
        pytest.param("hangs", "failed", "hangs", marks=pytest.mark.exhaustive),
        ("hangs in a call", "started", None),
    ],
)
def test_what_cannot_go_on_ends_with_all_results_and_goes_on_behind_that_item_when_run_again(
    tmp_path, kind, status, line
):
    path = tmp_path / "gpu.json"
    done, results = run_bad_item(path, kind)
    assert done.returncode == 1 and "last" not in results
    assert results["first"]["status"] == "done" and results["bad"]["status"] == status
    if line:
        assert line in results["bad"]["line"] and results["bad"]["figures"] == {"value": 2}
        assert "Run the same command again" in done.stdout
    else:
        assert "Timeout" in done.stderr and "bad" in done.stderr
    first = results["first"]
    done, results = run_bad_item(path, "fails")
    assert done.returncode == 1 and results["last"]["status"] == "done" and results["first"] == first
    assert done.stdout.index("last: done") < done.stdout.index("bad: failed")


def test_an_item_that_is_slow_fails_and_the_next_goes_on_while_its_time_is_left(tmp_path):
    done, results = run_bad_item(tmp_path / "gpu.json", "is slow", 3)
    assert done.returncode == 1 and results["bad"]["status"] == "failed" and "took longer" in results["bad"]["line"]
    assert "last: not begun" in done.stdout and "last" not in results


def test_an_item_that_lacks_a_package_is_skipped_and_tried_again(tmp_path):
    path = tmp_path / "gpu.json"
    done, results = run_bad_item(path, "lacks a package")
    assert done.returncode == 0 and results["bad"]["status"] == "skipped"
    assert results["bad"]["line"] == "needs no_such_package, which is not installed"
    assert run_bad_item(path, "fails")[1]["bad"]["status"] == "failed"


def test_results_of_another_device_are_not_gone_on_with(tmp_path):
    path = str(tmp_path / "gpu.json")
    Results(path, {"device": "one"}, ["device"]).put("item", "done")
    assert Results(path, {"device": "one"}, ["device"]).status("item") == "done"
    with pytest.raises(InputError, match="device one, and here it is other.*--output"):
        Results(path, {"device": "other"}, ["device"])


TESTS = """
    import pytest
    pytestmark = pytest.mark.cuda
    {head}

    def test_right():
        pass

    def test_wrong():
        assert {value} == 1
"""
KERNEL_TESTS = """
    import sys, types
    from benchmarks.gpu_checks import kernel_tests

    bench = types.SimpleNamespace(needs_cuda=lambda why: None, release=lambda: None)
    for path in sys.argv[1:]:
        try:
            print("= passed:", kernel_tests(path, bench, {}))
        except Exception as error:
            print(f"= {type(error).__name__}: {error}")
"""
CASES = [
    ("", 1, "passed: 2 passed, 0 skipped"),
    ("", 2, "Wrong: .*::test_wrong: .*2 == 1"),
    ("import no_such_package", 1, "Skip: no_such_package is not installed"),
    ("raise ValueError('broken')", 1, "Wrong: .*broken"),
    ("pytest.skip('no such card', allow_module_level=True)", 1, "Skip: .*no such card"),
    ("pytestmark = []", 1, "Skip: no test ran: none is marked cuda"),
]


def test_tests_of_kernels_are_run_and_what_they_lack_is_named(tmp_path):
    paths = [tmp_path / f"test_kernel{number}.py" for number in range(len(CASES))]
    for path, (head, value, _) in zip(paths, CASES):
        path.write_text(textwrap.dedent(TESTS.format(head=head, value=value)))
    command = [sys.executable, "-c", textwrap.dedent(KERNEL_TESTS), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("= ")]
    assert len(lines) == len(CASES), done.stdout + done.stderr
    for line, (_, _, expected) in zip(lines, CASES):
        assert re.match(f"= {expected}", line), line
