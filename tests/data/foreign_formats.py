"""Small encoders of others' formats for tests, written apart from the readers, one value at a time."""

import struct
from typing import Dict, List, Sequence

from data.samples import Samples

__all__ = [
    "bert_arrays",
    "example",
    "hub_columns",
    "integers_of_tfrecord",
    "packed_features",
    "plain_features",
    "write_tfrecord",
]


def bert_arrays(samples: Samples) -> Dict[str, List]:
    """Samples as lists in BERT's layout, made sample by sample."""
    arrays = {
        name: []
        for name in (
            "input_ids",
            "input_mask",
            "segment_ids",
            "masked_lm_positions",
            "masked_lm_ids",
            "next_sentence_labels",
        )
    }
    slots, length = samples.mlm_positions.shape[1], samples.input_ids.shape[1]
    for i in range(len(samples)):
        tokens, first, count = int(samples.lengths[i]), int(samples.first_lengths[i]), int(samples.mlm_counts[i])
        arrays["input_ids"].append(samples.input_ids[i].tolist())
        arrays["input_mask"].append([1] * tokens + [0] * (length - tokens))
        arrays["segment_ids"].append([0] * first + [1] * (tokens - first) + [0] * (length - tokens))
        arrays["masked_lm_positions"].append(samples.mlm_positions[i, :count].tolist() + [0] * (slots - count))
        arrays["masked_lm_ids"].append(samples.mlm_labels[i, :count].tolist() + [0] * (slots - count))
        arrays["next_sentence_labels"].append(int(samples.nsp_labels[i]))
    return arrays


def hub_columns(samples: Samples) -> Dict[str, List]:
    arrays = bert_arrays(samples)
    labels = []
    for i in range(len(samples)):
        labels.append([-100] * samples.input_ids.shape[1])
        for slot in range(samples.mlm_counts[i]):
            labels[-1][samples.mlm_positions[i, slot]] = int(samples.mlm_labels[i, slot])
    return {
        "input_ids": arrays["input_ids"],
        "attention_mask": arrays["input_mask"],
        "token_type_ids": arrays["segment_ids"],
        "labels": labels,
        "next_sentence_label": arrays["next_sentence_labels"],
    }


def plain_features(samples: Samples, weights: bool) -> List[Dict]:
    """One dictionary a sample; floats make a float list."""
    arrays, slots = bert_arrays(samples), samples.mlm_positions.shape[1]
    records = []
    for i in range(len(samples)):
        record = {name: values[i] for name, values in arrays.items()}
        record["next_sentence_labels"] = [record["next_sentence_labels"]]
        if weights:
            count = int(samples.mlm_counts[i])
            record["masked_lm_weights"] = [1.0] * count + [0.0] * (slots - count)
        records.append(record)
    return records


def packed_features(
    samples: Samples, groups: Sequence[Sequence[int]], length: int, slots: int, most: int
) -> List[Dict]:
    """One dictionary for each group of samples, as Graphcore's script packs them: the [CLS]s go to the row's end."""
    records = []
    for group in groups:
        row = {name: [0] * length for name in ("input_ids", "input_mask", "segment_ids", "position_ids")}
        row.update(
            {name: [0] * slots for name in ("masked_lm_positions", "masked_lm_ids")},
            masked_lm_mask=[0.0] * slots,
            next_sentence_labels=[0] * most,
            next_sentence_mask=[0.0] * most,
        )
        offset = slot = 0
        for number, i in enumerate(group, 1):
            for position in range(int(samples.lengths[i])):
                place = length - number if position == 0 else offset + position - 1
                row["input_ids"][place] = int(samples.input_ids[i, position])
                row["input_mask"][place] = number
                row["segment_ids"][place] = int(position >= samples.first_lengths[i])
                row["position_ids"][place] = position
            for mask in range(int(samples.mlm_counts[i])):
                row["masked_lm_positions"][slot] = offset + int(samples.mlm_positions[i, mask]) - 1
                row["masked_lm_ids"][slot] = int(samples.mlm_labels[i, mask])
                row["masked_lm_mask"][slot] = float(number)
                slot += 1
            row["next_sentence_labels"][-number] = int(samples.nsp_labels[i])
            row["next_sentence_mask"][-number] = 1.0
            offset += int(samples.lengths[i]) - 1
        records.append({"packed_" + name: values for name, values in row.items()})
    return records


def varint(value: int) -> bytes:
    value, septets = value % (1 << 64), []
    while value > 127:
        septets.append(value & 127 | 128)
        value >>= 7
    return bytes(septets + [value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Dict[str, Sequence], packed: bool = True) -> bytes:
    """A tf.train.Example; `packed` as protobuf 3 writes lists, else one field a value as version 2 did."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], float):
            kind, items, tag = 2, [struct.pack("<f", value) for value in values], b"\x0d"
        else:
            kind, items, tag = 3, [varint(value) for value in values], b"\x08"
        content = field(1, b"".join(items)) if packed else b"".join(tag + item for item in items)
        entries += field(1, field(1, name.encode()) + field(2, field(kind, content)))
    return field(1, entries)


def checksum(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    state ^= 0xFFFFFFFF
    return (((state >> 15) | (state << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def write_tfrecord(path, records: Sequence[bytes]) -> str:
    with open(str(path), "wb") as file:
        for record in records:
            header = struct.pack("<Q", len(record))
            file.write(header + struct.pack("<I", checksum(header)) + record + struct.pack("<I", checksum(record)))
    return str(path)


def fields(data: bytes):
    """(number, content) of a message's fields; content is bytes or an integer."""
    numbers, at = [], 0

    def next_varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag, value = next_varint(), next_varint()
        if tag & 7 == 2:
            value, at = data[at : at + value], at + value
        numbers.append((tag >> 3, value))
    return numbers


def integers_of_tfrecord(path: str) -> Dict[str, List[List[int]]]:
    """Feature -> its integers in each record, those packed as protobuf 3 does; floats are left out."""
    with open(path, "rb") as file:
        content = file.read()
    features, at = {}, 0
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        ((_, entries),) = fields(content[at + 12 : at + 12 + size])
        at += size + 16
        for _, entry in fields(entries):
            (_, name), (_, feature) = fields(entry)
            ((kind, values),) = fields(feature)
            if kind == 3:
                ((_, packed),) = fields(values)
                # The varints of the list, read as the contents of fields number 0.
                features.setdefault(name.decode(), []).append(
                    [value for _, value in fields(b"".join(b"\0" + item for item in split_varints(packed)))]
                )
    return features


def split_varints(data: bytes) -> List[bytes]:
    items, begin = [], 0
    for at, byte in enumerate(data, 1):
        if byte < 128:
            items.append(data[begin:at])
            begin = at
    return items
