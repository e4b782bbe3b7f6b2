"""Text files to lines, streamed: plain, gzip (`.gz`) or Zstandard (`.zst`), UTF-8; here or remote."""

import gzip
import itertools
import zlib
from typing import BinaryIO, Callable, Iterator

from data.errors import InputError
from data.preparing.remote import base_name, is_url, open_remote

__all__ = ["read_lines"]

READ_BYTES = 1 << 20
ZSTANDARD_BYTES = 1 << 16  # of a compressed file at a time: what comes out is several times as much


def read_lines(path: str, on_bytes: Callable[[int], object], cut_long: bool = True) -> Iterator[str]:
    """The stripped lines of a file, blank ones as "". `on_bytes` is told how many bytes of the file, compressed or not,
    were read.

    A line of more than a megabyte is cut at a space, to bound memory, unless `cut_long` is false. Raises InputError
    that names the file, and the byte and the line (of the decompressed text) that are not UTF-8, or how its compression
    is broken.
    """
    rest, offset, line_number = b"", 0, 1
    for block in itertools.chain(text_blocks(path, on_bytes), [b""]):
        data = rest + block
        end = len(data) if not block else data.rfind(b"\n") + 1
        if cut_long and not end and len(data) > READ_BYTES:
            end = data.rfind(b" ") + 1
        try:
            text = data[:end].decode("utf-8")
        except UnicodeDecodeError as error:
            line = line_number + data.count(b"\n", 0, error.start)
            bad_byte = f"byte {offset + error.start}, in line {line}, is 0x{data[error.start]:02x} ({error.reason})"
            raise InputError(
                f"{path}: {bad_byte}, expected UTF-8 text. Convert the file, for instance with "
                "`iconv -f LATIN1 -t UTF-8`"
            )
        if text.startswith("\ufeff") and not offset:
            text = text[1:]
        if text:
            lines = text.split("\n")
            yield from map(str.strip, lines if lines[-1] else lines[:-1])
        offset, line_number, rest = offset + end, line_number + data.count(b"\n", 0, end), data[end:]


def text_blocks(path: str, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    """A file's decompressed bytes in blocks, none of them empty."""
    decompress = zstandard_blocks if base_name(path).endswith(".zst") else plain_or_gzip_blocks
    with open_remote(path) if is_url(path) else open(path, "rb") as file:
        read = 0
        for block in decompress(path, file):
            on_bytes(file.tell() - read)
            read = file.tell()
            yield block
        on_bytes(file.tell() - read)


def plain_or_gzip_blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    contents = gzip.GzipFile(fileobj=file) if base_name(path).endswith(".gz") else file
    try:
        yield from iter(lambda: contents.read(READ_BYTES), b"")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(path, "gzip", error)


def zstandard_blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    import zstandard  # only those who have such files need it

    # Not its stream reader, which takes a file that is cut off for one that ends.
    frame = None
    for compressed in iter(lambda: file.read(ZSTANDARD_BYTES), b""):
        while compressed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                block = frame.decompress(compressed)
            except zstandard.ZstdError as error:
                raise damaged(path, "Zstandard", error)
            if block:
                yield block
            compressed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise damaged(path, "Zstandard", "it ends within a frame")


def damaged(path: str, kind: str, reason: object) -> InputError:
    return InputError(f"{path}: cannot be unpacked as {kind} ({reason}). It may be cut off or damaged: fetch it again")
