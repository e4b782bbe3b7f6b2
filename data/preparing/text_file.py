"""Text files to lines, streamed: plain, gzip (`.gz`) or Zstandard (`.zst`), UTF-8."""

import gzip
import zlib
from typing import BinaryIO, Callable, Iterator

from data.errors import InputError

__all__ = ["read_lines"]

READ_BYTES = 1 << 20
ZSTANDARD_BYTES = 1 << 16  # of a compressed file at a time: what comes out is several times as much


def read_lines(path: str, on_bytes: Callable[[int], object], cut_long: bool = True) -> Iterator[str]:
    """The stripped lines of a file, blank ones as "". `on_bytes` is told the bytes of the file, packed or not, as they
    are read.

    A line beyond a megabyte is cut at a space, to bound memory, unless `cut_long` is false. Raises InputError that
    names the file, and the byte and the line (of the unpacked text) that are not UTF-8, or how its compression is
    broken.
    """
    rest, offset, line_number = b"", 0, 1
    for block in with_end(text_blocks(path, on_bytes)):
        data = rest + block
        end = len(data) if not block else data.rfind(b"\n") + 1
        if cut_long and not end and len(data) > READ_BYTES:
            end = data.rfind(b" ") + 1
        try:
            text = data[:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                "%s: byte %d, in line %d, is 0x%02x (%s), expected UTF-8 text. Convert the file, for instance "
                "with `iconv -f LATIN1 -t UTF-8`"
                % (
                    path,
                    offset + error.start,
                    line_number + data.count(b"\n", 0, error.start),
                    data[error.start],
                    error.reason,
                )
            )
        if text.startswith("\ufeff") and not offset:
            text = text[1:]
        if text:
            lines = text.split("\n")
            yield from map(str.strip, lines if lines[-1] else lines[:-1])
        offset, line_number, rest = offset + end, line_number + data.count(b"\n", 0, end), data[end:]


def with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def text_blocks(path: str, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    """A file's unpacked bytes in blocks, none of them empty."""
    unpack = gzip_blocks if path.endswith(".gz") else zstandard_blocks if path.endswith(".zst") else plain_blocks
    with open(path, "rb") as file:
        read = 0
        for block in unpack(path, file):
            on_bytes(file.tell() - read)
            read = file.tell()
            yield block
        on_bytes(file.tell() - read)


def plain_blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(READ_BYTES), b"")


def gzip_blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    unpacked = gzip.GzipFile(fileobj=file)
    try:
        yield from iter(lambda: unpacked.read(READ_BYTES), b"")
    except (OSError, EOFError, zlib.error) as error:
        raise broken(path, "gzip", error)


def zstandard_blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    import zstandard  # only those who have such files need it

    # Not its stream reader, which takes a file that is cut off for one that ends.
    frame = None
    for packed in iter(lambda: file.read(ZSTANDARD_BYTES), b""):
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                block = frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise broken(path, "Zstandard", error)
            if block:
                yield block
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise broken(path, "Zstandard", "it ends within a frame")


def broken(path: str, kind: str, error: object) -> InputError:
    return InputError(f"{path}: cannot be unpacked as {kind} ({error}). It may be cut off or damaged: fetch it again")
