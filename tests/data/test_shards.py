import os

import h5py
import numpy as np
import pytest

from data.errors import InputError
from data.loading.shard_files import open_shards
from data.samples import FIELDS, Samples, check_samples, find_bad_sample, token_dtype
from data.shards import read_samples, write_shard
from data.tokenizer import vocab_sha256
from tests.make_samples import random_samples, write_random_shards


def rewrite(path, change):
    with h5py.File(path, "a") as file:
        change(file)


@pytest.mark.parametrize("vocab_size, dtype", [(100, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_samples_survive_the_way_through_a_shard(tmp_path, vocab_size, dtype):
    samples = random_samples(np.random.default_rng(0), 50, 16, 4, vocab_size)
    path = str(tmp_path / "a.hdf5")
    write_shard(path, samples, vocab_size, "f" * 64, {"who": "test"})
    (shard,) = open_shards([path], 16, 4, vocab_size)
    assert (shard.num_samples, shard.sequence_length, shard.mask_tokens, shard.vocab_size) == (50, 16, 4, vocab_size)
    assert shard.file_size == os.path.getsize(path) and token_dtype(vocab_size) == dtype
    found = read_samples(path, 7, 31)
    for index, name in enumerate(FIELDS):
        expected = getattr(samples, name)
        np.testing.assert_array_equal(getattr(found, name), expected[7:31])
        stored = np.fromfile(path, expected.dtype, expected.size, offset=shard.offsets[index])
        np.testing.assert_array_equal(stored, expected.ravel())


def test_a_write_that_fails_leaves_nothing(tmp_path):
    samples = random_samples(np.random.default_rng(0), 5)
    with pytest.raises(TypeError):
        write_shard(str(tmp_path / "a.hdf5"), samples, 100, "f" * 64, {"not json": object()})
    assert os.listdir(tmp_path) == []


def test_globs_and_paths_give_each_file_once_in_sorted_order(tmp_path):
    paths = write_random_shards(tmp_path, [3, 4, 5])
    shards = open_shards([paths[2], str(tmp_path / "*.hdf5"), paths[0]])
    assert [shard.path for shard in shards] == paths and [shard.num_samples for shard in shards] == [3, 4, 5]


def test_a_shard_without_samples_is_fine_beside_others(tmp_path):
    assert [shard.num_samples for shard in open_shards(write_random_shards(tmp_path, [0, 4]))] == [0, 4]


def test_no_samples_at_all_is_an_error(tmp_path):
    with pytest.raises(InputError, match="shard-0000.hdf5.*holds no samples"):
        open_shards(write_random_shards(tmp_path, [0]))
    with pytest.raises(InputError, match="data.files is empty"):
        open_shards([])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing-.*: no such file"):
        open_shards([str(tmp_path / "nothing-*.hdf5")])


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path, keep):
    (path,) = write_random_shards(tmp_path, [500])
    size = os.path.getsize(path)
    os.truncate(path, size - 1 if keep == -1 else int(size * keep) if keep < 1 else keep)
    with pytest.raises(InputError, match="shard-0000.hdf5: cannot be read as HDF5.*make it again"):
        open_shards([path])


def compress(file):
    data = file["lengths"][()]
    del file["lengths"]
    file.create_dataset("lengths", data=data, compression="gzip")


def narrow(file):
    data = file["mlm_labels"][()]
    del file["mlm_labels"]
    file["mlm_labels"] = data[:, :2]


def widen(file):
    data = file["lengths"][()]
    del file["lengths"]
    file["lengths"] = data.astype(np.int64)


def flatten(file):
    del file["input_ids"]
    file["input_ids"] = np.zeros(20, np.uint16)


def remove(file):
    del file["mlm_counts"]


def make_group(file):
    del file["mlm_counts"]
    file.create_group("mlm_counts")


@pytest.mark.parametrize(
    "change, message",
    [
        (remove, "the data set 'mlm_counts' is missing"),
        (make_group, "the data set 'mlm_counts' is missing"),
        (narrow, r"data set 'mlm_labels' is uint16 \(20, 2\), expected uint16 \(20, 4\)"),
        (widen, r"data set 'lengths' is int64 \(20,\), expected uint16 \(20,\)"),
        (flatten, "must have 2 dimensions, found 1 and 2"),
        (compress, "'lengths' is chunked or compressed, expected contiguous"),
        (
            lambda file: file.attrs.update(format="other"),
            "format 'other' version 1, expected 'bert-pretraining-samples' version 1",
        ),
        (lambda file: file.attrs.update(schema_version=2), "version 2, expected"),
        (lambda file: file.attrs.pop("format"), "format None"),
        (lambda file: file.attrs.pop("vocab_sha256"), "the attribute 'vocab_sha256' is missing"),
    ],
)
def test_a_shard_that_is_not_as_it_must_be_is_named(tmp_path, change, message):
    (path,) = write_random_shards(tmp_path, [20])
    rewrite(path, change)
    with pytest.raises(InputError, match="shard-0000.hdf5: .*" + message):
        open_shards([path])


@pytest.mark.parametrize(
    "run, message",
    [
        (dict(sequence_length=32), "sequence length 16, data.sequence_length is 32"),
        (dict(mask_tokens=5), "room for 4 masked tokens, data.mask_tokens is 5"),
        (dict(vocab_size=99), "vocabulary of 100 tokens, model.vocab_size is 99. Set model.vocab_size to 100"),
    ],
)
def test_a_shard_that_does_not_fit_the_run_is_named(tmp_path, run, message):
    paths = write_random_shards(tmp_path, [20])
    with pytest.raises(InputError, match="shard-0000.hdf5: .*" + message):
        open_shards(paths, **run)


@pytest.mark.parametrize("other", [dict(sequence_length=8), dict(mask_tokens=3), dict(vocab_size=101)])
def test_shards_of_different_data_sets_are_refused(tmp_path, other):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = write_random_shards(tmp_path / "a", [5]) + write_random_shards(tmp_path / "b", [5], **other)
    with pytest.raises(InputError, match="b/shard-0000.hdf5: .*shards of one data set"):
        open_shards(paths)


def test_shards_of_different_vocabularies_are_refused(tmp_path):
    paths = write_random_shards(tmp_path, [5, 5])
    rewrite(paths[1], lambda file: file.attrs.update(vocab_sha256=vocab_sha256(["other"])))
    with pytest.raises(InputError, match="shard-0001.hdf5: .*shards of one data set"):
        open_shards(paths)


@pytest.mark.parametrize(
    "name, place, value, message",
    [
        ("input_ids", (3, 1), 100, r"input_ids\[1\] is 100, expected below the vocabulary's 100"),
        ("mlm_labels", (3, 0), 60000, r"mlm_labels\[0\] is 60000, expected below the vocabulary's 100"),
        ("lengths", 3, 0, "lengths is 0, expected 1 to 16 tokens"),
        ("lengths", 3, 17, "lengths is 17, expected 1 to 16 tokens"),
        ("first_lengths", 3, 40, "first_lengths is 40, expected at most the sample's length"),
        ("mlm_counts", 3, 5, "mlm_counts is 5, expected at most 4"),
        ("mlm_positions", (3, 3), 500, r"mlm_positions\[3\] is 500, expected below the sample's length"),
        ("nsp_labels", 3, 2, "nsp_labels is 2, expected 0 or 1"),
    ],
)
def test_a_bad_sample_is_named(name, place, value, message):
    samples = random_samples(np.random.default_rng(0), 10)
    check_samples(samples, 100, "file")
    getattr(samples, name)[place] = value
    with pytest.raises(InputError, match="file: sample 203: " + message):
        check_samples(samples, 100, "file", 200)


def test_of_bad_samples_the_first_is_named():
    samples = random_samples(np.random.default_rng(0), 10)
    samples.input_ids[7, 0] = samples.mlm_labels[6, 1] = samples.input_ids[4, 2] = 100
    samples.nsp_labels[3] = samples.lengths[3] = 60
    assert find_bad_sample(samples, 100) == (3, "lengths is 60, expected 1 to 16 tokens")
    assert find_bad_sample(samples.take(slice(4, 10)), 100)[0] == 0
    assert find_bad_sample(samples.take(slice(5, 10)), 100)[0] == 1
    assert find_bad_sample(samples.take(slice(0, 3)), 100) is None


def test_reading_what_is_not_there_names_the_file(tmp_path):
    with pytest.raises(InputError, match="gone.hdf5: cannot read samples 0 to 5"):
        read_samples(str(tmp_path / "gone.hdf5"), 0, 5)


def test_taking_and_concatenating_are_inverse():
    samples = random_samples(np.random.default_rng(0), 10)
    index = np.array([3, 0, 9])
    whole = Samples.concatenate([samples.take(slice(0, 4)), samples.take(slice(4, 10))])
    for together in (whole.take(index), samples.take(index)):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(together, name), getattr(samples, name)[[3, 0, 9]])


def test_a_shard_says_how_many_segments_its_samples_have_and_others_are_not_of_its_data_set(tmp_path):
    paths = [str(tmp_path / f"{segments}.h5") for segments in (1, 2)]
    for path, segments in zip(paths, (1, 2)):
        samples = random_samples(np.random.default_rng(0), 5)
        write_shard(path, samples, 100, "f" * 64, {}, segments=segments)
        assert open_shards([path])[0].segments == segments
    with pytest.raises(InputError, match="its segments is 2 and that of .*1.h5 is 1. Train on shards of one data set"):
        open_shards(paths)


def test_a_folder_in_place_of_a_shard_is_an_error_that_says_how_to_name_them(tmp_path):
    with pytest.raises(InputError, match=r"is a folder; name the shards in it, such as '.*train-\*.h5'"):
        open_shards([str(tmp_path)])
