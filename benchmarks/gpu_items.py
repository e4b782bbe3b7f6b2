"""Items of work, one after the other in one process: each result is on disk as soon as it is there.

An item that fails is recorded with its error, and the next goes on. One that takes too long is interrupted, and counts
as failed; where that is not heeded, as in a call that never returns, the process ends with what is there. So it does
where an error has left the device unusable. The next run into the same folder goes on: with what was never begun first,
then with what failed or was cut short.
"""

import contextlib
import faulthandler
import gc
import hashlib
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from datetime import datetime, timezone
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import torch

from bert.command_line import parse_command_line
from bert.config import Config
from data.errors import InputError
from data.files import read_json, write_json

__all__ = ["Bench", "Figures", "Item", "Results", "Skip", "TooLong", "Wrong", "run_items"]

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GRACE = 5.0  # seconds that an item has to end once it is interrupted
LINES_OF_TRACEBACK = 20
AGAIN = "Run the same command again: it goes on with the others, and tries this one last"

Figures = Dict[str, Any]
"""What an item found, as JSON takes it; it counts even where the item fails later."""

# A model for dry runs, in which everything is small.
TINY = {
    "model.vocab_size": 304,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "model.max_position_embeddings": 64,
    "data.sequence_length": 64,
    "data.mask_tokens": 10,
    "training.global_batch_size": 24,
}


class Wrong(Exception):
    """A result is not what it has to be."""


class Skip(Exception):
    """An item cannot be run here, for this reason."""


class TooLong(KeyboardInterrupt):
    """An item took longer than it may. No Exception: nothing but `run_items` is to take it, and pytest stops for it."""


class Item(NamedTuple):
    name: str
    seconds: float
    """that it takes on one H100, about"""
    run: Callable[["Bench", Figures], str]
    """Fills in the figures and returns a line for people. Raises Wrong, Skip, or what goes wrong in it."""


