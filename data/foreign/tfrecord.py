"""TFRecord files of BERT samples, without TensorFlow: Google's and Graphcore's plain ones, and Graphcore's packed ones.

Shape letters: N samples, R records, L sequence length, M mask slots, S samples of a packed record at most.

A file is records: their length (8 bytes), its checksum, the data, its checksum. The data is a tf.train.Example: a map
from a feature's name to a list of int64 or float. https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import os
import struct
from functools import lru_cache
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np

from data.errors import InputError
from data.foreign.bert_layout import BERT_FEATURES

__all__ = ["feature_names", "read_packed", "read_plain", "record_checksums"]

WEIGHTS = "masked_lm_weights"
PACKED_FEATURES = (
    "packed_input_ids",
    "packed_input_mask",
    "packed_segment_ids",
    "packed_position_ids",
    "packed_masked_lm_positions",
    "packed_masked_lm_ids",
    "packed_masked_lm_mask",
    "packed_next_sentence_labels",
    "packed_next_sentence_mask",
)
BATCH = 1024  # records decoded at a time
MOST_BYTES = 1 << 20  # of a record: the samples of 65,535 tokens have fewer
FLOATS, INTEGERS = 2, 3  # numbers of the fields in tf.train.Feature


def feature_names(path: str) -> List[str]:
    """The names of the first record's features, sorted; none for an empty file. Raises InputError as `read_plain`
    does."""
    for _, records, _ in record_batches(path, 1):
        return sorted(parse_all(records, path, 0)[0])
    return []


def read_plain(path: str) -> Iterator[Tuple[Dict[str, np.ndarray], int]]:
    """Yields (arrays in BERT's layout, see `data.foreign.bert_layout`, bytes of the file read so far), a batch of
    records at a time.

    Raises InputError that names the file and the record: cut off, a checksum that does not match, not a
    tf.train.Example, a feature missing or of another length than in the records before it.
    """
    for first, records, place in record_batches(path, BATCH):
        parsed = parse_all(records, path, first)
        names = BERT_FEATURES + ((WEIGHTS,) if WEIGHTS in parsed[0] else ())
        arrays = {name: column(records, parsed, name, path, first) for name in names}
        arrays["next_sentence_labels"] = arrays["next_sentence_labels"].reshape(-1)
        yield arrays, place


def read_packed(path: str) -> Iterator[Tuple[Dict[str, np.ndarray], int]]:
    """As `read_plain`, for packed records: each of their samples becomes one of its own, in the order of its number.

    packed_input_mask names the sample of a token, 1 to S, and packed_position_ids its place in that sample. The [CLS]s
    are at the row's end, the first sample's last, where packed_next_sentence_labels has their labels. Raises InputError
    also for tokens whose positions do not make a sample.
    """
    for first, records, place in record_batches(path, BATCH):
        parsed = parse_all(records, path, first)
        arrays = {name[len("packed_") :]: column(records, parsed, name, path, first) for name in PACKED_FEATURES}
        yield unpacked(arrays, path, first), place


def unpacked(arrays: Dict[str, np.ndarray], path: str, first: int) -> Dict[str, np.ndarray]:
    """Arrays of R packed records as arrays of their samples, [N, L] and [N, M]."""
    owner, positions = arrays["input_mask"], arrays["position_ids"]
    count_of, sequence_length, mask_tokens = owner.max(axis=1), owner.shape[1], arrays["masked_lm_positions"].shape[1]
    marks = arrays["next_sentence_mask"] > 0
    check_packed_shapes(arrays, path)
    fail_at(
        (owner >= 0).all(axis=1) & (count_of <= marks.shape[1]),
        np.arange(len(owner)),
        f"packed_input_mask must be 0 for padding and 1 to {marks.shape[1]} for samples",
        path,
        first,
    )
    begins = np.cumsum(count_of) - count_of  # the first sample of each record
    count = int(count_of.sum())
    found = {name: np.zeros((count, sequence_length), np.int64) for name in ("input_ids", "input_mask", "segment_ids")}

    row, slot = np.nonzero(owner)
    sample, position = begins[row] + owner[row, slot] - 1, positions[row, slot]
    fail_at(
        (position >= 0) & (position < sequence_length), row, "packed_position_ids must be places in a row", path, first
    )
    np.add.at(found["input_mask"], (sample, position), 1)
    record_of = np.repeat(np.arange(len(owner)), count_of)
    fail_at(
        (found["input_mask"] <= 1).all(axis=1) & (found["input_mask"][:, 0] == 1),
        record_of,
        "packed_position_ids must count each sample's tokens from 0",
        path,
        first,
    )
    for name in ("input_ids", "segment_ids"):
        found[name][sample, position] = arrays[name][row, slot]

    row, slot = np.nonzero(arrays["masked_lm_mask"])
    place = arrays["masked_lm_positions"][row, slot]
    fail_at(
        (place >= 0) & (place < sequence_length),
        row,
        "packed_masked_lm_positions must be places in the row",
        path,
        first,
    )
    fail_at(owner[row, place] > 0, row, "packed_masked_lm_positions must be places of tokens", path, first)
    sample = begins[row] + owner[row, place] - 1
    order = np.argsort(sample, kind="stable")
    row, slot, place, sample = row[order], slot[order], place[order], sample[order]
    counts = np.bincount(sample, minlength=count)
    target = np.arange(len(sample)) - (np.cumsum(counts) - counts)[sample]
    for name, values in (
        ("masked_lm_positions", positions[row, place]),
        ("masked_lm_weights", 1),
        ("masked_lm_ids", arrays["masked_lm_ids"][row, slot]),
    ):
        found[name] = np.zeros((count, mask_tokens), np.int64)
        found[name][sample, target] = values

    # A label is scored on the token at its place among the row's last S: the [CLS] of its sample.
    slots = sequence_length - marks.shape[1]
    scored = np.where(marks, owner[:, slots:], 0)
    ordered = np.sort(scored, axis=1)[:, ::-1]
    expected = np.maximum(count_of[:, None] - np.arange(marks.shape[1]), 0)
    fail_at(
        (ordered == expected).all(axis=1),
        np.arange(len(marks)),
        "packed_next_sentence_mask must mark the [CLS] of each sample once, at the end of the row",
        path,
        first,
    )
    row, slot = np.nonzero(scored)
    found["next_sentence_labels"] = np.zeros(count, np.int64)
    found["next_sentence_labels"][begins[row] + scored[row, slot] - 1] = arrays["next_sentence_labels"][row, slot]
    return found


def check_packed_shapes(arrays: Dict[str, np.ndarray], path: str) -> None:
    for names in (
        ("input_ids", "input_mask", "segment_ids", "position_ids"),
        ("masked_lm_positions", "masked_lm_ids", "masked_lm_mask"),
        ("next_sentence_labels", "next_sentence_mask"),
    ):
        widths = {"packed_" + name: arrays[name].shape[1] for name in names}
        if len(set(widths.values())) > 1:
            raise InputError(f"{path}: features that belong together have different lengths: {widths}")


def fail_at(good: np.ndarray, record_of: np.ndarray, expected: str, path: str, first: int) -> None:
    if not good.all():
        raise InputError(f"{path}: record {int(first + record_of[int(np.argmin(good))])}: {expected}")


def record_batches(path: str, size: int) -> Iterator[Tuple[int, List[bytes], int]]:
    """Yields (the index of the first record, up to `size` records whose checksums match, bytes read so far)."""
    first, headers, records, checksums, problem = 0, [], [], [], None
    try:
        left = os.path.getsize(path)
        file = open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})")
    with file:
        total = left
        while left or records:
            if left:
                header = file.read(12)
                length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
                if len(header) < 12 or length + 16 > left:
                    problem = f"is cut off: {left} bytes are left of the file"
                elif not 4 <= length <= MOST_BYTES:
                    problem = f"says that it has {length} bytes, expected 4 to {MOST_BYTES}"
                else:
                    headers.append(header)
                    records.append(file.read(length))
                    checksums.append(file.read(4))
                    left -= length + 16
            if problem or not left or len(records) == size:
                # Those before it first: a wrong length leads everything after it astray.
                check_checksums(headers, records, checksums, path, first)
                if problem:
                    raise InputError(
                        f"{path}: record {first + len(records)} {problem}. Get the file again; if it is "
                        "compressed, unpack it first"
                    )
                yield first, records, total - left
                first, headers, records, checksums = first + len(records), [], [], []


def check_checksums(headers: List[bytes], records: List[bytes], checksums: List[bytes], path: str, first: int) -> None:
    if not records:
        return
    stored = np.frombuffer(b"".join(header[8:] for header in headers), "<u4"), np.frombuffer(b"".join(checksums), "<u4")
    found = record_checksums([header[:8] for header in headers]), record_checksums(records)
    bad = np.flatnonzero((stored[0] != found[0]) | (stored[1] != found[1]))
    if len(bad):
        raise InputError(
            f"{path}: record {first + bad[0]} is corrupt: its checksum does not match. Get the file again; if "
            "it is compressed or not TFRecord, unpack or convert it first"
        )


def record_checksums(records: Sequence[bytes]) -> np.ndarray:
    """[R] uint32: the checksum that TFRecord has for each of R byte strings of at least 4 bytes: CRC-32C, rotated, plus
    a number.

    Of all strings at once, two bytes at a time. Zeros before a string do not change its remainder as long as that is 0,
    so they stand at the right of a table; that the remainder begins with ones is put into the first four bytes.
    """
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    width = int(sizes.max() + 1) // 2 * 2
    table = np.frombuffer(bytearray(b"".join(record.rjust(width, b"\0") for record in records)), np.uint8).reshape(
        -1, width
    )
    rows, begins = np.arange(len(records))[:, None], (width - sizes)[:, None]
    table[rows, begins + np.arange(4)] ^= 255
    remainders = pair_remainders()
    state = np.zeros(len(records), np.uint32)
    for pair in np.ascontiguousarray(table.view("<u2").T):
        state = remainders.take((state & np.uint32(0xFFFF)) ^ pair) ^ (state >> np.uint32(16))
    state = ~state
    return ((state >> np.uint32(15)) | (state << np.uint32(17))) + np.uint32(0xA282EAD8)


@lru_cache(maxsize=None)
def pair_remainders() -> np.ndarray:
    state = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        state = np.where(state & 1, (state >> np.uint32(1)) ^ np.uint32(0x82F63B78), state >> np.uint32(1))
    return state


def parse_all(records: List[bytes], path: str, first: int) -> List[Dict[str, Tuple[int, int, int]]]:
    parsed = []
    for index, record in enumerate(records, first):
        try:
            parsed.append(features(record))
        except (IndexError, ValueError, KeyError) as error:
            raise InputError(f"{path}: record {index} is not a tf.train.Example with a BERT sample ({error})")
    return parsed


def features(record: bytes) -> Dict[str, Tuple[int, int, int]]:
    """Name -> (FLOATS, INTEGERS or 1 for bytes, where in the record its list begins and ends)."""
    found = {}
    for number, begin, end in parts(record, 0, len(record)):
        if number == 1:
            for _, entry_begin, entry_end in parts(record, begin, end):
                entry = {number: (begin, end) for number, begin, end in parts(record, entry_begin, entry_end)}
                for kind in parts(record, *entry[2]):
                    found[record[slice(*entry[1])].decode()] = kind
    return found


def parts(data: bytes, at: int, end: int) -> List[Tuple[int, int, int]]:
    """(field number, begin, end) of each field of a message all of whose fields are messages or strings."""
    found = []
    while at < end:
        tag, size, at = data[at], data[at + 1], at + 2
        if tag & 0x87 != 2:
            raise ValueError(f"tag {tag} at byte {at - 2}")
        shift = 7
        while size >> shift:  # the last byte taken had its highest bit set
            size += (data[at] - 1) << shift
            shift, at = shift + 7, at + 1
        if at + size > end:
            raise ValueError(f"{size} bytes at byte {at} of {end}")
        found.append((tag >> 3, at, at + size))
        at += size
    return found


def column(
    records: List[bytes], parsed: List[Dict[str, Tuple[int, int, int]]], name: str, path: str, first: int
) -> np.ndarray:
    """[R, values] of one feature in all records, int64 or float32."""
    missing = [index for index, record in enumerate(parsed) if name not in record]
    if missing:
        raise InputError(
            f"{path}: record {first + missing[0]} has no feature {name!r}; found {sorted(parsed[missing[0]])}"
        )
    kind = parsed[0][name][0]
    other = [index for index, record in enumerate(parsed) if record[name][0] != kind or kind not in (FLOATS, INTEGERS)]
    if other:
        raise InputError(
            f"{path}: record {first + other[0]}: the feature {name!r} is not a list of numbers of one kind"
        )
    try:
        lists = [list_bytes(record, *place[name]) for record, place in zip(records, parsed)]
    except (IndexError, ValueError) as error:
        raise InputError(
            f"{path}: records {first} to {first + len(records) - 1}: the feature {name!r} is not a list of "
            f"numbers in one of them ({error})"
        )
    data = np.frombuffer(b"".join(lists), np.uint8)
    bounds = np.cumsum([0] + [len(values) for values in lists])
    last = data < 128 if kind == INTEGERS else np.arange(len(data)) % 4 == 3  # the last byte of a value
    counts = np.diff(np.concatenate([[0], np.cumsum(last)])[bounds])
    whole = np.concatenate([[True], last])[bounds[1:]]
    wrong = np.flatnonzero((counts != counts[0]) | (counts == 0) | ~whole)
    if len(wrong):
        raise InputError(
            f"{path}: record {first + wrong[0]}: the feature {name!r} has {counts[wrong[0]]} values, expected "
            f"{counts[0]} as in record {first}, and not 0"
        )
    values = varints(data, last) if kind == INTEGERS else data.view("<f4")
    return values.reshape(len(records), -1)


def varints(data: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The integers whose bytes, of 7 bits each, the lowest first, end where `last` is set; int64."""
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    values = (data[starts] & 127).astype(np.uint64)
    longer = np.flatnonzero(ends > starts)
    for byte in range(1, 10):
        values[longer] |= (data[starts[longer] + byte] & 127).astype(np.uint64) << np.uint64(7 * byte)
        longer = longer[ends[longer] > starts[longer] + byte]
        if not len(longer):
            break
    return values.view(np.int64)


def list_bytes(record: bytes, kind: int, begin: int, end: int) -> bytes:
    """The values of a list end to end, whether it is written packed (one field for all) or one field a value."""
    packed, found = 0x0A, []
    while begin < end:
        if record[begin] == packed:
            _, begin, stop = parts(record, begin, end)[0]
        else:
            begin += 1
            stop = begin + 4
            if kind == INTEGERS:
                stop = begin + 1
                while record[stop - 1] > 127:
                    stop += 1
        found.append(record[begin:stop])
        begin = stop
    return b"".join(found)
