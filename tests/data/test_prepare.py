import glob
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import h5py
import numpy as np
import pytest

from data import prepare as module
from data.errors import InputError, PrepareStopped
from data.inspect import InspectOptions, inspect
from data.loading.shard_files import open_shards
from data.masking import CHOICES, choose_words, mask_dynamic, masking_of
from data.prepare import PrepareOptions, main, prepare
from data.preparing import chunks as chunks_module
from data.preparing import splits, staging, workers
from data.preparing.chunks import ChunkMaker
from data.preparing.corpus import Document
from data.rows import unpacked_batch
from data.samples import FIELDS, check_samples
from data.shards import read_samples
from data.tokenizer import SPECIAL_TOKENS, Vocabulary, find_vocab, read_vocab, vocab_sha256, write_tokenizer_files
from tests import ROOT, assert_help_teaches
from tests.data.test_tokenizer import foreign_tokenizer

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")
SIZES = dict(sequence_length=32, mask_tokens=5)


def document_words(number):
    """Words that no other document has, so that a token tells its document."""
    return [f"d{number}w{word}" for word in range(20)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 documents in two files, and a vocabulary with every word."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for file in range(2):
        texts = []
        for number in range(20 * file, 20 * file + 20):
            lines = [
                " ".join(draw.choice(document_words(number)) for _ in range(draw.randint(1, 15))) for _ in range(12)
            ]
            texts.append("\n".join(lines))
        (folder / (f"{file}.txt")).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    tokens = list(SPECIAL_TOKENS) + [word for number in range(40) for word in document_words(number)]
    (folder / "vocab").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return folder


def make(corpus, output, **options):
    options = {**SIZES, **options}
    if "input" not in options:
        options["input"] = [str(corpus / "*.txt")]
    if "vocab" not in options:
        options["vocab"] = str(corpus / "vocab")
    return prepare(PrepareOptions(output=str(output), **options), progress=False)


def arguments(corpus, output, *more):
    """The command line of `make`."""
    named = ["--input", str(corpus / "*.txt"), "--vocab", str(corpus / "vocab"), "--output", str(output)]
    return [*named, "--sequence-length", "32", "--mask-tokens", "5", *more]


def all_samples(folder, name="train"):
    return [
        read_samples(shard.path, 0, shard.num_samples)
        for shard in open_shards([os.path.join(str(folder), name + "-*.h5")])
    ]


def file_hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def restored(samples):
    ids = samples.input_ids.copy()
    for row, count in enumerate(samples.mlm_counts):
        ids[row, samples.mlm_positions[row, :count]] = samples.mlm_labels[row, :count]
    return ids


def document_of(tokens, token):
    return int(tokens[token][1:].split("w")[0])


def test_the_folder_holds_shards_that_open_and_the_vocabulary_they_were_made_with(corpus, tmp_path):
    summary = make(corpus, tmp_path / "out", samples_per_shard=50)
    assert {name for name in os.listdir(str(tmp_path / "out")) if not name.endswith(".h5")} == {
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shards = open_shards([str(tmp_path / "out" / "train-*.h5")], vocab_size=805, **SIZES)
    tokens = read_vocab(str(tmp_path / "out" / "vocab.txt")).tokens
    assert shards[0].vocab_sha256 == vocab_sha256(tokens)
    assert max(shard.num_samples for shard in shards) <= 50
    assert max(shard.num_samples for shard in shards) - min(shard.num_samples for shard in shards) <= 1
    assert (
        sum(shard.num_samples for shard in shards) == summary.train_samples and len(shards) == summary.train_shards > 2
    )
    for shard, samples in zip(shards, all_samples(tmp_path / "out")):
        check_samples(samples, len(tokens), shard.path)
        assert unpacked_batch(samples)["sample_ids"].sum() == samples.lengths.sum()
    with h5py.File(shards[0].path, "r") as file:
        assert json.loads(file.attrs["made_by"])["seed"] == 42


def test_every_token_of_the_text_is_in_the_samples_once_per_duplicate(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(module, "GROUP_CHUNKS", 3)
    monkeypatch.setattr("data.preparing.chunks.BATCH_CHARACTERS", 700)
    summary = make(corpus, tmp_path / "out", duplicates=3, workers=1)
    tokens = read_vocab(str(tmp_path / "out" / "vocab.txt")).tokens
    seen = np.zeros(len(tokens), np.int64)
    for samples in all_samples(tmp_path / "out"):
        for row, first, length, label in zip(
            restored(samples), samples.first_lengths, samples.lengths, samples.nsp_labels
        ):
            np.add.at(seen, row[1 : first - 1], 1)
            if label == 0:
                np.add.at(seen, row[first : length - 1], 1)
    text = " ".join((corpus / name).read_text() for name in ("0.txt", "1.txt")).split()
    expected = np.bincount([tokens.index(word) for word in text], minlength=len(tokens))
    assert (seen == 3 * expected).all()
    assert (summary.tokens, summary.dropped_tokens, summary.unknown_tokens) == (len(text), 0, 0)
    assert (summary.documents, summary.lines) == (40, 480)


def test_without_nsp_samples_are_one_segment_and_hold_every_token_once_per_duplicate(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "CHUNK_CHARACTERS", 3000)
    summary = make(corpus, tmp_path / "out", duplicates=3, nsp=False)
    tokens = read_vocab(str(tmp_path / "out" / "vocab.txt")).tokens
    seen = np.zeros(len(tokens), np.int64)
    for samples in all_samples(tmp_path / "out"):
        assert (samples.first_lengths == samples.lengths).all() and not samples.nsp_labels.any()
        for row, length in zip(restored(samples), samples.lengths):
            assert row[0] == 2 and row[length - 1] == 3 and not row[length:].any()
            assert len({document_of(tokens, token) for token in row[1 : length - 1]}) == 1
            np.add.at(seen, row[1 : length - 1], 1)
    text = " ".join((corpus / name).read_text() for name in ("0.txt", "1.txt")).split()
    assert (seen == 3 * np.bincount([tokens.index(word) for word in text], minlength=len(tokens))).all()
    assert summary.dropped_tokens == 0 and "NSP         none: samples are of one segment" in str(summary)
    (shard,) = open_shards([str(tmp_path / "out" / "*.h5")])
    assert shard.segments == 1
    with h5py.File(shard.path, "r") as file:
        assert json.loads(file.attrs["made_by"])["nsp"] is False


def test_second_segments_come_from_the_document_that_the_label_says(corpus, tmp_path):
    summary = make(corpus, tmp_path / "out", duplicates=3)
    tokens = read_vocab(str(tmp_path / "out" / "vocab.txt")).tokens
    for samples in all_samples(tmp_path / "out"):
        for row, first, length, label in zip(
            restored(samples), samples.first_lengths, samples.lengths, samples.nsp_labels
        ):
            own = {document_of(tokens, token) for token in row[1 : first - 1]}
            second = {document_of(tokens, token) for token in row[first : length - 1]}
            assert len(own) == len(second) == 1 and (own != second) == label
    assert 0.42 < summary.not_next_samples / summary.train_samples < 0.58


def test_held_out_documents_are_a_share_and_none_is_trained_on(corpus, tmp_path):
    def documents_in(folder, name):
        tokens = read_vocab(str(folder / "vocab.txt")).tokens
        return {
            document_of(tokens, token)
            for samples in all_samples(folder, name)
            for token in restored(samples).ravel()
            if token > 4
        }

    held_out = []
    for seed in (1, 2):
        out = tmp_path / str(seed)
        summary = make(corpus, out, held_out=0.1, seed=seed, duplicates=2)
        assert documents_in(out, "train") | documents_in(out, "held_out") == set(range(40))
        assert not documents_in(out, "train") & documents_in(out, "held_out")
        assert len(documents_in(out, "held_out")) == summary.held_out_documents == 4
        held_out.append(documents_in(out, "held_out"))
    assert held_out[0] != held_out[1]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_the_held_out_share_is_kept_for_many_documents(share):
    drawn = [splits.split_of(number, share, 42) for number in range(1000)]
    assert abs(sum(drawn) - 1000 * share) <= 1
    assert [splits.split_of(number, share, 42) for number in range(1000)] == drawn


def test_parts_of_one_long_document_stay_in_one_split(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("data.preparing.corpus.DOCUMENT_CHARACTERS", 100)
    summary = make(corpus, tmp_path / "out", held_out=0.1)
    assert (summary.documents, summary.held_out_documents) == (40, 4)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(corpus, tmp_path / name, seed=seed, held_out=0.1, samples_per_shard=100)
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert file_hashes(tmp_path / "a")["train-00000.h5"] != file_hashes(tmp_path / "c")["train-00000.h5"]


def test_duplicates_are_cut_and_masked_anew(corpus, tmp_path):
    one, two = make(corpus, tmp_path / "1"), make(corpus, tmp_path / "2", duplicates=2)
    assert 1.8 < two.train_samples / one.train_samples < 2.2
    rows = [row.tobytes() for samples in all_samples(tmp_path / "2") for row in samples.input_ids]
    assert len(set(rows)) > 0.99 * len(rows)


def test_samples_are_shuffled_within_a_shard(corpus, tmp_path):
    make(corpus, tmp_path / "out")
    tokens = read_vocab(str(tmp_path / "out" / "vocab.txt")).tokens
    order = [document_of(tokens, row[1]) for row in restored(all_samples(tmp_path / "out")[0])]
    assert order != sorted(order) and len(set(order[:40])) > 15


def test_without_a_vocabulary_one_is_trained_and_two_runs_agree(corpus, tmp_path):
    for name in "ab":
        summary = make(corpus, tmp_path / name, vocab=None, vocab_size=150)
    assert len(read_vocab(str(tmp_path / "a" / "vocab.txt"))) == summary.vocab_size <= 150
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_wikitext_documents_are_told_apart_by_titles(corpus, tmp_path):
    (tmp_path / "wiki.txt").write_text("".join(f" \n = d{n}w0 = \n \n d{n}w1 d{n}w2 d{n}w3 \n" for n in range(5)))
    summary = make(corpus, tmp_path / "out", input=[str(tmp_path / "wiki.txt")], format="wikitext")
    assert (summary.documents, summary.lines, summary.tokens) == (5, 10, 20)


def test_lines_without_a_token_and_unknown_words_are_counted(corpus, tmp_path):
    (tmp_path / "odd.txt").write_text("d1w1 zzz d1w2 d1w3\n\x07\nd1w4\n\n\x07\n\nd2w1 d2w2")
    summary = make(corpus, tmp_path / "out", input=[str(tmp_path / "odd.txt")])
    assert (summary.documents, summary.lines, summary.empty_lines) == (2, 5, 2)
    assert (summary.tokens, summary.unknown_tokens) == (7, 1)
    assert "tokens      7 used, 0 dropped" in str(summary)


def test_chunks_hold_no_line_and_no_document_without_a_token():
    texts = [Document(0, ["a a", "\x07", "a"]), Document(1, ["\x07"]), Document(2, ["\x07", "a"])]
    vocabulary = {"tokens": list(SPECIAL_TOKENS) + ["a"]}
    maker = ChunkMaker(vocabulary, asdict(PrepareOptions([], "", **SIZES)), "data.masking:choose_tokens", {})
    chunk, counts = maker.encode(texts)
    assert chunk.unit_starts.tolist() == [0, 2, 3] and chunk.document_starts.tolist() == [0, 3, 4]
    assert chunk.tokens.tolist() == [5] * 4
    assert (counts["documents"], counts["first"], counts["last"], counts["empty_lines"]) == (2, 0, 2, 3)


def test_texts_are_handed_on_in_chunks_of_one_split(monkeypatch):
    monkeypatch.setattr(splits, "CHUNK_CHARACTERS", 10)
    texts = [Document(number, ["word", "word"]) for number in range(20)]
    chunks = list(splits.split_into_chunks(texts, 0.2, 42))
    assert sorted(document.number for _, chunk in chunks for document in chunk) == list(range(20))
    assert sum(len(chunk) for split, chunk in chunks if split == splits.HELD_OUT) == 4
    assert all(len(chunk) <= 2 for _, chunk in chunks)


@pytest.fixture
def small_chunks(monkeypatch):
    """Some ten chunks of the corpus, in groups of three: parallel work, many shards, on little text."""
    monkeypatch.setattr(splits, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(module, "GROUP_CHUNKS", 3)


def test_any_number_of_processes_gives_the_same_bytes(corpus, tmp_path, small_chunks):
    options = dict(held_out=0.2, duplicates=2, samples_per_shard=40)
    summaries = [make(corpus, tmp_path / str(workers), workers=workers, **options) for workers in (1, 3)]
    assert file_hashes(tmp_path / "1") == file_hashes(tmp_path / "3")
    assert str(summaries[0]) == str(summaries[1]).replace(str(tmp_path / "3"), str(tmp_path / "1"))
    assert summaries[0].documents == 40 and summaries[0].held_out_documents == 8 and summaries[0].train_shards > 5
    assert os.listdir(str(tmp_path)) == ["1", "3"] or os.listdir(str(tmp_path)) == ["3", "1"]


def test_shards_of_a_group_draw_from_all_of_its_text(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "CHUNK_CHARACTERS", 2000)
    make(corpus, tmp_path / "out", workers=1, samples_per_shard=60)
    tokens = read_vocab(str(tmp_path / "out" / "vocab.txt")).tokens
    for samples in all_samples(tmp_path / "out"):
        assert len({document_of(tokens, row[1]) for row in restored(samples)}) > 25


KILLED = """
import json, os, signal, sys
from data import prepare as module
from data.preparing import splits
splits.CHUNK_CHARACTERS, module.GROUP_CHUNKS = 2000, 3
last, calls = int(sys.argv[2]), []
def killing(real):
    def submit(pool, task):
        calls.append(task)
        if len(calls) > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(pool, task)
    return submit
for kind in (module.InlineWorker, module.Workers):
    kind.submit = killing(kind.submit)
module.prepare(module.PrepareOptions(**json.loads(sys.argv[1])), progress=False)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_any_task_goes_on_and_gives_the_same_bytes(corpus, tmp_path, small_chunks, workers):
    options = dict(held_out=0.2, duplicates=2, samples_per_shard=40, workers=workers)
    whole = make(corpus, tmp_path / "whole", **options)
    given = dict(
        options, input=[str(corpus / "*.txt")], output=str(tmp_path / "out"), vocab=str(corpus / "vocab"), **SIZES
    )
    kills = 0
    for tasks in (2, 4, 6, 5):  # each run gets that much further
        killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(given), str(tasks)], cwd=ROOT)
        kills += killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert kills == 4 and (tmp_path / ".out.unfinished").is_dir()
    assert str(make(corpus, tmp_path / "out", **options)).replace(str(tmp_path / "out"), "X") == str(whole).replace(
        str(tmp_path / "whole"), "X"
    )
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")
    assert sorted(os.listdir(str(tmp_path))) == ["out", "whole"]


def stop_at(monkeypatch, number, exception):
    """Stops the `number`-th file that is written whole, after its writing."""
    real, calls = chunks_module.write_shard, []

    def stopping(*arguments):
        calls.append(real(*arguments))
        if len(calls) == number:
            raise exception

    monkeypatch.setattr(chunks_module, "write_shard", stopping)


def test_a_stopped_run_with_other_options_is_refused_and_its_work_kept(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make(corpus, tmp_path / "out")
    kept = sorted(os.listdir(str(tmp_path / ".out.unfinished")))
    assert "part-00000000.h5" in kept
    with pytest.raises(
        InputError, match="out: a run that was stopped had seed 42, not 7. Give .* or remove .*unfinished"
    ):
        make(corpus, tmp_path / "out", seed=7)
    assert sorted(os.listdir(str(tmp_path / ".out.unfinished"))) == kept
    make(corpus, tmp_path / "out", workers=2)
    assert os.listdir(str(tmp_path)) == ["out"]


LIMITED = """
import resource, sys
from data import prepare as module
from data.preparing import splits
splits.CHUNK_CHARACTERS, module.GROUP_CHUNKS = 2000, 3
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(module.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_grow_stops_the_run_and_keeps_what_is_done(corpus, tmp_path, small_chunks, workers):
    options = arguments(corpus, tmp_path / "out", "--duplicates", "20", "--workers", str(workers))
    # Parts fit, shards of three parts do not.
    stopped = subprocess.run([sys.executable, "-c", LIMITED, "80000"] + options, cwd=ROOT, stderr=subprocess.PIPE)
    error = stopped.stderr.decode()
    assert stopped.returncode == 1 and "Traceback" not in error and error.count("is not whole") == 1
    assert re.search(
        r"stopped: .*train-00000.h5[.]tmp-[0-9]+: cannot be written \(File too large\).* goes on from here", error
    )
    assert os.listdir(str(tmp_path)) == [".out.unfinished"]
    assert "part-00000000.h5" in os.listdir(str(tmp_path / ".out.unfinished")) and not glob.glob(
        str(tmp_path / ".out.unfinished" / "**" / "*.tmp-*"), recursive=True
    )
    make(corpus, tmp_path / "out", duplicates=20)
    make(corpus, tmp_path / "whole", duplicates=20)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


def test_a_process_that_is_killed_stops_the_run_with_its_name(corpus, tmp_path, small_chunks, monkeypatch):
    real = workers.Workers.start

    def started_and_killed(self):
        process = real(self)
        process.kill()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(workers.Workers, "start", started_and_killed)
        with pytest.raises(PrepareStopped, match="was killed by SIGKILL: the machine may have run out of memory"):
            make(corpus, tmp_path / "out", workers=2)
    make(corpus, tmp_path / "out", workers=1)


def test_two_processes_do_not_make_one_data_set(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "LOCK_SECONDS", 0.1)
    refused = pytest.raises(InputError, match="another process is making this data set")
    with staging.open_staging(str(tmp_path / "out"), {}), refused:
        make(corpus, tmp_path / "out")


def test_a_run_stopped_while_it_moves_its_files_into_a_folder_ends_the_move(corpus, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        real, moved = os.replace, []

        def replace(source, target):
            if os.path.dirname(target) == str(tmp_path / "out"):
                moved.append(target)
                if len(moved) == 3:
                    raise KeyboardInterrupt
            real(source, target)

        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, tmp_path / "out", samples_per_shard=50)
    make(corpus, tmp_path / "out", samples_per_shard=50)
    make(corpus, tmp_path / "again", samples_per_shard=50)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "again")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_a_run_killed_after_its_files_moved_is_reported_as_done(corpus, tmp_path, monkeypatch, capsys, there, removed):
    if there:
        (tmp_path / "new" / "out").mkdir(parents=True)
    command = arguments(corpus, tmp_path / "new" / "out")
    real = staging.clear

    def killed(folder, keep):
        if removed and keep == "state.json":
            real(folder, keep)
        if keep == "state.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "clear", killed)
        assert main(command) == 130
    capsys.readouterr()
    before = file_hashes(tmp_path / "new" / "out")
    assert main(command) == 0
    assert "documents   40, of which 0 held out" in capsys.readouterr().out
    assert file_hashes(tmp_path / "new" / "out") == before
    assert os.listdir(str(tmp_path)) == ["new"] and os.listdir(str(tmp_path / "new")) == ["out"]
    assert sorted(os.listdir(str(tmp_path / "new" / "out"))) == sorted(before)
    assert main(command) == 2


def test_a_data_set_that_was_removed_is_made_anew_though_the_killed_run_had_moved_it(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "remove", lambda self: None)
        make(corpus, tmp_path / "out")
    before = file_hashes(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out").rmdir()
    make(corpus, tmp_path / "out")
    assert file_hashes(tmp_path / "out") == before and os.listdir(str(tmp_path)) == ["out"]


@pytest.mark.parametrize("package", ["numpy", "tokenizers"])
def test_a_stopped_run_goes_on_only_with_the_versions_it_began_with(corpus, tmp_path, monkeypatch, package):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make(corpus, tmp_path / "out")
    monkeypatch.setattr(sys.modules[package], "__version__", "0.0.1")
    with pytest.raises(InputError, match=f'had version of {package} ".*", not "0.0.1". .*remove .*unfinished'):
        make(corpus, tmp_path / "out")


def test_shards_of_a_text_in_very_many_files_name_a_few(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(400):
        (tmp_path / "in" / (f"{number:03}" + "x" * 200)).write_text("d1w1 d1w2\nd1w3\n")
    make(corpus, tmp_path / "out", input=[str(tmp_path / "in" / "*")])
    with h5py.File(str(tmp_path / "out" / "train-00000.h5"), "r") as file:
        made_by = json.loads(file.attrs["made_by"])
    assert len(made_by["input"]) == 20 and made_by["input_files"] == 400


def test_dynamic_masking_leaves_the_text_whole_and_tells_the_loader_what_it_needs(corpus, tmp_path):
    make(corpus, tmp_path / "static", mask_share=0.2)
    make(corpus, tmp_path / "dynamic", mask_share=0.2, masking="dynamic", whole_word_masking=True)
    (static,) = open_shards([str(tmp_path / "static" / "*.h5")])
    (shard,) = open_shards([str(tmp_path / "dynamic" / "*.h5")])
    assert (static.masking, static.mask_share, shard.masking, shard.mask_share) == ("static", 0.2, "dynamic", 0.2)
    (clean,) = all_samples(tmp_path / "dynamic")
    assert not clean.mlm_counts.any() and not (clean.input_ids == 4).any()
    check_samples(clean, shard.vocab_size, shard.path)
    masking = masking_of(shard)
    assert masking.mask_id == 4 and masking.random_ids.tolist() == list(range(5, 805))
    assert masking.choose is choose_words and not masking.continuations.any()
    masked = mask_dynamic(clean, np.arange(len(clean)), 1, 0, masking)
    check_samples(masked, shard.vocab_size, shard.path)
    assert masked.mlm_counts.all() and (restored(masked) == clean.input_ids).all()
    with pytest.raises(InputError, match="its masking is static.* dynamic"):
        open_shards([str(tmp_path / "dynamic" / "*.h5"), str(tmp_path / "static" / "*.h5")])


def test_whole_words_are_masked_together(tmp_path):
    tokens = list(SPECIAL_TOKENS) + ["play", "##ing", "##s", "the"]
    (tmp_path / "vocab").write_text("\n".join(tokens))
    (tmp_path / "text").write_text("\n".join(["playing the plays playings the"] * 50 + ["", "the playing"]))
    files = {"input": [str(tmp_path / "text")], "vocab": str(tmp_path / "vocab")}
    make(None, tmp_path / "out", whole_word_masking=True, **files)
    (samples,) = all_samples(tmp_path / "out")
    for row, positions, count, first in zip(
        restored(samples), samples.mlm_positions, samples.mlm_counts, samples.first_lengths
    ):
        masked, inner = np.isin(np.arange(32), positions[:count]), np.isin(row, [6, 7])
        inner[[1, first]] = False  # the first piece of a segment begins a word, whatever it is
        assert (masked[1:][inner[1:]] == masked[:-1][inner[1:]]).all()
    assert samples.mlm_counts.mean() > 3
    with h5py.File(str(tmp_path / "out" / "train-00000.h5"), "r") as file:
        assert "masked_units" not in file.attrs and file.attrs["continuations"]  # as before there were other units


def choose_first_tokens(candidates):
    rows = np.flatnonzero(candidates.budget)
    return rows, np.ones_like(rows)


@pytest.mark.parametrize("masking", ["static", "dynamic"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_another_way_to_choose_tokens_is_an_entry_also_in_other_processes(
    corpus, tmp_path, small_chunks, monkeypatch, workers, masking
):
    monkeypatch.setitem(CHOICES, "firsts", choose_first_tokens)
    more = ("--masked-units", "firsts", "--masking", masking, "--workers", workers)
    assert main(arguments(corpus, tmp_path / "out", *more)) == 0
    shards = open_shards([str(tmp_path / "out" / "*.h5")])
    for samples in all_samples(tmp_path / "out"):
        if masking == "dynamic":
            samples = mask_dynamic(samples, np.arange(len(samples)), 1, 0, masking_of(shards[0]))
        assert (samples.mlm_counts == 1).all() and (samples.mlm_positions[:, 0] == 1).all()
    with h5py.File(shards[0].path, "r") as file:
        assert json.loads(file.attrs["made_by"])["masked_units"] == file.attrs["masked_units"] == "firsts"


def test_a_sample_takes_343_bytes_at_phase_1_sizes_and_the_page_says_so(corpus, tmp_path):
    make(corpus, tmp_path / "out", duplicates=20, sequence_length=128, mask_tokens=20)
    (shard,) = open_shards([str(tmp_path / "out" / "train-*.h5")])
    assert shard.num_samples > 500 and (shard.file_size - 16384) / shard.num_samples < 343
    with open(os.path.join(ROOT, "data", "FORMAT.md"), encoding="utf-8") as file:
        page = file.read()
    assert "343 bytes a sample" in page and all(f"`{name}`" in page for name in FIELDS)
    with h5py.File(shard.path, "r") as file:
        assert all(f"`{name}`" in page for name in file.attrs)
        assert sum(file[name].nbytes for name in FIELDS) == 343 * shard.num_samples


def text(path, content):
    path.write_bytes(content)
    return [str(path)]


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda folder: dict(input=[str(folder / "none*.txt")]), r"none\*.txt: no file matches"),
        (lambda folder: dict(input=text(folder / "empty.txt", b"")), "empty.txt: no text"),
        (
            lambda folder: dict(input=text(folder / "empty.txt", b" \n\n"), vocab=None, vocab_size=200),
            "empty.txt: no text",
        ),
        (lambda folder: dict(input=text(folder / "one.txt", b"d1w1\n")), "one.txt: no text to make a sample of"),
        (
            lambda folder: dict(input=text(folder / "bad.txt", b"d1w1 d1w2\n\nd1w1\xff\n")),
            "bad.txt: byte 15, in line 3",
        ),
        (
            lambda folder: dict(vocab=text(folder / "v.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")[0]),
            r"v.txt: .*no \[MASK\]",
        ),
        (lambda folder: dict(vocab=str(folder / "none")), "none: the vocabulary cannot be read"),
        (lambda folder: dict(vocab=None, vocab_size=10), "--vocab-size is 10"),
        (lambda folder: dict(mask_tokens=32), "--mask-tokens is 32, expected 1 to 29"),
        (lambda folder: dict(mask_tokens=31, nsp=False), "--mask-tokens is 31, expected 1 to 30"),
        (lambda folder: dict(mask_tokens=0), "--mask-tokens is 0"),
        (lambda folder: dict(sequence_length=4, mask_tokens=1), "--sequence-length is 4"),
        (lambda folder: dict(mask_share=1.5), "--mask-share is 1.5"),
        (lambda folder: dict(short_share=-0.1), "--short-share is -0.1"),
        (lambda folder: dict(duplicates=0), "--duplicates is 0"),
        (lambda folder: dict(samples_per_shard=0), "--samples-per-shard is 0"),
        (lambda folder: dict(seed=-1), "--seed is -1"),
        (
            lambda folder: dict(format="html"),
            "--format is html, expected auto or lines or wikitext or wikiextractor or jsonl",
        ),
        (lambda folder: dict(masking="none"), "--masking is none, expected static or dynamic"),
        (lambda folder: dict(masked_units="letters"), "--masked-units is letters, expected tokens or words"),
        (lambda folder: dict(workers=0), "--workers is 0"),
        (
            lambda folder: dict(format="lines", input=text(folder / "a.jsonl.gz", b"")),
            "a.jsonl.gz: is named as JSON lines, --format is lines",
        ),
        (
            lambda folder: dict(format="lines", input=text(folder / "w", b"<doc id>\na b\n</doc>\n")),
            "w: begins with .*Give --format wikiextractor",
        ),
        (lambda folder: dict(held_out=1.0), "--held-out is 1.0"),
        (
            lambda folder: dict(held_out=0.9, input=text(folder / "one.txt", b"d1w1 d1w2 d1w3\n")),
            "leaves nothing to train on",
        ),
        (lambda folder: dict(held_out=0.0001), "holds nothing out: the text has 40 documents"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(corpus, tmp_path, bad, message):
    options = bad(tmp_path)
    before = sorted(os.listdir(str(tmp_path)))
    with pytest.raises(InputError, match=message):
        make(corpus, tmp_path / "new" / "out", **options)
    assert sorted(os.listdir(str(tmp_path))) == before


def test_a_folder_that_holds_a_data_set_is_refused_and_left_as_it_was(corpus, tmp_path):
    make(corpus, tmp_path / "out")
    before = file_hashes(tmp_path / "out")
    with pytest.raises(InputError, match="out: holds a data set already .train-00000.h5.; nothing is overwritten"):
        make(corpus, tmp_path / "out", seed=7)
    assert file_hashes(tmp_path / "out") == before
    with pytest.raises(InputError, match="is a file"):
        make(corpus, tmp_path / "out" / "vocab.txt")


def test_an_existing_folder_is_filled_beside_what_lies_there_and_its_own_vocabulary_may_be_used(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    (out / "vocab.txt").write_bytes((corpus / "vocab").read_bytes())
    with pytest.raises(InputError, match="holds a data set already .vocab.txt."):
        make(corpus, out)
    make(corpus, out, vocab=str(out / "vocab.txt"))
    assert (out / "notes").read_text() == "mine"
    assert sorted(os.listdir(str(out))) == [
        "notes",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.h5",
        "vocab.txt",
    ]


def test_the_command_reports_and_its_exit_status_is_0_or_2(corpus, tmp_path, capsys):
    command = arguments(corpus, tmp_path / "out", "--held-out", "0.1")
    assert main(command) == 0
    report = capsys.readouterr().out
    assert "documents   40, of which 4 held out" in report and "[UNK]" in report and "padding" in report
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out


def test_an_interrupt_says_how_to_go_on_and_exits_130(corpus, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 2, KeyboardInterrupt())
    assert main(arguments(corpus, tmp_path / "out", "--samples-per-shard", "20")) == 130
    assert os.listdir(str(tmp_path)) == [".out.unfinished"]
    assert "interrupted" in capsys.readouterr().err


def test_help_teaches_with_an_example_and_preparing_needs_no_torch():
    code = "import sys, data.prepare; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert_help_teaches("data.prepare", "python -m data.prepare --input 'corpus/*.txt'", code)


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="development data is not there")
def test_real_text_with_the_real_vocabulary_keeps_every_token_at_phase_2_sizes(tmp_path):
    options = PrepareOptions(
        [os.path.join(SHARED, "wikitext-2-valid.txt")],
        str(tmp_path / "out"),
        format="wikitext",
        vocab=os.path.join(SHARED, "bert-base-uncased-vocab.txt"),
        sequence_length=512,
        mask_tokens=76,
    )
    summary = prepare(options, progress=False)
    assert (summary.documents, summary.dropped_tokens) == (60, 0) and summary.tokens > 250000
    assert len(glob.glob(str(tmp_path / "out" / "*.h5"))) == 1
    assert summary.sample_tokens / summary.slots > 0.8


def turkish(tmp_path):
    words = ["Çağrı", "ağaç", "öğüt", "İstanbul", "IŞIK", "ılık", "düş", "üzüm", "şişe", "göl", "ördek", "çiçek"]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=9)) if number % 12 else "" for number in range(300)]
    (tmp_path / "tr.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "tr.txt")


def test_prepare_says_how_text_is_normalised_and_warns_of_what_is_lost(tmp_path, capsys):
    text = turkish(tmp_path)
    command = ["--input", text, "--vocab-size", "150", "--sequence-length", "32", "--mask-tokens", "5", "--output"]
    assert main([*command, str(tmp_path / "default")]) == 0
    report = capsys.readouterr().out
    share = re.search(r"text        lower-case, accents stripped; ([\d.]+) % of the characters lost more than", report)
    assert 20 < float(share.group(1)) < 40 and " ğ" in report
    assert (
        "warning     more than 1 %: accents, vowel signs and other marks are removed. To keep them add --keep-"
        in report
    )
    assert main([*command, str(tmp_path / "kept"), "--cased", "--normalization", "nfc"]) == 0
    report = capsys.readouterr().out
    assert "text        cased, accents kept, NFC; 0.00 % of" in report and "warning" not in report
    with h5py.File(str(tmp_path / "default" / "train-00000.h5"), "r") as file:
        assert json.loads(file.attrs["made_by"])["altered_characters"] == pytest.approx(
            float(share.group(1)) / 100, abs=1e-4
        )
    (shard,) = open_shards([str(tmp_path / "kept" / "*.h5")])
    vocabulary = read_vocab(str(tmp_path / "kept"))
    assert shard.tokenizer == vocabulary.rules and "Çağrı" in vocabulary.tokens and not vocabulary.lowercase
    # Without options it goes by the vocabulary's own files; options that say another thing are refused.
    for vocab in ("kept", "kept/vocab.txt", "kept/tokenizer.json"):
        out = tmp_path / vocab.replace("/", "-").replace("kept", "again")
        assert main([*command, str(out), "--vocab", str(tmp_path / vocab)]) == 0
        assert "cased, accents kept, NFC; 0.00" in capsys.readouterr().out
    assert file_hashes(tmp_path / "again")["train-00000.h5"] == file_hashes(tmp_path / "kept")["train-00000.h5"]
    assert main([*command, str(tmp_path / "no"), "--vocab", str(tmp_path / "kept"), "--lowercase"]) == 2
    assert "error: --lowercase says lower-case, " in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(str(tmp_path / "kept" / name))
    assert main([*command, str(tmp_path / "no"), "--vocab", str(tmp_path / "kept")]) == 2
    assert "Add --cased, which suits them" in capsys.readouterr().err and not (tmp_path / "no").exists()
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "no"), "--cased", "--lowercase"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_vocabulary_trained_first_keeps_its_rules_for_what_is_made_beside_it(tmp_path, capsys):
    command = ["--input", turkish(tmp_path), "--output", str(tmp_path / "out"), "--sequence-length", "32"]
    assert main([*command, "--vocab-only", "--vocab-size", "150", "--keep-accents"]) == 0
    assert "lower-case, accents kept" in capsys.readouterr().out
    assert main([*command, "--mask-tokens", "5", "--vocab", str(tmp_path / "out" / "vocab.txt")]) == 0
    assert "lower-case, accents kept; 0.00" in capsys.readouterr().out
    assert main([*command, "--mask-tokens", "5", "--vocab", str(tmp_path / "out")]) == 2
    assert "holds a data set already" in capsys.readouterr().err


def test_text_is_made_samples_by_a_tokenizer_json_as_it_is(tmp_path):
    turkish(tmp_path)
    foreign_tokenizer(tmp_path / "tokenizer.json", (tmp_path / "tr.txt").read_text(encoding="utf-8").split("\n"))
    options = PrepareOptions([str(tmp_path / "tr.txt")], str(tmp_path / "out"), vocab=str(tmp_path), **SIZES)
    prepare(replace(options, whole_word_masking=True), progress=False)
    result = inspect(InspectOptions([str(tmp_path / "out" / "*.h5")], check=True), progress=False)
    vocabulary = read_vocab(str(tmp_path))
    assert result.tokenizer == vocabulary.rules and "@@" not in result.examples[0].split("\n")[1]
    with h5py.File(str(tmp_path / "out" / "train-00000.h5"), "r") as file:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(file.attrs["continuations"]), np.uint8))[: len(vocabulary)]
    assert bits.tolist() == [token.startswith("@@") for token in vocabulary.tokens] and bits.any()
    shards = open_shards([str(tmp_path / "out" / "*.h5")])
    write_tokenizer_files(str(tmp_path / "out"), Vocabulary(vocabulary.tokens))
    with pytest.raises(
        InputError, match="is not the tokenizer that .*train-00000.h5 was made with: text is lower-case"
    ):
        find_vocab(None, shards)


def test_parts_that_do_not_tell_what_normalisation_took_are_not_said_to_have_lost_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ChunkMaker, "count_altered", lambda self, lines: {})  # as an earlier release made them
    (tmp_path / "text").write_text("Çağrı ağaç\nbir satır\n\nbaşka bir metin\n" * 20, encoding="utf-8")
    sizes = dict(vocab_size=100, sequence_length=16, mask_tokens=2, workers=1)
    summary = prepare(PrepareOptions([str(tmp_path / "text")], str(tmp_path / "out"), **sizes), progress=False)
    assert "text        lower-case, accents stripped\n" in str(summary)
    with h5py.File(tmp_path / "out" / "train-00000.h5", "r") as file:
        assert json.loads(file.attrs["made_by"])["altered_characters"] is None
