"""The folder in which a data set is made: what is done survives a kill, and only a whole data set gets its name.

    .NAME.unfinished/          beside the output folder NAME, or in it when it is there already
        lock                   held as long as a process writes here
        state.json             the options of the run; once the data set moves to its place, also its files and the
                               report
        data/                  what becomes the data set: shards, vocab.txt, ...
        part-00000012.h5       the samples of a chunk of text
        group-00003.json       shards are made of the parts of this group, whose counts it holds; the parts may go

Every file appears whole, by renaming.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from data.errors import InputError
from data.files import read_json, write_json

__all__ = ["Staging", "check_output", "differences", "open_staging"]

VOCABULARY_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
DATA_SET_FILES = ("train-*.h5", "held_out-*.h5", *VOCABULARY_FILES)
LOCK_SECONDS = 3  # how long a killed run's last processes may take to end


class Staging:
    """A staging folder for the data set `target`.

    `lock` is the lock file's descriptor. `report` is what an earlier run gave to `publish`, when all of its data set
    got to its place; else None.
    """

    def __init__(self, folder: str, target: str):
        self.folder, self.target, self.lock = folder, target, -1
        self.data, self.state_path = os.path.join(folder, "data"), os.path.join(folder, "state.json")
        self.report: Optional[Dict[str, Any]] = None

    def part(self, number: int) -> str:
        return os.path.join(self.folder, f"part-{number:08}.h5")

    def groups(self) -> List[Dict[str, Any]]:
        """What `end_group` was given, of the groups that are done, in order."""
        return [read_json(path) for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), "group-*.json")))]

    def end_group(self, number: int, record: Dict[str, Any], parts: Sequence[str]) -> None:
        """Notes that a group's shards are made, and removes its parts. record["parts"] has an entry for each part."""
        write_json(os.path.join(self.folder, f"group-{number:05}.json"), record)
        for path in parts:
            os.remove(path)

    def state(self) -> Dict[str, Any]:
        """What state.json holds; nothing when no run began in the folder."""
        return read_json(self.state_path) if os.path.exists(self.state_path) else {}

    def is_published(self) -> bool:
        """Whether the whole data set that was made here is in its place."""
        state = self.state()
        return (
            "moving" in state
            and state["options"]["output"] == self.target
            and not (os.path.isdir(self.data) and os.listdir(self.data))
            and all(os.path.exists(os.path.join(self.target, name)) for name in state["moving"]["files"])
        )

    def publish(self, report: Dict[str, Any], then: Callable[[], None] = lambda: None) -> None:
        """Moves the data set to its place: at once, or file by file into a folder that is there already.

        `report` (JSON values) is for the next run, should this one be killed between the move and the end. `then` is
        what else has to be done before the end.
        """
        names = sorted(os.listdir(self.data))
        write_json(self.state_path, dict(self.state(), moving={"files": names, "report": report}))
        if os.path.isdir(self.target):
            for name in names:
                os.replace(os.path.join(self.data, name), os.path.join(self.target, name))
        else:
            os.makedirs(os.path.dirname(self.target), exist_ok=True)
            os.replace(self.data, self.target)
        then()
        self.remove()

    def remove(self) -> None:
        """Removes the folder, the state last: a kill on the way leaves what the next run can end."""
        with contextlib.suppress(OSError):
            clear(self.folder, keep="state.json")
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_or_continue(self, output: str, options: Dict[str, Any]) -> None:
        """Checks the options against those of the run that began here, and removes what no run can use."""
        state, published = self.state(), self.is_published()
        if not state or not (published or os.path.isdir(self.data)):
            clear(self.folder, keep="lock")
            os.mkdir(self.data)
            write_json(self.state_path, {"options": options})
            return
        differing = differences(state["options"], options)
        if differing:
            raise InputError(
                f"{output}: a run that was stopped had {'; '.join(differing)}. Give its options to go on with it, or "
                f"remove {self.folder} to begin anew"
            )
        if published:
            self.report = state["moving"]["report"]
            return
        parts_used = [self.part(number) for number in range(sum(len(group["parts"]) for group in self.groups()))]
        half_written = glob.glob(os.path.join(glob.escape(self.folder), "**", "*.tmp-*"), recursive=True)
        for path in filter(os.path.exists, [*parts_used, *half_written]):
            os.remove(path)