class Bench:
    """The device that is measured, and what stays there from one item to the next."""

    def __init__(self, device: str, tiny: bool, folder: str):
        self.device, self.tiny, self.folder = device, tiny, folder
        self.key, self.held = "", None

    def needs_cuda(self, why: str) -> None:
        """Raises Skip on another device."""
        if self.device != "cuda":
            raise Skip(f"needs a CUDA GPU: {why}")

    def config(self, name: str, *options: str) -> Config:
        """A config of configs/ for this device, with options of run_pretraining.py, which count more than TINY."""
        tiny = [word for key, value in TINY.items() for word in (f"--{key}", str(value))] if self.tiny else []
        return parse_command_line(["--config", name, "--device", self.device, *tiny, *options])

    def hold(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was last called with this key; anything else is let go first."""
        if self.key != key:
            self.release()
            self.held = make()
            self.key = key
        return self.held

    def release(self) -> None:
        """Gives memory and compiled code back: code is compiled anew a few times only, then it would not be at all."""
        self.key, self.held = "", None
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def recover(self) -> bool:
        """Lets all go after an item that failed; False where the device does not work any more: after a failed
        assertion or an illegal address on a GPU nothing does."""
        try:
            self.release()
            return torch.ones(2, device=self.device).sum().item() == 2
        except RuntimeError:
            return False


class Results:
    """The JSON file of all items, rewritten with each."""

    def __init__(self, path: str, about: Dict[str, Any], same: List[str]):
        """Goes on with the file that is there. Raises InputError where it differs in one of the keys `same`."""
        self.path, self.items, self.source = path, {}, digest_of_source()
        self.about = {**about, "source": self.source}
        if os.path.exists(path):
            found = read_json(path)
            for key in same:
                if found["about"].get(key) != about[key]:
                    raise InputError(
                        f"{path}: holds results of {key} {found['about'].get(key)}, and here it is {about[key]}. "
                        "Name another folder with --output"
                    )
            self.items = found["results"]

    def put(self, name: str, status: str, **record: Any) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.items[name] = {"status": status, "date": when, "source": self.source, **record}
        write_json(self.path, {"about": self.about, "results": self.items})

    def status(self, name: str) -> str:
        """done, failed, skipped, started (and not ended) or "" """
        return self.items.get(name, {}).get("status", "")


def digest_of_source() -> str:
    """The first digits of a hash of all code, by which results of changed code are told apart."""
    digest = hashlib.sha256()
    for folder in ("bert", "benchmarks", "configs", "data", "ops"):
        for place, folders, names in os.walk(os.path.join(ROOT, folder)):
            folders.sort()
            for name in sorted(name for name in names if name.endswith((".py", ".cpp", ".h", ".json"))):
                if "results" not in place:
                    with open(os.path.join(place, name), "rb") as file:
                        digest.update(file.read())
    return digest.hexdigest()[:12]


def run_items(items: List[Item], bench: Bench, results: Results, end: float, again: bool = False) -> int:
    """Runs what is not done, or with `again` all of it, until time.monotonic() is `end`; returns the exit status.

    It is 1 where an item failed or was not begun, in this run or before.
    """
    untried = [item for item in items if results.status(item.name) in ("", "skipped")]
    for item in untried + [item for item in items if item not in untried]:
        record = results.items.get(item.name, {})
        if record.get("status") == "done" and not again:
            other = "" if record["source"] == results.source else ", with other code"
            print(f"{item.name}: done before, {record['date']}{other}", flush=True)
            continue
        left, expected = end - GRACE - time.monotonic(), 1.0 if bench.tiny else item.seconds
        if expected > left:
            print(f"{item.name}: not begun, takes {expected:.0f} s and {max(0.0, left):.0f} s are left", flush=True)
            continue
        run_item(item, bench, results, min(left, max(120.0, 3 * expected)))
    return int(any(results.status(item.name) not in ("done", "skipped") for item in items))


def run_item(item: Item, bench: Bench, results: Results, limit: float) -> None:
    figures: Figures = {}
    began = time.monotonic()

    def put(status: str, line: str, **record: Any) -> None:
        seconds = round(time.monotonic() - began, 2)
        results.put(item.name, status, line=line, seconds=seconds, seed=seed, **record, figures=figures)
        print(f"{item.name}: {status}, {seconds:.1f} s: {line}", file=sys.__stdout__, flush=True)

    def stop() -> None:
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])
        put("failed", f"hangs: was told to end after {limit:.0f} s", traceback=last_lines(stack))
        print(AGAIN, file=sys.__stdout__, flush=True)
        leave(1)

    results.put(item.name, "started")
    seed = torch.seed()  # another one each time
    try:
        with interrupted_after(limit, stop):
            line = item.run(bench, figures)
            if bench.device == "cuda":
                torch.cuda.synchronize()  # an error that is still to come is this item's
        put("done", line)
        return
    except Skip as reason:
        put("skipped", str(reason))
        return
    except (Exception, TooLong) as error:
        package = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and importlib.util.find_spec(package) is None:
            put("skipped", f"needs {package}, which is not installed")
            return
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        put("failed", text, error=str(error), traceback=last_lines(traceback.format_exception(*sys.exc_info())))
    with interrupted_after(2 * GRACE, stop):
        usable = bench.recover()
    if not usable:
        print(f"the device cannot be used any more after {item.name}. {AGAIN}", file=sys.__stdout__, flush=True)
        leave(1)


@contextlib.contextmanager
def interrupted_after(seconds: float, stop: Callable[[], None]) -> Iterator[None]:
    """Raises TooLong inside after so many seconds. Where that is not heeded, another thread calls `stop`; where the
    interpreter is not let go for it either, the process ends with a traceback."""

    def interrupt(*_: Any) -> None:
        raise TooLong(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    watchdog = threading.Timer(seconds + GRACE, stop)
    watchdog.daemon = True
    watchdog.start()
    faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()
        faulthandler.cancel_dump_traceback_later()


def last_lines(texts: List[str]) -> List[str]:
    return "".join(texts).splitlines()[-LINES_OF_TRACEBACK:]


def leave(status: int) -> None:
    """Ends the process without what would wait for the device."""
    sys.stdout.flush()
    os._exit(status)
