"""TFRecord files of BERT samples, without TensorFlow: Google's and Graphcore's plain ones, and Graphcore's packed ones.

Shape letters: N samples, R records, L sequence length, M mask slots, S samples of a packed record at most.

A file is records: their length (8 bytes), its checksum, the data, its checksum. The data is a tf.train.Example: a map
from a feature's name to a list of int64 or float. https://www.tensorflow.org/tutorials/load_data/tfrecord

google-crc32c computes the checksums and is imported only when such a file is read.
"""

import os
import struct
from itertools import islice
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from data.errors import InputError
from data.foreign.bert_layout import BERT_FEATURES

__all__ = ["feature_names", "import_checksum", "read_packed", "read_plain"]

WEIGHTS = "masked_lm_weights"
PACKED_TOKENS = ("input_ids", "input_mask", "segment_ids", "position_ids")
PACKED_MASKS = ("masked_lm_positions", "masked_lm_ids", "masked_lm_mask")
PACKED_LABELS = ("next_sentence_labels", "next_sentence_mask")
BATCH = 1024  # records decoded at a time
MOST_BYTES = 1 << 20  # of a record: the samples of 65,535 tokens have fewer
FLOATS, INTEGERS = 2, 3  # numbers of the fields in tf.train.Feature
PACKED_LIST = 0x0A  # the tag of a list that is one field, as protobuf 3 writes it


def feature_names(path: str) -> List[str]:
    """The names of the first record's features, sorted; none for an empty file. Raises as `read_plain` does."""
    for batch in record_batches(path, 1):
        return sorted(batch.features[0])
    return []


def read_plain(path: str) -> Iterator[Tuple[Dict[str, np.ndarray], int]]:
    """Yields (arrays in BERT's layout, see data/foreign/bert_layout.py; bytes of the file read so far), in batches.

    Raises InputError that names the file and the record: cut off, a checksum that does not match, not a
    tf.train.Example, a feature missing or of another length than in the records before it.
    """
    for batch in record_batches(path, BATCH):
        names = BERT_FEATURES + ((WEIGHTS,) if WEIGHTS in batch.features[0] else ())
        arrays = {name: batch.column(name) for name in names}
        arrays["next_sentence_labels"] = arrays["next_sentence_labels"].reshape(-1)
        yield arrays, batch.place


def read_packed(path: str) -> Iterator[Tuple[Dict[str, np.ndarray], int]]:
    """As `read_plain`, for packed records: each of their samples becomes one of its own, in the order of its number.

    packed_input_mask is the number of a token's sample, 1 to S, packed_position_ids its place there. The [CLS]s are at
    the row's end, the first sample's last, where packed_next_sentence_labels has their labels. Raises InputError also
    for tokens whose positions do not make a sample.
    """
    for batch in record_batches(path, BATCH):
        yield unpacked(batch), batch.place


