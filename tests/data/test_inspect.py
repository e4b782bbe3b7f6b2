import json
import os
import re

import numpy as np
import pytest

from data import inspect as inspect_module
from data.errors import InputError
from data.foreign.nvidia import write_nvidia
from data.histogram import bars, plot
from data.inspect import InspectOptions, inspect, main, readable
from data.loading.loader import Loader, LoaderSettings
from data.loading.shard_files import open_shards
from data.packing import SAMPLES_PER_ROW, pack
from data.prepare import PrepareOptions, prepare
from data.rows import RowShape
from data.samples import Samples
from data.shards import read_samples, write_shard
from data.tokenizer import vocab_sha256
from tests import ROOT, assert_help_teaches
from tests.make_samples import WORDS, bert_samples

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


def write(folder, samples, name="train-00000.h5", tokens=WORDS):
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    path = str(folder / name)
    write_shard(path, samples, len(tokens), vocab_sha256(tokens), {})
    return path


def look(path, **options):
    return inspect(InspectOptions([str(path)], **options), progress=False)


def test_every_figure_is_that_of_counting_sample_by_sample(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 300, 32, 6)
    write(tmp_path, samples.take(slice(0, 200)))
    write(tmp_path, samples.take(slice(200, 300)), "train-00001.h5")
    result = look(tmp_path / "*.h5")
    maskable = masked = as_mask = unchanged = 0
    for i in range(300):
        shown = samples.input_ids[i].tolist()
        maskable += sum(token not in (0, 2, 3) for token in shown)
        for slot in range(samples.mlm_counts[i]):
            token, label = shown[samples.mlm_positions[i, slot]], samples.mlm_labels[i, slot]
            masked, as_mask, unchanged = masked + 1, as_mask + (token == 4), unchanged + (token == label)
    assert (result.files, result.samples, result.tokens) == (2, 300, samples.lengths.sum())
    assert result.length_histogram == [int((samples.lengths == length).sum()) for length in range(33)]
    assert result.padding == pytest.approx(1 - samples.lengths.sum() / (300 * 32))
    assert result.masked == pytest.approx(masked / maskable) and 0.6 < result.masked_as_mask < 1
    assert result.masked_as_mask == pytest.approx(as_mask / masked) and result.masked_unchanged == pytest.approx(
        unchanged / masked
    )
    assert result.masked_as_mask + result.masked_unchanged + result.masked_as_random == pytest.approx(1)
    assert result.not_next == pytest.approx(samples.nsp_labels.mean()) and result.duplicates == 0 and not result.checked


def test_samples_that_the_loader_masks_are_good_and_said_to_be_bare(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 30, mask_tokens=1)
    keep = samples.take(np.flatnonzero(samples.mlm_counts == 0))
    path = write(tmp_path, keep)
    write_shard(
        path,
        keep,
        len(WORDS),
        vocab_sha256(WORDS),
        {},
        {"masking": "dynamic", "mask_share": 0.15, "special_ids": [0, 1, 2, 3, 4], "continuations": ""},
    )
    result = look(path, check=True)
    assert result.masking == "dynamic" and result.masked == 0 and "masked      nothing yet" in str(result)


def test_samples_of_one_segment_are_told_shown_and_checked(tmp_path, capsys):
    samples = bert_samples(np.random.default_rng(0), 20)
    samples.input_ids[np.arange(20), samples.first_lengths - 1] = 9  # the [SEP] of the first segment
    samples.first_lengths[:], samples.nsp_labels[:], samples.mlm_counts[:] = samples.lengths, 0, 0
    samples.input_ids[np.arange(20), samples.lengths - 1] = 3
    samples.mlm_positions[:], samples.mlm_labels[:] = 0, 0
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    path = str(tmp_path / "train-00000.h5")

    def write_one_segment():
        write_shard(path, samples, len(WORDS), vocab_sha256(WORDS), {}, segments=1)

    write_one_segment()
    result = look(path, check=True)
    report = str(result)
    assert result.segments == 1 and "NSP         none: a sample is one segment" in report
    assert "second segment" not in report and "sample is good" in report
    samples.nsp_labels[3] = 1
    write_one_segment()
    assert main([path, "--check"]) == 2
    assert "sample 3: nsp_labels holds 1, expected 0: the sample has one segment" in capsys.readouterr().err
    samples.nsp_labels[3], samples.first_lengths[2] = 0, samples.lengths[2] - 1
    write_one_segment()
    assert main([path, "--check"]) == 2
    assert "sample 2: first_lengths holds" in capsys.readouterr().err


