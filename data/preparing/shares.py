"""What each of several machines makes of a data set, `--part 3/16`, and what `--finish 16` joins.

    OUTPUT/part-3-of-16/           a share; until it is whole it is .part-3-of-16.unfinished (data.preparing.staging)
        share.json                 the options it was made with; a checksum of each chunk of the text, also of others'
        chunk-00000018-1a2b3c4d.h5 the samples of a chunk of text with this checksum

Share k of N has every N-th chunk of the text, from the k-th on. Where a chunk begins follows from all text before it,
so each share reads all of the text; it tokenizes, cuts and masks its own chunks. The checksums tell that all shares
have read the same text, wherever their machine finds it.
"""

import os
import re
import shutil
import zlib
from dataclasses import dataclass
from typing import Any, Dict, List

from data.errors import InputError
from data.files import read_json, write_json
from data.preparing.splits import TextChunk
from data.preparing.staging import Staging, differences

__all__ = ["Share", "chunk_checksum", "chunk_path", "end_share", "is_share", "join_shares", "remove_shares"]

Options = Dict[str, Any]  # as JSON has them


@dataclass(frozen=True)
class Share:
    """Share `number`, 1 to `count`, of the data set that is made in `output`."""

    output: str
    number: int
    count: int

    @property
    def name(self) -> str:
        return f"part-{self.number}-of-{self.count}"

    @property
    def folder(self) -> str:
        return os.path.join(os.path.realpath(self.output), self.name)

    @property
    def staging(self) -> Staging:
        return Staging(os.path.join(os.path.dirname(self.folder), f".{self.name}.unfinished"), self.folder)

    def has(self, chunk: int) -> bool:
        return chunk % self.count == self.number - 1

    def check(self, options: Options) -> List[str]:
        """The checksums of all chunks of the text. Raises InputError when it was made with other options."""
        path = os.path.join(self.folder, "share.json")
        share = read_json(path)
        differing = differences(share["options"], options)
        if differing:
            raise InputError(
                f"{path}: made with {'; '.join(differing)}. Give the same options to all parts and to --finish, or "
                f"remove {self.folder} and run --part {self.number}/{self.count} again"
            )
        return share["chunks"]


def is_share(text: str) -> bool:
    """Whether this is K/N, K from 1 to N."""
    return re.fullmatch(r"\d+/\d+", text) is not None and 1 <= int(text.split("/")[0]) <= int(text.split("/")[1])


def shares_of(output: str, count: int) -> List[Share]:
    return [Share(output, number, count) for number in range(1, count + 1)]


def chunk_checksum(chunk: TextChunk) -> str:
    split, documents = chunk
    value = split
    for number, lines in documents:
        value = zlib.crc32("\n".join([str(number), *lines]).encode("utf-8"), value)
    return f"{value:08x}"


def chunk_path(folder: str, number: int, checksum: str) -> str:
    return os.path.join(folder, f"chunk-{number:08}-{checksum}.h5")


def end_share(staging: Staging, options: Options, checksums: List[str]) -> None:
    """Gives a share, all of whose chunks are in `staging.data`, its place."""
    write_json(os.path.join(staging.data, "share.json"), {"options": options, "chunks": checksums})
    staging.publish({})


def join_shares(output: str, count: int, options: Options) -> List[str]:
    """The files with the samples of all chunks of the text, in order.

    Raises InputError when a share is missing or lacks a file, or they were made with other options than these or of
    different texts.
    """
    shares = shares_of(output, count)
    missing = [share for share in shares if not os.path.isdir(share.folder)]
    if missing:
        found = sorted(os.listdir(output)) if os.path.isdir(output) else []
        found = [name for name in found if re.fullmatch(r"\.?part-\d+-of-\d+(\.unfinished)?", name)]
        names, again = ", ".join(share.name for share in missing), f"--part {missing[0].number}/{count}"
        raise InputError(
            f"{output}: {len(missing)} of {count} parts are missing: {names}; found {', '.join(found) or 'none'}. What "
            f"is unfinished still runs or was stopped. Run the missing ones, such as {again}, with the same options"
        )
    checksums = shares[0].check(options)
    for share in shares:
        own = share.check(options)
        if own != checksums:
            chunk = next((number for number, pair in enumerate(zip(own, checksums)) if pair[0] != pair[1]), "after all")
            raise InputError(
                f"{share.folder}: made of another text than {shares[0].name}: {len(own)} chunks, expected "
                f"{len(checksums)}, the first to differ is {chunk}. Give all parts the same input, remove the folder "
                f"of the one that had another, and run it again"
            )
    paths = [chunk_path(shares[number % count].folder, number, value) for number, value in enumerate(checksums)]
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"{path}: is missing; remove the folder and run this part again")
    return paths


def remove_shares(output: str, count: int) -> None:
    for share in shares_of(output, count):
        for folder in (share.folder, share.staging.folder):
            shutil.rmtree(folder, ignore_errors=True)
