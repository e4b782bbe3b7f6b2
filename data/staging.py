"""The folder in which a data set is made: what is done survives a kill, and only a whole data set gets its name.

    .NAME.unfinished/          beside the output folder NAME, or in it when it is there already
        lock                   held as long as a process writes here
        state.json             the options of the run
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
from typing import Dict, Iterator, List

from data.errors import InputError

__all__ = ["Staging", "moving", "open_staging"]

LOCK_SECONDS = 3  # how long a killed run's last processes may take to end


class Staging:
    """A staging folder under lock, for one run with given options."""

    def __init__(self, folder: str, target: str, lock: int):
        self.folder, self.target, self.lock = folder, target, lock
        self.data = os.path.join(folder, "data")

    def part(self, number: int) -> str:
        return os.path.join(self.folder, "part-%08d.h5" % number)

    def groups(self) -> List[Dict]:
        """What `end_group` was given, of the groups that are done, in order."""
        paths = sorted(glob.glob(os.path.join(glob.escape(self.folder), "group-*.json")))
        return [read_json(path) for path in paths]

    def end_group(self, number: int, record: Dict, parts: List[str]) -> None:
        """Notes that a group's shards are made, and removes its parts."""
        write_json(os.path.join(self.folder, "group-%05d.json" % number), record)
        for path in parts:
            os.remove(path)

    def publish(self) -> None:
        """Moves the data set to its place: at once, or file by file into a folder that is there already."""
        if os.path.isdir(self.target):
            state = os.path.join(self.folder, "state.json")
            write_json(state, dict(read_json(state), moving=True))
            for name in sorted(os.listdir(self.data)):
                os.replace(os.path.join(self.data, name), os.path.join(self.target, name))
        else:
            os.makedirs(os.path.dirname(self.target), exist_ok=True)
            os.replace(self.data, self.target)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def staging_folder(output: str) -> str:
    target = os.path.realpath(output)
    parent = target
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    return os.path.join(parent, ".%s.unfinished" % os.path.basename(target))


def moving(output: str) -> bool:
    """Whether a run was stopped while it moved its finished data set into the folder `output`."""
    state = os.path.join(staging_folder(output), "state.json")
    return os.path.exists(state) and "moving" in read_json(state)


@contextlib.contextmanager
def open_staging(output: str, options: Dict) -> Iterator[Staging]:
    """The staging folder for `output`, with what an earlier run with the same options (name -> JSON value) did.

    An InputError in the body removes it, for the same command cannot get further; anything else leaves it to go on from. Raises
    InputError when another process is at work on it, it was begun with other options, or it cannot be made.
    """
    folder = staging_folder(output)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = hold_lock(os.path.join(folder, "lock"), output)
    except OSError as error:
        raise InputError("%s: cannot be written (%s); give another --output" % (output, error.strerror))
    staging = Staging(folder, os.path.realpath(output), lock)
    try:
        begin(staging, output, json.loads(json.dumps(options)))
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
    earlier = read_json(state) if os.path.exists(state) else None
    if earlier is not None and os.path.isdir(staging.data):
        found = earlier["options"]
        differ = [name for name in options if found.get(name) != options[name]]
        if differ:
            raise InputError("%s: a run that was stopped had %s. Give its options to go on with it, or remove %s to begin "
                             "anew" % (output, "; ".join(difference(name, found.get(name), options[name]) for name in differ),
                                       staging.folder))
        done = len(staging.groups()) * options["chunks of a group"]
        for path in glob.glob(os.path.join(glob.escape(staging.folder), "**", "*.tmp-*"), recursive=True):
            os.remove(path)
        for path in glob.glob(os.path.join(glob.escape(staging.folder), "part-*.h5")):
            if int(os.path.basename(path)[5:-3]) < done:
                os.remove(path)
        return
    for name in os.listdir(staging.folder):
        path = os.path.join(staging.folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name != "lock":
            os.remove(path)
    os.mkdir(staging.data)
    write_json(state, {"options": options})


def difference(name: str, found, given) -> str:
    found, given = [json.dumps(value) for value in (found, given)]
    if len(found) + len(given) > 200:
        return "other %s" % name
    return "%s %s, not %s" % (name, found, given)


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
                raise InputError("%s: another process is making this data set; wait for it, or end it" % output)
            time.sleep(0.05)


def read_json(path: str) -> Dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value: Dict) -> None:
    temporary = "%s.tmp-%d" % (path, os.getpid())
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
