import gzip
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import convert as module
from data.convert import ConvertOptions, convert, main, recognise
from data.errors import InputError
from data.foreign import hub
from data.foreign.nvidia import is_nvidia, open_nvidia, read_nvidia, write_nvidia
from data.foreign.tfrecord import import_checksum
from data.loading.shard_files import open_shards
from data.preparing.staging import Staging
from data.samples import FIELDS, Samples
from data.shards import read_samples, write_shard
from data.tokenizer import vocab_sha256
from tests import ROOT, assert_help_teaches
from tests.data.foreign_formats import (
    bert_arrays,
    example,
    hub_columns,
    integers_of_tfrecord,
    packed_features,
    plain_features,
    write_tfrecord,
)
from tests.make_samples import WORDS, bert_samples

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")
LENGTH, SLOTS = 16, 4
WIDE = ("input_ids", "masked_lm_positions", "masked_lm_ids")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="development data is not there")
few_examples = settings(deadline=None, max_examples=12)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "words.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return str(path)


def write_hdf5(path, samples):
    with h5py.File(str(path), "w") as file:
        for name, values in bert_arrays(samples).items():
            file.create_dataset(name, data=np.array(values, np.int32 if name in WIDE else np.int8), compression="gzip")
    return str(path)


def write_parquet(path, samples):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(hub_columns(samples)), str(path), row_group_size=7)
    return str(path)


def write_arrow(path, samples, opener="new_stream"):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(hub_columns(samples))
    with arrow.OSFile(str(path), "wb") as file, getattr(arrow.ipc, opener)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return str(path)


def write_plain(path, samples):
    return write_tfrecord(path, [example(record) for record in plain_features(samples, weights=True)])


def run(paths, vocab, output, **options):
    return convert(ConvertOptions([str(path) for path in paths], str(output), vocab=vocab, **options), progress=False)


def written(folder):
    return Samples.concatenate(
        [read_samples(shard.path, 0, shard.num_samples) for shard in open_shards([os.path.join(str(folder), "*.h5")])]
    )


def assert_equal(actual, expected):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
        assert getattr(actual, name).dtype == getattr(expected, name).dtype, name


WRITERS = {
    "nvidia": write_hdf5,
    "tfrecord": write_plain,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "arrow file": lambda path, samples: write_arrow(path, samples, "new_file"),
    "tfrecord without weights": lambda path, samples: write_tfrecord(
        path, [example(record, packed=False) for record in plain_features(samples, weights=False)]
    ),
}


@pytest.mark.parametrize("writer", list(WRITERS))
@few_examples
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 30))
def test_samples_of_every_format_become_shards_token_for_token(tmp_path_factory, vocab, writer, seed, count):
    folder = tmp_path_factory.mktemp("convert")
    samples = bert_samples(np.random.default_rng(seed), count, LENGTH, SLOTS)
    path = WRITERS[writer](folder / "samples", samples)
    result = run([path], vocab, folder / "out", mask_tokens=SLOTS, samples_per_shard=11)
    assert_equal(written(folder / "out"), samples)
    assert (result.samples, result.shards) == (count, -(-count // 11)) and result.tokens == samples.lengths.sum()


@few_examples
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 30))
def test_packed_records_become_a_sample_for_each_of_theirs(tmp_path_factory, vocab, seed, count):
    folder, rng = tmp_path_factory.mktemp("convert"), np.random.default_rng(seed)
    samples = bert_samples(rng, count, LENGTH, SLOTS)
    bounds = np.unique(np.concatenate([[0, count], rng.integers(0, count, count)]))
    groups = [list(range(i, min(i + 3, end))) for begin, end in zip(bounds, bounds[1:]) for i in range(begin, end, 3)]
    records = packed_features(samples, groups, 3 * LENGTH, 3 * SLOTS, 3)
    path = write_tfrecord(folder / "packed", [example(record) for record in records])
    run([path], vocab, folder / "out", sequence_length=LENGTH, mask_tokens=SLOTS)
    assert_equal(written(folder / "out"), samples)