class Records:
    """Records of a file, the first of which is number `first`; the file is read up to `place`."""

    def __init__(self, path: str, first: int, records: List[bytes], place: int):
        self.path, self.first, self.records, self.place = path, first, records, place
        self.features: List[Dict[str, Tuple[int, int, int]]] = []
        for index, record in enumerate(records):
            try:
                self.features.append(parse_example(record))
            except (IndexError, ValueError, KeyError) as error:
                raise self.error(index, f" is not a tf.train.Example with a BERT sample ({error})")

    def error(self, index: int, problem: str) -> InputError:
        return InputError(f"{self.path}: record {self.first + index}{problem}")

    def check(self, good: np.ndarray, expected: str, records: Optional[np.ndarray] = None) -> None:
        """Raises InputError for the first value that is not good. They are of each record in turn, or of `records`."""
        if not good.all():
            bad = int(np.argmin(good))
            raise self.error(bad if records is None else int(records[bad]), f": {expected}")

    def column(self, name: str) -> np.ndarray:
        """[R, values] of one feature in all records, int64 or float32."""
        lists, kind = [], self.features[0].get(name, (0,))[0]
        for index, (record, features) in enumerate(zip(self.records, self.features)):
            if name not in features:
                raise self.error(index, f" has no feature {name!r}; found {sorted(features)}")
            if features[name][0] != kind or kind not in (FLOATS, INTEGERS):
                raise self.error(index, f": the feature {name!r} is not a list of numbers of one kind")
            try:
                lists.append(list_bytes(record, *features[name]))
            except (IndexError, ValueError) as error:
                raise self.error(index, f": the feature {name!r} is not a list of numbers ({error})")
        data = np.frombuffer(b"".join(lists), np.uint8)
        bounds = np.cumsum([0] + [len(values) for values in lists])
        last = data < 128 if kind == INTEGERS else np.arange(len(data)) % 4 == 3  # the last byte of a value
        counts = np.diff(np.concatenate([[0], np.cumsum(last)])[bounds])
        whole = np.concatenate([[True], last])[bounds[1:]]
        good = (counts == counts[0]) & (counts > 0) & whole
        if not good.all():
            bad = int(np.argmin(good))
            expected = f"{counts[0]} as in record {self.first}, and not 0"
            raise self.error(bad, f": the feature {name!r} has {counts[bad]} values, expected {expected}")
        values = varints(data, last) if kind == INTEGERS else data.view("<f4")
        return values.reshape(len(lists), -1)


def unpacked(batch: Records) -> Dict[str, np.ndarray]:
    """R packed records as arrays of their samples, [N, L] and [N, M]."""
    arrays: Dict[str, np.ndarray] = {}
    for names in (PACKED_TOKENS, PACKED_MASKS, PACKED_LABELS):
        arrays.update({name: batch.column("packed_" + name) for name in names})
        widths = {"packed_" + name: arrays[name].shape[1] for name in names}
        if len(set(widths.values())) > 1:
            raise InputError(f"{batch.path}: features that belong together have different lengths: {widths}")
    owner, positions = arrays["input_mask"], arrays["position_ids"]
    scores = arrays["next_sentence_mask"] > 0
    length, most, counts = owner.shape[1], scores.shape[1], owner.max(axis=1)
    known = (owner >= 0).all(axis=1) & (counts <= most)
    batch.check(known, f"packed_input_mask must be 0 for padding and 1 to {most} for samples")
    begins, total = np.cumsum(counts) - counts, int(counts.sum())  # the first sample of each record

    row, slot = np.nonzero(owner)
    sample, position = begins[row] + owner[row, slot] - 1, positions[row, slot]
    batch.check((position >= 0) & (position < length), "packed_position_ids must be places in a row", row)
    samples: Dict[str, np.ndarray] = {name: np.zeros((total, length), np.int64) for name in PACKED_TOKENS[:3]}
    np.add.at(samples["input_mask"], (sample, position), 1)
    once = (samples["input_mask"] <= 1).all(axis=1) & (samples["input_mask"][:, 0] == 1)
    record_of = np.repeat(np.arange(len(owner)), counts)
    batch.check(once, "packed_position_ids must count each sample's tokens from 0", record_of)
    for name in ("input_ids", "segment_ids"):
        samples[name][sample, position] = arrays[name][row, slot]

    row, slot = np.nonzero(arrays["masked_lm_mask"])
    place = arrays["masked_lm_positions"][row, slot]
    batch.check((place >= 0) & (place < length), "packed_masked_lm_positions must be places in the row", row)
    batch.check(owner[row, place] > 0, "packed_masked_lm_positions must be places of tokens", row)
    sample = begins[row] + owner[row, place] - 1
    order = np.argsort(sample, kind="stable")
    row, slot, place, sample = row[order], slot[order], place[order], sample[order]
    mask_slots = np.arange(arrays["masked_lm_ids"].shape[1])
    used = mask_slots < np.bincount(sample, minlength=total)[:, None]
    samples.update({name: np.zeros(used.shape, np.int64) for name in PACKED_MASKS[:2]}, **{WEIGHTS: used})
    samples["masked_lm_positions"][used] = positions[row, place]
    samples["masked_lm_ids"][used] = arrays["masked_lm_ids"][row, slot]

    # A label is scored on the token at its place among the row's last S: the [CLS] of its sample.
    scored = np.where(scores, owner[:, length - most :], 0)
    expected = np.maximum(counts[:, None] - np.arange(most), 0)
    once = (np.sort(scored, axis=1)[:, ::-1] == expected).all(axis=1)
    batch.check(once, "packed_next_sentence_mask must mark the [CLS] of each sample once, at the end of the row")
    row, slot = np.nonzero(scored)
    samples["next_sentence_labels"] = np.zeros(total, np.int64)
    samples["next_sentence_labels"][begins[row] + scored[row, slot] - 1] = arrays["next_sentence_labels"][row, slot]
    return samples


