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
from typing import Dict, Iterator, List, Optional, Sequence

from data.errors import InputError

__all__ = ["Staging", "check_output", "moving", "open_staging"]

SHARD_PATTERNS = ("train-*.h5", "held_out-*.h5")
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")

LOCK_SECONDS = 3  # how long a killed run's last processes may take to end


class Staging:
    """A staging folder under lock, for one run with given options.

    `report` is what an earlier run gave to `publish`, when all of its data set got to its place; else None.
    """

    def __init__(self, folder: str, target: str, lock: int, report: Optional[Dict] = None):
        self.folder, self.target, self.lock, self.report = folder, target, lock, report
        self.data = os.path.join(folder, "data")

    def part(self, number: int) -> str:
        return os.path.join(self.folder, f"part-{number:08}.h5")

    def groups(self) -> List[Dict]:
        """What `end_group` was given, of the groups that are done, in order."""
        paths = sorted(glob.glob(os.path.join(glob.escape(self.folder), "group-*.json")))
        return [read_json(path) for path in paths]

    def end_group(self, number: int, record: Dict, parts: List[str]) -> None:
        """Notes that a group's shards are made, and removes its parts."""
        write_json(os.path.join(self.folder, f"group-{number:05}.json"), record)
        for path in parts:
            os.remove(path)

    def publish(self, report: Dict) -> None:
        """Moves the data set to its place: at once, or file by file into a folder that is there already.

        `report` (JSON values) is for the next run, should this one be killed between the move and the end.
        """
        state = os.path.join(self.folder, "state.json")
        write_json(state, dict(read_json(state), moving={"files": sorted(os.listdir(self.data)), "report": report}))
        if os.path.isdir(self.target):
            for name in sorted(os.listdir(self.data)):
                os.replace(os.path.join(self.data, name), os.path.join(self.target, name))
        else:
            os.makedirs(os.path.dirname(self.target), exist_ok=True)
            os.replace(self.data, self.target)
        self.remove()

    def remove(self) -> None:
        """Removes the folder, the state last: a kill on the way leaves what the next run can end."""
        with contextlib.suppress(OSError):
            empty(self.folder, keep=("state.json",))
        shutil.rmtree(self.folder, ignore_errors=True)


def empty(folder: str, keep: Sequence[str]) -> None:
    for name in set(os.listdir(folder)).difference(keep):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def check_output(output: str, vocab: Optional[str]) -> None:
    """Refuses a folder in which something would be overwritten, but for the vocabulary itself lying there."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"{output}: is a file, expected a folder to make; give another --output")
    shard_patterns = [os.path.join(glob.escape(output), name) for name in SHARD_PATTERNS]
    taken = [path for pattern in shard_patterns for path in sorted(glob.glob(pattern))]
    taken += [
        path
        for path in (os.path.join(output, name) for name in TOKENIZER_FILES)
        if os.path.exists(path) and not (vocab and os.path.exists(vocab) and os.path.samefile(path, vocab))
    ]
    if taken:
        raise InputError(
            f"{output}: holds a data set already ({os.path.basename(taken[0])}); nothing is overwritten. Give "
            "another --output, or remove that folder first"
        )


def staging_folder(output: str) -> str:
    """In the nearest folder that is there; or higher up, where a run that made `output` itself was killed before it
    ended."""
    target = os.path.realpath(output)
    name, parent, folders = f".{os.path.basename(target)}.unfinished", target, []
    while parent != os.path.dirname(parent):
        if os.path.isdir(parent):
            folders.append(os.path.join(parent, name))
        parent = os.path.dirname(parent)
    folders.append(os.path.join(parent, name))
    return next((folder for folder in folders if moved(folder, target)), folders[0])


def moving(output: str) -> bool:
    """Whether a run was stopped while it moved its finished data set to `output`, or when it had just done so."""
    folder = staging_folder(output)
    state = read_state(folder)
    return "moving" in state and (
        os.path.isdir(os.path.join(folder, "data")) or moved(folder, os.path.realpath(output))
    )


def moved(folder: str, target: str) -> bool:
    """Whether the whole data set that was made in this folder is in its place, `target`."""
    state, data = read_state(folder), os.path.join(folder, "data")
    return (
        "moving" in state
        and state["options"]["output"] == target
        and not (os.path.isdir(data) and os.listdir(data))
        and all(os.path.exists(os.path.join(target, name)) for name in state["moving"]["files"])
    )


def read_state(folder: str) -> Dict:
    """What state.json holds; nothing when no run began in the folder."""
    path = os.path.join(folder, "state.json")
    return read_json(path) if os.path.exists(path) else {}


@contextlib.contextmanager
def open_staging(output: str, options: Dict) -> Iterator[Staging]:
    """The staging folder for `output`, with what an earlier run with the same options (name -> JSON value) did.

    An InputError in the body removes it, for the same command cannot get further; anything else leaves it to go on
    from. Raises InputError when another process is at work on it, it was begun with other options, or it cannot be
    made.
    """
    folder = staging_folder(output)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = hold_lock(os.path.join(folder, "lock"), output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); give another --output")
    staging = Staging(folder, os.path.realpath(output), lock)
    try:
        begin(staging, output, json.loads(json.dumps(dict(options, output=staging.target))))
        try:
            yield staging
        except InputError:
            staging.remove()
            raise
    finally:
        os.close(lock)


def begin(staging: Staging, output: str, options: Dict) -> None:
    """Checks the options against those of the run that began here, and removes what no run can use."""
    state = os.path.join(staging.folder, "state.json")
    earlier, whole = read_state(staging.folder), moved(staging.folder, staging.target)
    if earlier and (whole or os.path.isdir(staging.data)):
        found = earlier["options"]
        differ = [name for name in options if found.get(name) != options[name]]
        if differ:
            raise InputError(
                f"{output}: a run that was stopped had "
                f"{'; '.join(difference(name, found.get(name), options[name]) for name in differ)}. Give its "
                f"options to go on with it, or remove {staging.folder} to begin anew"
            )
        if whole:
            staging.report = earlier["moving"]["report"]
            return
        done = len(staging.groups()) * options["chunks of a group"]
        for path in glob.glob(os.path.join(glob.escape(staging.folder), "**", "*.tmp-*"), recursive=True):
            os.remove(path)
        for path in glob.glob(os.path.join(glob.escape(staging.folder), "part-*.h5")):
            if int(os.path.basename(path)[5:-3]) < done:
                os.remove(path)
        return
    empty(staging.folder, keep=("lock",))
    os.mkdir(staging.data)
    write_json(state, {"options": options})


def difference(name: str, found, given) -> str:
    found, given = [json.dumps(value) for value in (found, given)]
    if len(found) + len(given) > 200:
        return f"other {name}"
    return f"{name} {found}, not {given}"


def hold_lock(path: str, output: str) -> int:
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


def read_json(path: str) -> Dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value: Dict) -> None:
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