@few_examples
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 30))
def test_shards_survive_the_way_through_nvidias_files(tmp_path_factory, vocab, seed, count):
    folder = tmp_path_factory.mktemp("convert")
    samples = bert_samples(np.random.default_rng(seed), count, LENGTH, SLOTS)
    write_shard(str(folder / "own.h5"), samples, len(WORDS), vocab_sha256(WORDS), {})
    run([folder / "own.h5"], None, folder / "nvidia", target="nvidia", samples_per_shard=13)
    paths = sorted(str(path) for path in (folder / "nvidia").iterdir())
    plain = bert_arrays(samples)
    for number, path in enumerate(paths):
        with h5py.File(path, "r") as file:
            for name, values in plain.items():
                assert file[name].compression == "gzip"
                assert file[name].dtype == (np.int32 if name in WIDE else np.int8)
                np.testing.assert_array_equal(file[name][:], values[13 * number : 13 * number + 13])
    run(paths, vocab, folder / "back")
    assert_equal(written(folder / "back"), samples)


def test_samples_of_one_segment_stay_so_on_the_way_through_nvidias_files(tmp_path, vocab):
    samples = bert_samples(np.random.default_rng(0), 9, LENGTH, SLOTS)
    write_nvidia(str(tmp_path / "two.h5"), [samples])
    samples.first_lengths[:], samples.nsp_labels[:] = samples.lengths, 0
    write_shard(str(tmp_path / "own.h5"), samples, len(WORDS), vocab_sha256(WORDS), {}, segments=1)
    run([tmp_path / "own.h5"], None, tmp_path / "nvidia", target="nvidia")
    with pytest.raises(InputError, match="--cased needs --vocab"):
        run([tmp_path / "own.h5"], None, tmp_path / "cased", target="nvidia", lowercase=False)
    path = str(tmp_path / "nvidia" / "train-00000.h5")
    run([path], vocab, tmp_path / "back")
    (shard,) = open_shards([str(tmp_path / "back" / "*.h5")])
    assert open_nvidia(path, len(WORDS)).segments == shard.segments == 1
    assert_equal(written(tmp_path / "back"), samples)
    with pytest.raises(InputError, match=r"two.h5: its samples have 2 segment\(s\), others 1. Convert it alone"):
        run([path, tmp_path / "two.h5"], vocab, tmp_path / "both")


def test_the_folder_has_the_vocabulary_and_its_hash(tmp_path, vocab):
    samples = bert_samples(np.random.default_rng(0), 5)
    run([write_hdf5(tmp_path / "a.hdf5", samples)], vocab, tmp_path / "out")
    assert sorted(os.listdir(str(tmp_path / "out"))) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.h5",
        "vocab.txt",
    ]
    (shard,) = open_shards([str(tmp_path / "out" / "*.h5")])
    assert (shard.vocab_size, shard.vocab_sha256) == (len(WORDS), vocab_sha256(WORDS))


def test_files_of_several_formats_are_read_in_the_order_of_their_names(tmp_path, vocab):
    samples = bert_samples(np.random.default_rng(0), 30)
    paths = [
        write_plain(tmp_path / "b", samples.take(slice(10, 20))),
        write_hdf5(tmp_path / "a", samples.take(slice(0, 10))),
        write_tfrecord(tmp_path / "c", []),
        write_hdf5(tmp_path / "d", samples.take(slice(20, 30))),
    ]
    os.remove(paths[2])
    result = run([tmp_path / "*"], vocab, tmp_path / "out")
    assert_equal(written(tmp_path / "out"), samples)
    assert result.formats == ("nvidia", "tfrecord")


def test_a_folder_that_datasets_wrote_is_read_as_its_state_says(tmp_path, vocab):
    samples, folder = bert_samples(np.random.default_rng(0), 20), tmp_path / "saved"
    folder.mkdir()
    write_arrow(folder / "data-00000-of-00002.arrow", samples.take(slice(0, 9)))
    write_arrow(folder / "data-00001-of-00002.arrow", samples.take(slice(9, 20)))
    write_arrow(folder / "cache-0123.arrow", samples)
    (folder / "state.json").write_text(
        '{"_data_files": [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]}'
    )
    result = run([folder], vocab, tmp_path / "out")
    assert result.mask_tokens == max(1, samples.mlm_counts.max())
    assert written(tmp_path / "out").input_ids.tolist() == samples.input_ids.tolist()
    os.remove(str(folder / "state.json"))
    assert run([folder], vocab, tmp_path / "all").samples == 40