def test_packing_saves_padding(tmp_path):
    result = look(write(tmp_path, bert_samples(np.random.default_rng(0), 300, 32, 6)))
    assert 0 <= result.padding_packed < result.padding / 2 and "when packed" in str(result)


def test_as_many_samples_are_packed_as_are_said_whatever_the_sizes_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_module, "PACKED_SAMPLES", 250)
    samples = bert_samples(np.random.default_rng(0), 300, 32, 6)
    for number in range(3):
        write(tmp_path, samples.take(slice(100 * number, 100 * number + 100)), f"train-{number}.h5")
    lengths, counts = samples.lengths[:250], samples.mlm_counts[:250]
    rows = pack(lengths, counts, *RowShape.of(32, 6, SAMPLES_PER_ROW)).rows
    assert look(tmp_path / "*.h5").padding_packed == pytest.approx(1 - lengths.sum() / (32 * rows))


def test_samples_that_differ_in_their_masks_only_are_duplicates(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 50)
    bare = samples.take(np.arange(50))
    for i in range(50):
        for slot in range(bare.mlm_counts[i]):
            bare.input_ids[i, bare.mlm_positions[i, slot]] = bare.mlm_labels[i, slot]
    bare.mlm_counts[:], bare.mlm_positions[:], bare.mlm_labels[:] = 0, 0, 0
    both = Samples.concatenate([samples, bare.take(slice(0, 20))])
    expected = len(both) - len({bytes(ids) for ids in Samples.concatenate([bare, bare.take(slice(0, 20))]).input_ids})
    assert expected >= 20 and look(write(tmp_path, both)).duplicates == expected


def test_masked_words_are_shown_with_what_stands_there(tmp_path):
    tokens = WORDS[:5] + ["the", "cat", "sat", "##ting", "dog", "on", "it"]
    samples = Samples.empty(1, 16, 4, len(tokens))
    for name in vars(samples):
        getattr(samples, name)[:] = 0
    samples.input_ids[0, :9] = [2, 5, 4, 7, 8, 3, 9, 11, 3]
    samples.lengths[0], samples.first_lengths[0], samples.mlm_counts[0], samples.nsp_labels[0] = 9, 6, 3, 1
    samples.mlm_positions[0, :3], samples.mlm_labels[0, :3] = [2, 6, 7], [6, 10, 11]
    text = "[CLS] the [cat→MASK] satting [SEP] [on→dog] [it→it] [SEP]"
    assert readable(samples, 0, tokens) == text
    path = write(tmp_path, samples, tokens=tokens)
    report = str(look(path, check=True))
    assert f"{path}: sample 0, 9 tokens, the second segment does not follow\n  {text}" in report
    assert "every sample is good" in report and text not in str(look(path, samples=0))


def test_nvidias_files_are_inspected_as_shards_are(tmp_path):
    samples = bert_samples(np.random.default_rng(0), 100)
    own = look(write(tmp_path, samples), check=True)
    path = str(tmp_path / "other.hdf5")
    write_nvidia(path, [samples])
    foreign = look(path, check=True)
    assert foreign.examples != own.examples and [text.split("\n")[1] for text in foreign.examples] == [
        text.split("\n")[1] for text in own.examples
    ]
    same = (
        "samples",
        "tokens",
        "length_histogram",
        "masked",
        "masked_as_mask",
        "masked_unchanged",
        "not_next",
        "duplicates",
    )
    assert [getattr(own, name) for name in same] == [getattr(foreign, name) for name in same]
    assert inspect(InspectOptions([path, str(tmp_path / "*.h5")]), progress=False).samples == 200


def setting(name, place, value):
    def apply(samples):
        getattr(samples, name)[place] = value

    return apply