def import_checksum() -> Callable[[bytes], int]:
    """What TFRecord has of a byte string: its CRC-32C, rotated, plus a number."""
    try:
        from google_crc32c import value as crc32c
    except ImportError as error:
        raise InputError(f"reading TFRecord needs google-crc32c ({error}): pip install google-crc32c")

    def checksum(data: bytes) -> int:
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    return checksum


def record_batches(path: str, size: int) -> Iterator[Records]:
    """Up to `size` records at a time."""
    first, records = 0, read_records(path)
    while batch := list(islice(records, size)):
        yield Records(path, first, [record for record, _ in batch], batch[-1][1])
        first += len(batch)


def read_records(path: str) -> Iterator[Tuple[bytes, int]]:
    """Yields (a record whose checksums match, bytes of the file read so far)."""
    checksum, number = import_checksum(), 0
    try:
        left = total = os.path.getsize(path)
        with open(path, "rb") as file:
            while left:
                header = file.read(12)
                length, problem = int.from_bytes(header[:8], "little"), ""
                if left < 16 or left < length + 16:
                    problem = f"is cut off: {left} bytes are left of the file"
                elif not 4 <= length <= MOST_BYTES:
                    problem = f"says that it has {length} bytes, expected 4 to {MOST_BYTES}"
                else:
                    record, end = file.read(length), file.read(4)
                    stored = struct.unpack("<II", header[8:] + end)
                    if stored != (checksum(header[:8]), checksum(record)):
                        problem = "is corrupt: its checksum does not match"
                if problem:
                    advice = "Get the file again; if it is compressed, unpack it first"
                    raise InputError(f"{path}: record {number} {problem}. {advice}")
                left, number = left - length - 16, number + 1
                yield record, total - left
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})")


def parse_example(record: bytes) -> Dict[str, Tuple[int, int, int]]:
    """Name -> (FLOATS, INTEGERS or 1 for bytes, where in the record its list begins and ends)."""
    features = {}
    for number, begin, end in message_fields(record, 0, len(record)):
        if number == 1:
            for _, entry_begin, entry_end in message_fields(record, begin, end):
                entry = {key: place for key, *place in message_fields(record, entry_begin, entry_end)}
                for kind in message_fields(record, *entry[2]):
                    features[record[slice(*entry[1])].decode()] = kind
    return features


def message_fields(data: bytes, at: int, end: int) -> List[Tuple[int, int, int]]:
    """(field number, begin, end) of each field of a message all of whose fields are messages or strings."""
    fields = []
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
        fields.append((tag >> 3, at, at + size))
        at += size
    return fields


def list_bytes(record: bytes, kind: int, begin: int, end: int) -> bytes:
    """The values of a list end to end, whether it is written packed (one field for all) or one field a value."""
    pieces = []
    while begin < end:
        if record[begin] == PACKED_LIST:
            _, begin, stop = message_fields(record, begin, end)[0]
        else:
            begin += 1
            stop = begin + (4 if kind == FLOATS else 1)
            while kind == INTEGERS and record[stop - 1] > 127:
                stop += 1
        pieces.append(record[begin:stop])
        begin = stop
    return b"".join(pieces)


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
