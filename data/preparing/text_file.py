"""Text files to lines, streamed: plain, gzip (`.gz`) or Zstandard (`.zst`), in any encoding; here or remote."""

import codecs
import difflib
import encodings.aliases
import gzip
import itertools
import re
import zlib
from typing import BinaryIO, Callable, Iterator, Optional

from data.errors import InputError
from data.preparing.remote import base_name, is_url, open_remote

__all__ = ["UTF_8", "check_encoding", "likely_encoding", "read_lines", "read_text"]

UTF_8 = "utf-8"
READ_BYTES = 1 << 20
ZSTANDARD_BYTES = 1 << 16  # of a compressed file at a time: what comes out is several times as much
MARKS = {  # how a file begins that says its encoding; UTF-32 first, for one of its marks begins with one of UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NO_TEXT = {  # how a file begins that is none -> what it is, and what to do
    b"PAR1": "is a parquet file. Give --format parquet",
    b"PK\x03\x04": "is a zip archive, as .xlsx and .docx files are. Save it as CSV or as text",
    b"%PDF": "is a PDF. Extract its text first, for instance with pdftotext",
    b"\x1f\x8b": "is compressed by gzip. Give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard. Give it a name that ends in .zst",
}
# Encodings to guess among, the most used first. Text that several read alike is taken for the first of them.
GUESSES = (
    *("cp1252", "cp1254", "cp1250", "cp1251", "cp1253", "cp1255", "cp1256", "cp1257", "cp874", "koi8_r"),
    *("shift_jis", "cp932", "euc_jp", "iso2022_jp", "euc_kr", "cp949", "big5", "gb18030", "utf_16_le", "utf_16_be"),
)
GUESS_BYTES = 1 << 16
ISO_2022_JP = re.compile(rb"\x1b\$[@B]")  # seven bits, and so valid UTF-8


def check_encoding(name: str) -> None:
    """Raises InputError for a name that is no encoding of text that Python has, with names that are close."""
    try:
        b" ".decode(name)
    except UnicodeError:
        pass  # a space alone is not text in it
    except (LookupError, ValueError):
        known = sorted({*encodings.aliases.aliases, *encodings.aliases.aliases.values()})
        close = difflib.get_close_matches(name.lower().replace("-", "_"), known) or ["utf-16", "shift_jis", "cp1254"]
        raise InputError(f"--encoding is {name!r}, expected an encoding that Python has, such as {', '.join(close)}")


def read_lines(
    path: str, on_bytes: Callable[[int], object], cut_long: bool = True, encoding: str = UTF_8
) -> Iterator[str]:
    """The stripped lines of a file, blank ones as "". Arguments and errors are those of `read_text`."""
    for text in read_text(path, on_bytes, cut_long, encoding):
        lines = text.split("\n")
        yield from map(str.strip, lines if lines[-1] else lines[:-1])


def read_text(
    path: str, on_bytes: Callable[[int], object], cut_long: bool = True, encoding: str = UTF_8
) -> Iterator[str]:
    """The text of a file in pieces of whole lines. `on_bytes` is told how many bytes of the file, compressed or not,
    were read. A mark of UTF-16 or UTF-32 at the file's beginning counts more than the encoding utf-8.

    A line of more than a megabyte is cut at a space, to bound memory, unless `cut_long` is false. Raises InputError
    that names the file, and the byte and the line (of the decompressed text) that are not in the encoding with one that
    may be right, or how its compression is broken.
    """
    decoder, rest, read, line = None, "", 0, 1
    for block in itertools.chain(text_blocks(path, on_bytes), [b""]):
        if decoder is None:
            encoding = encoding_of(path, block, encoding)
            decoder = codecs.getincrementaldecoder(encoding)()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            start = read + len(block) - len(error.object)
            raise not_in_encoding(path, encoding, error, start, line + rest.count("\n"))
        except UnicodeError as error:
            raise InputError(f"{path}: {error}. Give --encoding utf-16-le or --encoding utf-16-be")
        text = rest + (text[1:] if not read and text.startswith("\ufeff") else text)
        end = len(text) if not block else text.rfind("\n") + 1
        if (
            cut_long
            and not end
            and len(text.encode("utf-8", "surrogatepass")) + len(decoder.getstate()[0]) > READ_BYTES
        ):
            end = text.rfind(" ") + 1
        if end:
            yield text[:end]
        read, line, rest = read + len(block), line + text.count("\n", 0, end), text[end:]


def encoding_of(path: str, start: bytes, given: str) -> str:
    """The encoding of a file that starts so. Raises InputError that says what it is when it is not text in it."""
    for signature, what in NO_TEXT.items():
        if start.startswith(signature):
            raise InputError(f"{path}: {what}")
    if codecs.lookup(given).name != UTF_8:
        return given
    if ISO_2022_JP.search(start):
        raise InputError(f"{path}: looks like ISO-2022-JP, which switches to Japanese. Give --encoding iso2022_jp")
    marked = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    zeros = [start[first:1000:2].count(0) for first in (0, 1)]
    if not marked and 50 * sum(zeros) > len(start[:1000]):  # of scripts such as Hindi's the spaces and line ends
        likely = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        raise InputError(f"{path}: holds many zero bytes. If it is text, it is likely UTF-16: give --encoding {likely}")
    return marked or given


def not_in_encoding(path: str, encoding: str, error: UnicodeDecodeError, offset: int, line: int) -> InputError:
    """`offset` and `line` are those of the first byte of `error.object`."""
    data, start = error.object, error.start
    line += data[:start].decode(encoding, "ignore").count("\n")
    bad_byte = f"byte {offset + start}, in line {line}, is 0x{data[start]:02x} ({error.reason})"
    expected = f"expected {'UTF-8' if encoding == UTF_8 else encoding} text"
    sample = data[data.rfind(b"\n", 0, start) + 1 :][:GUESS_BYTES]
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    likely = likely_encoding(sample)
    if likely is None:
        return InputError(f"{path}: {bad_byte}, {expected}. Name its encoding with --encoding, if it is text")
    reads = sample.decode(likely, "replace").strip().split("\n")[0][:60]
    advice = (
        f"It is likely {likely}, in which the line reads {reads!r}. Add --encoding {likely}, or another if it is not"
    )
    return InputError(f"{path}: {bad_byte}, {expected}. {advice}")


def likely_encoding(sample: bytes) -> Optional[str]:
    """The encoding that text of some lines is likely in, by charset-normalizer; None when none of GUESSES is likely."""
    import charset_normalizer  # only those who have such text need it

    matches = charset_normalizer.from_bytes(sample, cp_isolation=list(GUESSES))
    # The library puts the least mess first. Among those that are almost as tidy, letters that are frequent in some
    # language tell more; else it takes French for Baltic and German for Polish.
    tidy = [match for match in matches if match.chaos <= matches[0].chaos + 0.06]
    best = max((match.coherence for match in tidy), default=0.0)
    names = {name for match in tidy if match.coherence >= best - 0.03 for name in match.could_be_from_charset}
    return next((name for name in GUESSES if name in names), None)


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