@pytest.mark.parametrize(
    "damage, message",
    [
        (setting("input_ids", (7, 0), 5), r"input_ids holds 5, expected 2, \[CLS\], at the start"),
        (setting("input_ids", (7, 4), 6), r"input_ids holds 6, expected 3, \[SEP\], at a segment's end"),
        (setting("input_ids", (7, 7), 6), r"input_ids holds 6, expected 3, \[SEP\], at a segment's end"),
        (setting("input_ids", (7, 9), 6), "input_ids holds 6, expected 0 behind the sample's end"),
        (setting("input_ids", (7, 5), 0), r"input_ids before masking holds 0, expected no \[PAD\]"),
        (setting("first_lengths", 7, 0), "first_lengths holds 0"),
        (setting("mlm_positions", (7, 0), 0), "mlm_positions holds 0, expected a token's place"),
        (setting("mlm_positions", (7, 1), 7), "mlm_positions holds 7, expected a token's place"),
        (setting("mlm_positions", (7, 1), 1), "mlm_positions holds 1, expected more than the one before"),
        (setting("mlm_positions", (7, 3), 1), "mlm_positions holds 1, expected 0 behind the last"),
        (setting("mlm_labels", (7, 0), 4), "mlm_labels holds 4, expected a token"),
        (setting("mlm_labels", (7, 3), 9), "mlm_labels holds 9, expected 0 behind the last"),
        (setting("mlm_labels", (7, 3), 200), r"mlm_labels\[3\] is 200, expected below"),
        (setting("lengths", 7, 17), "lengths is 17"),
    ],
)
def test_check_exits_2_and_names_the_first_bad_sample(tmp_path, damage, message, capsys):
    samples = bert_samples(np.random.default_rng(0), 20)
    samples.lengths[7], samples.first_lengths[7], samples.mlm_counts[7] = 8, 5, 2
    samples.input_ids[7] = [2, 9, 4, 9, 3, 9, 9, 3] + [0] * 8
    samples.mlm_positions[7], samples.mlm_labels[7] = [1, 2, 0, 0], [8, 8, 0, 0]
    path = write(tmp_path, samples)
    assert main([path, "--check", "--samples", "0"]) == 0
    damage(samples)
    # Later ones that are bad otherwise, one as the loader sees, one only as the check sees.
    samples.nsp_labels[12], samples.input_ids[9, 0] = 2, 7
    write(tmp_path, samples)
    capsys.readouterr()
    assert main([path, "--check"]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().split("\n")[-1].split("\r")[-1]
    assert re.search("error: .*train-00000.h5: sample 7: " + message, line) and not captured.out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: os.remove(str(folder / "vocab.txt")), "vocab.txt: no such file. Give --vocab"),
        (
            lambda folder: (folder / "vocab.txt").write_text("\n".join(WORDS + ["more"])),
            "vocab.txt: is not the vocabulary that",
        ),
        (lambda folder: os.remove(str(folder / "train-00000.h5")), "train-00000.h5: no such file"),
        (lambda folder: write(folder, bert_samples(np.random.default_rng(0), 0)), "holds no samples"),
        (
            lambda folder: write_nvidia(str(folder / "train-1.h5"), [bert_samples(np.random.default_rng(0), 3, 32)]),
            "train-1.h5: its sequence_length is 32, that of .*train-00000.h5 is 16. Inspect them one after",
        ),
    ],
)
def test_what_cannot_be_inspected_is_named(tmp_path, change, message):
    path = write(tmp_path, bert_samples(np.random.default_rng(0), 20))
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        paths = [path, str(tmp_path / "train-*")] if os.path.exists(path) else [path]
        inspect(InspectOptions(paths), progress=False)
    with pytest.raises(InputError, match="--samples is -1"):
        look(path, samples=-1)