def test_room_may_grow_and_may_shrink_to_what_the_samples_need(tmp_path, vocab):
    samples = bert_samples(np.random.default_rng(0), 20)
    path = write_hdf5(tmp_path / "a.hdf5", samples)
    run([path], vocab, tmp_path / "large", sequence_length=32, mask_tokens=9)
    large = written(tmp_path / "large")
    assert large.input_ids.shape == (20, 32) and large.mlm_labels.shape == (20, 9)
    assert not large.input_ids[:, 16:].any() and large.input_ids[:, :16].tolist() == samples.input_ids.tolist()
    longest = int(samples.lengths.max())
    with pytest.raises(
        InputError,
        match=rf"a.hdf5: sample \d+: lengths holds {longest}, expected at most --sequence-length {longest - 1}",
    ):
        run([path], vocab, tmp_path / "small", sequence_length=longest - 1)
    with pytest.raises(InputError, match="a.hdf5: sample .*mlm_counts holds 4, expected at most --mask-tokens 3"):
        run([path], vocab, tmp_path / "small", mask_tokens=3)
    with pytest.raises(InputError, match="has 4 masked tokens, --mask-tokens is 3"):
        run([write_parquet(tmp_path / "a.parquet", samples)], vocab, tmp_path / "small", mask_tokens=3)
    assert not (tmp_path / "small").exists()


def test_nvidias_files_are_read_directly_block_by_block(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 600)
    path = str(tmp_path / "a.hdf5")
    write_nvidia(path, [samples.take(slice(0, 500)), samples.take(slice(500, 600))])
    info = open_nvidia(path, len(WORDS))
    assert (info.num_samples, info.sequence_length, info.mask_tokens, info.vocab_size) == (600, 16, 4, len(WORDS))
    assert (info.vocab_sha256, info.offsets, info.file_size) == ("", (), os.path.getsize(path))
    assert_equal(read_nvidia(path, 250, 530, len(WORDS)), samples.take(slice(250, 530)))
    assert is_nvidia(path) and not is_nvidia(__file__) and not is_nvidia(str(tmp_path))


def test_masked_positions_in_any_order_are_put_in_ascending_order(tmp_path):
    samples = bert_samples(np.random.default_rng(1), 50)
    path = write_hdf5(tmp_path / "a.hdf5", samples)
    with h5py.File(path, "a") as file:
        for name in ("masked_lm_positions", "masked_lm_ids"):
            file[name][:] = file[name][:][:, ::-1]
    assert_equal(read_nvidia(path, 0, 50, len(WORDS)), samples)


def test_checksums_are_those_of_the_standard():
    checksum = import_checksum()
    # RFC 3720, B.4: CRC-32C of 32 zeros and of 32 ones; and the plain sum's rotation as TFRecord has it.
    for data, crc in (
        (b"\0" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
    ):
        assert checksum(data) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def change(index, value, name="input_ids"):
    """Sets a feature of sample 3."""

    def apply(arrays):
        if index is None:
            arrays[name][3] = value
        else:
            arrays[name][3][index] = value

    return apply


@pytest.mark.parametrize(
    "damage, message",
    [
        (change(2, 100), "sample 3: input_ids holds 100, expected 0 to 99"),
        (change(2, -1), "sample 3: input_ids holds -1"),
        (change(0, 7), r"sample 3 begins with id 7, expected 2, \[CLS\]"),
        (change(0, 0, "input_mask"), "sample 3: input_mask holds 0, expected ones for"),
        (change(1, 2, "input_mask"), "sample 3: input_mask holds 2"),
        (change(0, 1, "segment_ids"), "sample 3: segment_ids holds 0, expected zeros for the first segment"),
        (change(0, 2, "segment_ids"), "sample 3: segment_ids holds 2"),
        (
            change(slice(0, 2), [5, 5], "masked_lm_positions"),
            "sample 3: masked_lm_positions holds 5, expected each place once",
        ),
        (
            change(0, 16, "masked_lm_positions"),
            "sample 3: masked_lm_positions holds 16, expected a place in the sample",
        ),
        (change(0, 100, "masked_lm_ids"), "sample 3: masked_lm_ids holds 100"),
        (change(None, 2, "next_sentence_labels"), "sample 3: next_sentence_labels holds 2, expected 0 or 1"),
    ],
)
def test_a_sample_that_is_not_as_it_must_be_is_named(tmp_path, vocab, damage, message):
    samples = bert_samples(np.random.default_rng(5), 8)
    samples.mlm_counts[3], samples.mlm_positions[3], samples.mlm_labels[3] = 2, [1, 4, 0, 0], [9, 9, 0, 0]
    samples.lengths[3], samples.first_lengths[3], samples.input_ids[3, 8:] = 8, 5, 0
    arrays = bert_arrays(samples)
    damage(arrays)
    with h5py.File(str(tmp_path / "a.hdf5"), "w") as file:
        for name, values in arrays.items():
            file[name] = np.array(values, np.int32)
    with pytest.raises(InputError, match="a.hdf5: " + message):
        run([tmp_path / "a.hdf5"], vocab, tmp_path / "out")
    assert sorted(os.listdir(str(tmp_path))) == ["a.hdf5"]


def cut(size):
    return lambda path: os.truncate(path, os.path.getsize(path) - size)


def flip(place):
    def apply(path):
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))

    return apply