def find_staging(output: str) -> Staging:
    """Where the data set is made: in the nearest folder that is there.

    Or higher up, where a run that made `output` itself was killed before it ended.
    """
    target = parent = os.path.realpath(output)
    name, places = f".{os.path.basename(target)}.unfinished", []
    while parent != os.path.dirname(parent):
        if os.path.isdir(parent):
            places.append(Staging(os.path.join(parent, name), target))
        parent = os.path.dirname(parent)
    places.append(Staging(os.path.join(parent, name), target))
    return next(filter(Staging.is_published, places), places[0])


def clear(folder: str, keep: str) -> None:
    """Removes all that a folder holds but `keep`."""
    for entry in os.scandir(folder):
        if entry.name != keep:
            shutil.rmtree(entry.path) if entry.is_dir() else os.remove(entry.path)


def differences(earlier: Dict[str, Any], given: Dict[str, Any]) -> List[str]:
    """How options (name -> JSON value) differ from those of an earlier run."""
    found = []
    for name in given:
        old, new = json.dumps(earlier.get(name)), json.dumps(given[name])
        if old != new:
            found.append(f"other {name}" if len(old) + len(new) > 200 else f"{name} {old}, not {new}")
    return found


def check_output(output: str, vocab: Optional[str]) -> None:
    """Refuses a folder in which something would be overwritten. The vocabulary `vocab` may lie there, and what a run
    was moving there when it was stopped."""
    staging = find_staging(output)
    if "moving" in staging.state() and (os.path.isdir(staging.data) or staging.is_published()):
        return
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"{output}: is a file, expected a folder to make; give another --output")
    for pattern in DATA_SET_FILES:
        for path in sorted(glob.glob(os.path.join(glob.escape(output), pattern))):
            if not (vocab and is_of_vocabulary(path, vocab)):
                raise InputError(
                    f"{output}: holds a data set already ({os.path.basename(path)}); nothing is overwritten. Give "
                    "another --output, or remove that folder first"
                )


def is_of_vocabulary(path: str, vocab: str) -> bool:
    """Whether a file is one of those in which `data.tokenizer.read_vocab` finds the vocabulary `vocab`."""
    folder = vocab if os.path.isdir(vocab) else os.path.dirname(vocab) or "."
    named = os.path.isdir(vocab) or os.path.basename(vocab) in VOCABULARY_FILES
    if named and os.path.basename(path) in VOCABULARY_FILES:
        return os.path.samefile(os.path.dirname(path) or ".", folder)
    return os.path.exists(vocab) and os.path.samefile(path, vocab)


@contextlib.contextmanager
def open_staging(output: str, options: Dict[str, Any], staging: Optional[Staging] = None) -> Iterator[Staging]:
    """The staging folder for `output`, with what an earlier run with the same options (name -> JSON value) did. By
    default it is `find_staging`'s.

    An InputError in the body removes it, for the same command cannot get further; any other error leaves it for the
    next run. Raises InputError when another process is at work on it, it was begun with other options, or it cannot be
    made.
    """
    staging = staging or find_staging(output)
    try:
        os.makedirs(staging.folder, exist_ok=True)
        staging.lock = hold_lock(os.path.join(staging.folder, "lock"), output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); give another --output")
    try:
        staging.start_or_continue(output, json.loads(json.dumps(dict(options, output=staging.target))))
        try:
            yield staging
        except InputError:
            staging.remove()
            raise
    finally:
        os.close(staging.lock)


def hold_lock(path: str, output: str) -> int:
    """Locks the file `path`, which it makes where it is missing; gives its descriptor."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
            os.close(descriptor)  # the run that held it has just ended, and its folder with it
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise InputError(f"{output}: another process is making this data set; wait for it, or end it")
            time.sleep(0.05)