def test_the_command_prints_text_or_json_and_draws(tmp_path, capsys):
    path = write(tmp_path, bert_samples(np.random.default_rng(0), 20))
    assert main([path, "--plot", str(tmp_path / "lengths.png"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 20 and len(result["length_histogram"]) == 17 and len(result["examples"]) == 3
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main([path]) == 0
    report = capsys.readouterr().out
    assert "samples     20 in 1 files" in report and "##" in report and report.count("[CLS]") == 3
    assert main([path, "--plot", str(tmp_path / "no" / "lengths.png")]) == 2
    captured = capsys.readouterr()
    assert "lengths.png: the picture cannot be written" in captured.err and captured.out == report


def test_bars_and_pictures_of_skewed_lengths_are_logarithmic_with_counts_and_shares(tmp_path):
    skewed, even = [0] * 129, [0, *[10] * 128]
    skewed[3], skewed[128] = 1, 9999
    heading, *lines = bars(skewed)
    assert heading == "lengths, bars on a logarithmic scale" and len(lines) == 16
    assert lines[0].split() == ["1", "to", "8", "####", "1", "0.0", "%"] and lines[1].split()[3:] == ["0", "0.0", "%"]
    assert lines[15].split() == ["121", "to", "128", 40 * "#", "9,999", "100.0", "%"]
    heading, *lines = bars(even)
    assert heading == "lengths" and all(line.split()[3:] == [40 * "#", "80", "6.2", "%"] for line in lines)
    shown = ["9,999  (100.0 %)", "0  (0.0 %)", "samples, logarithmic scale"]
    for counts, words in ((skewed, shown), (even, ["80  (6.2 %)", "samples"])):
        plot(counts, "a title", str(tmp_path / "lengths.svg"))
        texts = re.findall(r"<text[^>]*>([^<]*)<", (tmp_path / "lengths.svg").read_text())
        assert {*words, "a title", "121 to 128"} <= set(texts)
    plot(even, "", str(tmp_path / "lengths.pdf"))
    assert (tmp_path / "lengths.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(InputError, match="lengths.txt: the picture cannot be written .* ends in .png, .svg or .pdf"):
        plot(even, "", str(tmp_path / "lengths.txt"))


def test_folders_prepared_with_other_duplicates_are_trained_on_together_and_their_shares_are_shown(tmp_path):
    draw, vocab = np.random.default_rng(0), tmp_path / "words"
    vocab.write_text("\n".join(WORDS))
    for name, count, duplicates in (("books", 20, 3), ("wiki", 40, 1)):
        (tmp_path / name).write_text("\n\n".join(" ".join(draw.choice(WORDS[5:], 40)) for _ in range(count)))
        sizes = dict(sequence_length=16, mask_tokens=3, samples_per_shard=30, workers=1)
        output = str(tmp_path / "shards" / name)
        options = PrepareOptions([str(tmp_path / name)], output, vocab=str(vocab), duplicates=duplicates, **sizes)
        prepare(options, progress=False)
    pattern = str(tmp_path / "shards" / "*" / "train-*.h5")
    result = look(pattern)
    alone = [look(tmp_path / "shards" / name / "train-*.h5") for name in ("books", "wiki")]
    assert [source.gone_over for source in result.sources] == [3, 1]
    for source, own in zip(result.sources, alone):
        assert (source.samples, source.tokens, source.duplicates) == (own.samples, own.tokens, own.duplicates)
        assert (own.sources[0].samples, len(own.sources)) == (own.samples, 1) and "sources" not in str(own)
    share = 100 * alone[0].samples / result.samples
    assert f"books: {alone[0].samples:,} samples ({share:.1f} %), " in str(result)
    assert result.duplicates == sum(source.duplicates for source in result.sources)
    shards = open_shards([pattern])
    samples = Samples.concatenate([read_samples(shard.path, 0, shard.num_samples) for shard in shards])
    with Loader(shards, LoaderSettings(len(samples), seed=1)) as loader:  # a batch of all: each comes once
        ids = loader.next().arrays["input_ids"]
        assert sorted(map(bytes, ids)) == sorted(map(bytes, samples.input_ids.astype(ids.dtype)))


def test_help_teaches_with_an_example_and_hides_no_module_of_python():
    code = "import data.inspect, inspect, sys; sys.exit('torch' in sys.modules or not hasattr(inspect, 'signature'))"
    assert_help_teaches("data.inspect", "python -m data.inspect 'shards/wikipedia-128/train-*.h5'", code)


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="development data is not there")
def test_nvidias_own_file_is_as_berts_paper_says():
    tokens = os.path.join(SHARED, "bert-base-uncased-vocab.txt")
    result = look(os.path.join(SHARED, "nvidia-schema-128.h5"), vocab=tokens, check=True)
    assert (result.samples, result.duplicates) == (931, 0)
    assert (
        abs(result.masked - 0.15) < 0.01
        and abs(result.masked_as_mask - 0.8) < 0.02
        and abs(result.masked_as_random - 0.1) < 0.02
    )


def test_what_normalisation_takes_is_told_of_shards_and_of_a_text_whose_lines_make_the_round_trip(tmp_path):
    samples, tokens = bert_samples(np.random.default_rng(0), 30), [*WORDS[:-4], "cagr", "##ı", "ciao", "!"]
    path = write(tmp_path, samples, tokens=tokens)
    assert look(path).altered_characters is None and "text        lower-case, accents stripped\n" in str(look(path))
    write_shard(path, samples, len(tokens), vocab_sha256(tokens), {"altered_characters": 0.0123})
    assert look(path).altered_characters == pytest.approx(0.0123) and "accents stripped; 1.23 %" in str(look(path))
    (tmp_path / "text.txt").write_text("Çağrı CIAO!\n\nciao\n", encoding="utf-8")
    result = look(path, text=str(tmp_path / "text.txt"), samples=1)
    assert result.altered_characters == 2 / 14 and "warning     more than 1 %" in str(result)
    text = tmp_path / "text.txt"
    assert result.examples[0] == f"{text}: Çağrı CIAO!\n  tokens   cagr ##ı ciao !\n  decoded  cagrı ciao!"