def compress(path):
    with open(path, "rb") as file:
        content = file.read()
    with gzip.open(path, "wb") as file:
        file.write(content)


def rewrite(path):
    with open(path, "wb") as file:
        file.write(b"The first line of a text.\n" * 20)


def drop(name):
    def apply(path):
        with h5py.File(path, "a") as file:
            del file[name]

    return apply


def retype(path):
    with h5py.File(path, "a") as file:
        del file["input_ids"]
        file["input_ids"] = np.zeros((20, 16), np.float32)


@pytest.mark.parametrize(
    "writer, damage, source, message",
    [
        (write_plain, cut(3), None, "a: record 19 is cut off"),
        (write_plain, flip(100), None, "a: .*record 0 is corrupt"),
        (write_plain, flip(-20 % 4096), "tfrecord", "a: record [0-9]+ is corrupt"),
        (write_plain, compress, "tfrecord", "a: record 0 .*if it is compressed, unpack it first"),
        (write_plain, rewrite, None, "a: is not recognised as NVIDIA's HDF5, TFRecord, parquet or Arrow"),
        (
            write_plain,
            lambda path: write_tfrecord(path, [example({"image": [1]})]),
            None,
            "a: TFRecord of the features .'image'.",
        ),
        (
            write_plain,
            lambda path: write_tfrecord(path, [b"\xff\xff\xff\xff"]),
            "tfrecord",
            "record 0 is not a tf.train.Example",
        ),
        (
            write_plain,
            lambda path: write_tfrecord(path, [example({"input_ids": [1]})]),
            None,
            "record 0 has no feature 'input_mask'",
        ),
        (write_plain, lambda path: write_tfrecord(path, []), "tfrecord", "a: no samples"),
        (write_plain, os.remove, None, "a: no such file"),
        (write_hdf5, drop("segment_ids"), None, "a: the data set 'segment_ids' is missing"),
        (write_hdf5, retype, None, "a: data set 'input_ids' is float32, expected integers"),
        (write_hdf5, cut(100), None, "a: is not recognised as .*truncated"),
        (write_hdf5, lambda path: None, "tfrecord", "a: record 0 "),
        (write_plain, lambda path: None, "nvidia", "a: cannot be read as HDF5"),
        (write_parquet, cut(100), None, "a: cannot be read as parquet or Arrow"),
        (write_arrow, cut(8), None, "a: is cut off: an Arrow stream's end mark is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_written(tmp_path, vocab, writer, damage, source, message):
    path = writer(tmp_path / "a", bert_samples(np.random.default_rng(0), 20))
    damage(path)
    before = sorted(os.listdir(str(tmp_path)))
    with pytest.raises(InputError, match=message):
        run([path], vocab, tmp_path / "out", source=source)
    assert sorted(os.listdir(str(tmp_path))) == before


def set_feature(name, index, value):
    def apply(records):
        records[1]["packed_" + name][index] = value

    return apply


@pytest.mark.parametrize(
    "damage, message",
    [
        (set_feature("input_mask", 0, 4), "record 1: packed_input_mask must be 0 for padding and 1 to 3"),
        (set_feature("input_mask", 0, -1), "record 1: packed_input_mask"),
        (set_feature("position_ids", 0, 48), "record 1: packed_position_ids must be places in a row"),
        (set_feature("position_ids", 0, 0), "record 1: packed_position_ids must count each sample's tokens from 0"),
        (set_feature("masked_lm_positions", 0, 48), "record 1: packed_masked_lm_positions must be places in the row"),
        (
            set_feature("next_sentence_mask", 2, 0.0),
            r"record 1: packed_next_sentence_mask must mark the \[CLS\] of each sample",
        ),
        (
            lambda records: records[1]["packed_segment_ids"].pop(),
            "record 1: the feature 'packed_segment_ids' has 47 values",
        ),
        (
            lambda records: records[1].update(packed_input_ids=[1.0] * 48),
            "record 1: the feature 'packed_input_ids' is not a list",
        ),
    ],
)
def test_a_packed_record_that_makes_no_sample_is_named(tmp_path, vocab, damage, message):
    samples = bert_samples(np.random.default_rng(0), 6)
    samples.mlm_counts[2], samples.mlm_positions[2], samples.mlm_labels[2] = 1, [1, 0, 0, 0], [9, 0, 0, 0]
    records = packed_features(samples, [[0, 1], [2, 3], [4, 5]], 48, 12, 3)
    damage(records)
    path = write_tfrecord(tmp_path / "a", [example(record) for record in records])
    with pytest.raises(InputError, match=message):
        run([path], vocab, tmp_path / "out")


def test_a_list_column_that_is_missing_or_ragged_is_named(tmp_path, vocab):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = hub_columns(bert_samples(np.random.default_rng(0), 5))
    for name, value, message in [
        ("labels", None, "the column 'labels' is missing"),
        ("input_ids", [[1]] * 4 + [[1, 2]], "sample 4: input_ids has 2 values, sample 0 has 1"),
        ("input_ids", [[1.0]] * 5, "the column 'input_ids' holds double"),
        ("labels", [1] * 5, "the column 'labels' is int64 with 0 nulls, expected lists"),
        ("token_type_ids", [[0, 0]] * 5, "segment_ids has the shape"),
        ("next_sentence_label", [0, 1, None, 0, 0], "'next_sentence_label' holds int64 with 1 nulls"),
    ]:
        changed = {key: value if key == name else values for key, values in columns.items() if key != name or value}
        parquet.write_table(arrow.table(changed), str(tmp_path / "a.parquet"))
        with pytest.raises(InputError, match="a.parquet: .*" + message):
            run([tmp_path / "a.parquet"], vocab, tmp_path / "out")


def test_without_a_library_the_way_to_get_it_is_told(tmp_path, vocab, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", bert_samples(np.random.default_rng(0), 5))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install 'pyarrow>=17'"):
        run([path], vocab, tmp_path / "out")
    path = write_plain(tmp_path / "a.tfrecord", bert_samples(np.random.default_rng(0), 5))
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(InputError, match="pip install google-crc32c"):
        run([path], vocab, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vocab=None), "--vocab is missing"),
        (dict(source="csv"), "--from is csv, expected nvidia or tfrecord or packed-tfrecord or hub"),
        (dict(target="csv"), "--to is csv, expected native or nvidia"),
        (dict(sequence_length=4), "--sequence-length is 4"),
        (dict(mask_tokens=0), "--mask-tokens is 0"),
        (dict(samples_per_shard=0), "--samples-per-shard is 0"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(tmp_path, vocab, options, message):
    path = write_hdf5(tmp_path / "a", bert_samples(np.random.default_rng(0), 5))
    with pytest.raises(InputError, match=message):
        run([path], output=tmp_path / "out", **{"vocab": vocab, **options})


def test_shards_go_to_nvidia_only_with_their_own_vocabulary_and_labels_that_are_words(tmp_path, vocab):
    samples = bert_samples(np.random.default_rng(0), 5)
    write_shard(str(tmp_path / "own.h5"), samples, len(WORDS), vocab_sha256(WORDS), {})
    with pytest.raises(InputError, match="holds shards of this project. Convert them alone, with --to nvidia"):
        run([tmp_path / "own.h5"], vocab, tmp_path / "out")
    write_shard(str(tmp_path / "other.h5"), samples, len(WORDS), "0" * 64, {})
    with pytest.raises(InputError, match="words.txt: is not the vocabulary that .*other.h5 was made with.* --vocab"):
        run([tmp_path / "other.h5"], vocab, tmp_path / "out", target="nvidia")
    dynamic = {"masking": "dynamic", "mask_share": 0.15, "special_ids": [0, 1, 2, 3, 4], "continuations": ""}
    write_shard(str(tmp_path / "dynamic.h5"), samples, len(WORDS), vocab_sha256(WORDS), {}, dynamic)
    with pytest.raises(InputError, match="dynamic.h5: its masking is dynamic: nothing is masked yet"):
        run([tmp_path / "dynamic.h5"], vocab, tmp_path / "out", target="nvidia")
    samples.mlm_counts[2], samples.mlm_labels[2] = 1, 0
    write_shard(str(tmp_path / "own.h5"), samples, len(WORDS), vocab_sha256(WORDS), {})
    with pytest.raises(InputError, match="sample 2: mlm_labels holds 0, expected another id"):
        run([tmp_path / "own.h5"], vocab, tmp_path / "out", target="nvidia")


def test_the_command_reports_and_refuses_a_folder_that_holds_a_data_set(tmp_path, vocab, capsys):
    path = write_hdf5(tmp_path / "a", bert_samples(np.random.default_rng(0), 5))
    arguments = ["--input", path, "--vocab", vocab, "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "samples     5 in 1 files, of 16 tokens and 4 masked tokens at most" in capsys.readouterr().out
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and captured.err.count("\n") == 1
        and "nothing is overwritten" in captured.err
    )


def test_after_an_interrupt_the_same_command_makes_the_whole_data_set(tmp_path, vocab, monkeypatch, capsys):
    samples = bert_samples(np.random.default_rng(0), 20)
    path, real = write_hdf5(tmp_path / "a", samples), module.write_shard

    def interrupted(name, *arguments, **options):
        real(name, *arguments, **options)
        if name.endswith("00001.h5"):
            raise KeyboardInterrupt

    arguments = ["--input", path, "--vocab", vocab, "--output", str(tmp_path / "out"), "--samples-per-shard"]
    monkeypatch.setattr(module, "write_shard", interrupted)
    assert main(arguments + ["8"]) == 130 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.split("\n")[-2:] == [
        f"interrupted: {tmp_path}/out was not made; the same command begins anew",
        "",
    ]
    monkeypatch.setattr(module, "write_shard", real)
    assert main(arguments + ["20"]) == 0
    assert_equal(written(tmp_path / "out"), samples)
    assert sorted(os.listdir(str(tmp_path))) == ["a", "out"]


LIMITED = """
import resource, sys
from data.convert import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("target", ["native", "nvidia"])
def test_a_file_that_cannot_grow_stops_the_command_and_leaves_nothing(tmp_path, vocab, target):
    path = write_hdf5(tmp_path / "a", bert_samples(np.random.default_rng(0), 2000))
    command = ["--input", path, "--vocab", vocab, "--output", str(tmp_path / "out"), "--to", target]
    stopped = subprocess.run(
        [sys.executable, "-c", LIMITED, *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    error = stopped.stderr.decode()
    assert stopped.returncode == 1 and "Traceback" not in error and "File too large" in error
    assert (
        "stopped: " in error
        and "train-00000.h5" in error
        and "cannot be written (File" in error
        and "the same command begins anew" in error
    )
    assert os.listdir(str(tmp_path)) == ["a"]


def test_a_run_killed_after_its_files_moved_is_reported_as_done_but_not_for_other_arguments(
    tmp_path, vocab, monkeypatch, capsys
):
    path = write_hdf5(tmp_path / "a", bert_samples(np.random.default_rng(0), 20))
    arguments = ["--input", path, "--vocab", vocab, "--output", str(tmp_path / "out")]
    for more, status in (([], 0), (["--samples-per-shard", "3"], 2)):
        with monkeypatch.context() as patch:
            patch.setattr(Staging, "remove", lambda staging: None)
            assert main(["--input", path, "--vocab", vocab, "--output", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().out
        assert main(arguments + more) == status
        assert capsys.readouterr().out == (said if status == 0 else "")
        assert sorted(os.listdir(str(tmp_path))) == ["a", "out"]
        for name in os.listdir(str(tmp_path / "out")):
            os.remove(str(tmp_path / "out" / name))
        os.rmdir(str(tmp_path / "out"))


def test_help_teaches_with_examples_and_needs_no_pyarrow():
    code = "import sys, data.convert; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert_help_teaches("data.convert", "python -m data.convert --to nvidia --input", code)


def text_and_labels(samples):
    """Each sample's words before masking, its segment lengths, masked places and NSP label, made sample by sample."""
    texts = []
    for i in range(len(samples)):
        length, count = int(samples.lengths[i]), int(samples.mlm_counts[i])
        texts.append(
            (
                tuple(samples.input_ids[i, :length].tolist()),
                int(samples.first_lengths[i]),
                tuple(zip(samples.mlm_positions[i, :count].tolist(), samples.mlm_labels[i, :count].tolist())),
                int(samples.nsp_labels[i]),
            )
        )
    return texts


@needs_shared
def test_nvidias_own_file_becomes_shards_and_nvidias_file_again(tmp_path):
    path, vocab = os.path.join(SHARED, "nvidia-schema-128.h5"), os.path.join(SHARED, "bert-base-uncased-vocab.txt")
    run([path], vocab, tmp_path / "out")
    samples = written(tmp_path / "out")
    assert recognise(path) == "nvidia"
    run([tmp_path / "out" / "*.h5"], None, tmp_path / "back", target="nvidia")
    with h5py.File(path, "r") as file, h5py.File(str(tmp_path / "back" / "train-00000.h5"), "r") as back:
        plain = bert_arrays(samples)
        for name in plain:
            np.testing.assert_array_equal(plain[name], file[name][:], err_msg=name)
            np.testing.assert_array_equal(back[name][:], file[name][:], err_msg=name)
            assert back[name].dtype == file[name].dtype


@needs_shared
def test_graphcores_plain_file_becomes_shards_token_for_token(tmp_path):
    path = os.path.join(SHARED, "graphcore-sample.tfrecord")
    run([path], os.path.join(SHARED, "bert-base-uncased-vocab.txt"), tmp_path / "out")
    expected, actual = integers_of_tfrecord(path), bert_arrays(written(tmp_path / "out"))
    expected["next_sentence_labels"] = [label for (label,) in expected["next_sentence_labels"]]
    assert expected == actual


@needs_shared
def test_graphcores_plain_and_packed_files_hold_the_same_45_texts(tmp_path):
    vocab, texts = os.path.join(SHARED, "bert-base-uncased-vocab.txt"), []
    for name in ("graphcore-sample.tfrecord", "graphcore-sample-packed.tfrecord"):
        run([os.path.join(SHARED, name)], vocab, tmp_path / name)
        texts.append(sorted(text_and_labels(written(tmp_path / name))))
    assert len(texts[0]) == 45 and texts[0] == texts[1]


def test_hub_and_hdf5_are_told_apart_by_their_content(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 3)
    assert (
        recognise(write_parquet(tmp_path / "a.h5", samples)) == recognise(write_arrow(tmp_path / "b", samples)) == "hub"
    )
    assert hub.table_files(str(tmp_path / "b")) == [str(tmp_path / "b")]
    with pytest.raises(InputError, match="holds no .parquet or .arrow files"):
        hub.table_files(str(tmp_path))
    assert recognise(write_plain(tmp_path / "c", samples)) == "tfrecord"


def test_samples_from_elsewhere_are_of_text_as_the_vocabulary_or_the_options_say(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 20, LENGTH, SLOTS)
    path = write_hdf5(tmp_path / "a", samples)
    words = [*WORDS[:5], *(f"Word{number}" for number in range(len(WORDS) - 5))]
    vocab = str(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    with pytest.raises(InputError, match="Add --cased, which suits them, or --lowercase"):
        run([path], vocab, tmp_path / "out")
    result = run([path], vocab, tmp_path / "out", lowercase=False)
    (shard,) = open_shards([str(tmp_path / "out" / "*.h5")])
    assert "text        taken to be cased, accents kept" in str(result) and '"lowercase": false' in shard.tokenizer
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(InputError, match="--cased says cased, .*tokenizer_config.json .do_lower_case. says lower-case"):
        run([path], vocab, tmp_path / "two", lowercase=False)
    with pytest.raises(InputError, match="train-00000.h5 says cased, .*tokenizer_config.json .do_lower_case. says"):
        run([shard.path], vocab, tmp_path / "two", target="nvidia")
