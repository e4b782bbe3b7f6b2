"""Shows what is in shards, this project's or NVIDIA's: `python -m data.inspect --help` tells how.

Shape letters: N samples, L sequence length, M mask slots.
"""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.foreign.bert_layout import first_fault
from data.foreign.nvidia import is_nvidia, open_nvidia, read_nvidia
from data.loading.shard_files import open_shards
from data.packing import SAMPLES_PER_ROW, pack
from data.rows import RowShape
from data.samples import Samples, find_bad_sample
from data.shards import ShardInfo, expand, read_samples
from data.tokenizer import read_vocab, vocab_sha256

__all__ = ["Inspection", "inspect", "main", "readable", "restored_ids"]

BLOCK = 4096  # samples read at a time
PACKED_SAMPLES = 65536  # that are packed together to see what packing saves: a global batch of the recipe's phase 1
BARS, BAR_WIDTH = 16, 40


@dataclass
class Inspection:
    """What `inspect` found; printed, it is the command's report. Shares are of 1."""

    files: int
    bytes: int
    sequence_length: int
    mask_tokens: int
    vocab_size: int
    masking: str
    """static, or dynamic: the loader's, in each epoch"""
    samples: int = 0
    tokens: int = 0
    length_histogram: List[int] = dataclasses.field(default_factory=list)
    """samples of 0, 1, .. L tokens"""
    padding: float = 0.0
    """of the token slots, one sample a row"""
    padding_packed: float = 0.0
    """of the token slots, with the first PACKED_SAMPLES packed"""
    masked: float = 0.0
    """of the tokens but [CLS] and [SEP]; BERT's: 0.15"""
    masked_as_mask: float = 0.0
    """of the masked tokens, how many are [MASK]; BERT's: 0.8"""
    masked_as_random: float = 0.0
    """how many are another word; BERT's: 0.1"""
    masked_unchanged: float = 0.0
    """how many are as they were; BERT's: 0.1"""
    not_next: float = 0.0
    """of the samples, how many second segments do not follow the first; BERT's: 0.5"""
    duplicates: int = 0
    """samples whose words, before masking, are those of another sample before it"""
    checked: bool = False
    """every sample was verified and is good"""
    examples: List[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                (
                    f"samples     {format(self.samples, ',')} in {self.files} files, {self.bytes // self.samples} "
                    "bytes a sample"
                ),
                (
                    f"layout      {self.sequence_length} tokens, {self.mask_tokens} masked at most; "
                    f"{format(self.vocab_size, ',')} words"
                ),
                f"tokens      {format(self.tokens, ',')}, {self.tokens / self.samples:.1f} a sample",
                (
                    f"padding     {100 * self.padding:.1f} % of the token slots, {100 * self.padding_packed:.1f} "
                    "% when packed"
                ),
                "masked      nothing yet: the loader masks anew in each epoch"
                if self.masking == "dynamic"
                else (
                    f"masked      {100 * self.masked:.2f} % of the words (BERT: 15): "
                    f"{100 * self.masked_as_mask:.1f} % of them [MASK] (80), {100 * self.masked_as_random:.1f} % "
                    f"random (10), {100 * self.masked_unchanged:.1f} % kept (10)"
                ),
                f"NSP         {100 * self.not_next:.1f} % of the second segments do not follow the first (50)",
                f"duplicates  {format(self.duplicates, ',')} samples, {100 * self.duplicates / self.samples:.2f} %",
                "checked     every sample is good" if self.checked else "checked     no: --check verifies every sample",
                "",
                "lengths",
            ]
            + bars(self.length_histogram)
            + [""] * bool(self.examples)
            + self.examples
        )


def inspect(
    files: Sequence[str], vocab: Optional[str] = None, examples: int = 3, check: bool = False, progress: bool = True
) -> Inspection:
    """Reads all samples of the shards that `files` (paths and globs) name, block by block, and tells what is in them.

    Of each sample 8 bytes stay in memory, to find duplicates.

    `vocab`: the vocabulary file, by default vocab.txt beside the first shard. `check` verifies every sample as
    `find_fault` does; without it only what reading needs is verified. Raises InputError that names the file and sample
    that cannot be used.
    """
    if examples < 0:
        raise InputError(f"--samples is {examples}, expected 0 or more")
    words, shards = open_all(files, vocab)
    first = shards[0]
    result = Inspection(
        len(shards),
        sum(shard.file_size for shard in shards),
        first.sequence_length,
        first.mask_tokens,
        len(words),
        first.masking,
        checked=check,
    )
    ids = {word: words.index(word) for word in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    histogram = np.zeros(first.sequence_length + 1, np.int64)
    maskable = masked = as_mask = unchanged = not_next = 0
    hashes, packable, to_pack = [], [], PACKED_SAMPLES
    for samples in blocks(shards, ids if check else None, progress):
        histogram += np.bincount(samples.lengths, minlength=len(histogram))
        maskable += int(
            samples.lengths.sum(dtype=np.int64) - 2 * len(samples) - (samples.first_lengths < samples.lengths).sum()
        )
        used = used_slots(samples)
        shown = np.take_along_axis(samples.input_ids, samples.mlm_positions.astype(np.intp), axis=1)
        masked += int(used.sum())
        as_mask += int((used & (shown == ids["[MASK]"])).sum())
        unchanged += int((used & (shown == samples.mlm_labels)).sum())
        not_next += int(samples.nsp_labels.sum())
        hashes.append(hash_rows(restored_ids(samples)))
        if to_pack:
            packable.append((samples.lengths[:to_pack].copy(), samples.mlm_counts[:to_pack].copy()))
            to_pack -= len(packable[-1][0])
    hashed = np.concatenate(hashes)
    result.samples, result.tokens = len(hashed), int(histogram @ np.arange(len(histogram)))
    result.length_histogram = histogram.tolist()
    result.padding = 1 - result.tokens / (result.samples * first.sequence_length)
    result.padding_packed = padding_when_packed(*map(np.concatenate, zip(*packable)), first)
    result.masked = masked / max(1, maskable)
    result.masked_as_mask, result.masked_unchanged = as_mask / max(1, masked), unchanged / max(1, masked)
    result.masked_as_random = (masked - as_mask - unchanged) / max(1, masked)
    result.not_next = not_next / result.samples
    result.duplicates = result.samples - len(np.unique(hashed))
    result.examples = list(show_examples(shards, words, examples))
    return result


def open_all(files: Sequence[str], vocab: Optional[str]) -> Tuple[List[str], List[ShardInfo]]:
    """The vocabulary's words and the shards, checked against it and each other."""
    paths = expand(files)
    foreign = [path for path in paths if is_nvidia(path)]
    own = [path for path in paths if path not in foreign]
    shards = open_shards(own) if own or not paths else []
    vocab = vocab or os.path.join(os.path.dirname(paths[0]), "vocab.txt")
    if not os.path.exists(vocab):
        raise InputError(f"{vocab}: no such file. Give --vocab, the vocabulary that the samples were made with")
    words = read_vocab(vocab)
    if shards and vocab_sha256(words) != shards[0].vocab_sha256:
        raise InputError(
            f"{vocab}: is not the vocabulary that {shards[0].path} was made with (their hashes differ). Give "
            "that one with --vocab"
        )
    shards = shards + [open_nvidia(path, len(words)) for path in foreign]
    for shard in shards:
        if (shard.sequence_length, shard.mask_tokens) != (shards[0].sequence_length, shards[0].mask_tokens):
            raise InputError(
                f"{shard.path}: sequence length {shard.sequence_length}, {shard.mask_tokens} masked tokens; "
                f"{shards[0].path} has {shards[0].sequence_length}, {shards[0].mask_tokens}. Inspect them one "
                "after another"
            )
    if not any(shard.num_samples for shard in shards):
        raise InputError(f"{', '.join(paths)}: holds no samples")
    return words, shards


def blocks(shards: Sequence[ShardInfo], ids: Optional[Dict[str, int]], progress: bool) -> Iterator[Samples]:
    with tqdm(
        total=sum(shard.num_samples for shard in shards), unit=" samples", unit_scale=True, disable=not progress
    ) as bar:
        for shard in shards:
            for start in range(0, shard.num_samples, BLOCK):
                samples = read_block(shard, start, min(start + BLOCK, shard.num_samples), ids)
                yield samples
                bar.update(len(samples))


def read_block(shard: ShardInfo, start: int, stop: int, ids: Optional[Dict[str, int]] = None) -> Samples:
    """Samples that are safe to use; with `ids`, those of the special words, as BERT's must be, too."""
    if shard.offsets:
        samples = read_samples(shard.path, start, stop)
        fault = first_bad_sample(samples, shard.vocab_size)
    else:
        samples, fault = read_nvidia(shard.path, start, stop, shard.vocab_size), None
    if ids is not None:
        fault = find_fault(samples.take(slice(0, len(samples) if fault is None else fault[0])), ids) or fault
    if fault is not None:
        raise InputError(f"{shard.path}: sample {start + fault[0]}: {fault[1]}")
    return samples


def first_bad_sample(samples: Samples, vocab_size: int) -> Optional[Tuple[int, str]]:
    # find_bad_sample gives one of those that fail its first check: an earlier one may fail another.
    bad, found = None, find_bad_sample(samples, vocab_size)
    while found is not None:
        bad, found = found, find_bad_sample(samples.take(slice(0, found[0])), vocab_size)
    return bad


def used_slots(samples: Samples) -> np.ndarray:
    return np.arange(samples.mlm_positions.shape[1]) < samples.mlm_counts[:, None]


def restored_ids(samples: Samples) -> np.ndarray:
    """[N, L] ids before masking."""
    ids = samples.input_ids.copy()
    row, slot = np.nonzero(used_slots(samples))
    ids[row, samples.mlm_positions[row, slot]] = samples.mlm_labels[row, slot]
    return ids


def hash_rows(ids: np.ndarray) -> np.ndarray:
    """[N] uint64: the same for equal rows, and else as good as never."""
    weights = np.random.default_rng(0).integers(0, 1 << 63, ids.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    return ids.astype(np.uint64) @ weights


def find_fault(samples: Samples, ids: Dict[str, int]) -> Optional[Tuple[int, str]]:
    """The first sample that is not as BERT's are, and what is wrong with it; None when all are good.

    For samples that `data.shards.find_bad_sample` found good. `ids` are those of [PAD], [CLS], [SEP] and [MASK].
    """
    position = np.arange(samples.input_ids.shape[1])
    last, first_last = samples.lengths[:, None] - 1, samples.first_lengths[:, None] - 1
    used, inside = used_slots(samples), position <= last
    special = [ids[word] for word in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    places, shown, words = samples.mlm_positions, samples.input_ids, restored_ids(samples)
    end = (position == last) | (position == first_last)
    return first_fault(
        [
            ("lengths", samples.lengths, "at least 2: [CLS] and [SEP]", samples.lengths >= 2),
            ("first_lengths", samples.first_lengths, "at least 2: [CLS] and [SEP]", samples.first_lengths >= 2),
            ("input_ids", shown, f"{ids['[CLS]']}, [CLS], at the start", (position > 0) | (shown == ids["[CLS]"])),
            ("input_ids", shown, f"{ids['[SEP]']}, [SEP], at a segment's end", ~end | (shown == ids["[SEP]"])),
            ("input_ids", shown, "0 behind the sample's end", inside | (shown == 0)),
            ("input_ids before masking", words, "no [PAD] in a sample", ~inside | (words != ids["[PAD]"])),
            (
                "mlm_positions",
                places,
                "a word's place, not that of [CLS] or [SEP]",
                ~used | (places > 0) & (places != last) & (places != first_last),
            ),
            (
                "mlm_positions",
                places[:, 1:],
                "more than the one before",
                ~used[:, 1:] | (places[:, 1:] > places[:, :-1]),
            ),
            ("mlm_positions", places, "0 behind the last masked token", used | (places == 0)),
            ("mlm_labels", samples.mlm_labels, "a word", ~used | ~np.isin(samples.mlm_labels, special)),
            ("mlm_labels", samples.mlm_labels, "0 behind the last masked token", used | (samples.mlm_labels == 0)),
        ]
    )


def padding_when_packed(lengths: np.ndarray, mask_counts: np.ndarray, shard: ShardInfo) -> float:
    shape = RowShape.of(shard.sequence_length, shard.mask_tokens, SAMPLES_PER_ROW)
    rows = pack(lengths, mask_counts, *shape).rows
    return 1 - int(lengths.sum(dtype=np.int64)) / (rows * shard.sequence_length)


def show_examples(shards: Sequence[ShardInfo], words: Sequence[str], count: int) -> Iterator[str]:
    """Samples from all over the data set as text, headed by where they are."""
    ends = np.cumsum([shard.num_samples for shard in shards])
    for number in sorted({index * int(ends[-1]) // max(1, count) for index in range(count)}):
        place = int(np.searchsorted(ends, number, side="right"))
        shard = shards[place]
        index = number - int(ends[place]) + shard.num_samples
        samples = read_block(shard, index, index + 1)
        yield (
            f"{shard.path}: sample {index}, {samples.lengths[0]} tokens, the second segment "
            f"{'does not follow' if samples.nsp_labels[0] else 'follows'}\n  {readable(samples, 0, words)}"
        )


def readable(samples: Samples, index: int, words: Sequence[str]) -> str:
    """A sample as text, word pieces joined; a masked token as `[what stood there→what stands there]`, MASK for
    [MASK]."""
    tokens = [words[token] for token in samples.input_ids[index, : samples.lengths[index]]]
    for slot in range(samples.mlm_counts[index]):
        place = samples.mlm_positions[index, slot]
        shown = "MASK" if tokens[place] == "[MASK]" else tokens[place]
        tokens[place] = f"[{words[samples.mlm_labels[index, slot]]}→{shown}]"
    return " ".join(tokens).replace(" ##", "")


def bars(histogram: Sequence[int]) -> List[str]:
    """Lines of a bar chart of the histogram of lengths, in at most BARS bins."""
    longest = len(histogram) - 1
    width = -(-longest // BARS)
    starts = range(1, longest + 1, width)
    counts = [sum(histogram[start : start + width]) for start in starts]
    digits, most, total = len(str(longest)), max(counts), max(1, sum(counts))
    drawn = ["#" * -(-count * BAR_WIDTH // most) for count in counts]
    return [
        "  %*d to %*d  %-*s %5.1f %%"
        % (digits, start, digits, min(start + width - 1, longest), BAR_WIDTH, bar, 100 * count / total)
        for start, count, bar in zip(starts, counts, drawn)
    ]


def plot_lengths(result: Inspection, path: str) -> None:
    """Draws the histogram of lengths. Raises InputError when the picture cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(result.length_histogram)), result.length_histogram, width=1.0)
    axes.set(
        xlabel="tokens of a sample",
        ylabel="samples",
        xlim=(0, result.sequence_length + 1),
        title=f"{format(result.samples, ',')} samples, {100 * result.padding:.1f} % padding",
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the picture cannot be written ({error}). Give --plot a name that ends in .png")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Shows what is in shards: counts, lengths, padding, masking, NSP, duplicates, and samples as text.",
        epilog="""examples:
  python -m data.inspect 'shards/wikipedia-128/train-*.h5' --plot lengths.png
  python -m data.inspect 'shards/wikipedia-128/*.h5' --check --samples 0     # exits 2 and names the first bad sample

  # NVIDIA's files do not bring their vocabulary
  python -m data.inspect 'hdf5_lower_case_1_seq_len_128/*.hdf5' --vocab vocab.txt --json

In the samples [cat→MASK] is a masked word, [cat→dog] one that was replaced at random, [cat→cat] one that was left.""",
    )
    option = parser.add_argument
    option(
        "files",
        nargs="+",
        metavar="SHARD",
        help="shards of this project or NVIDIA's HDF5 files; paths, or globs in quotes",
    )
    option("--vocab", metavar="FILE", help="the vocabulary (default: vocab.txt beside the first shard)")
    option("--samples", dest="examples", type=int, default=3, metavar="N", help="samples to show as text (default 3)")
    option("--check", action="store_true", help="verify every sample; exits 2 naming the first bad one")
    option("--plot", metavar="FILE.png", help="draw the histogram of lengths")
    option("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status: 0, 2 for shards that cannot be used (one line on stderr), 130 when
    interrupted."""
    options = vars(make_parser().parse_args(arguments))
    plot, as_json = options.pop("plot"), options.pop("json")
    try:
        result = inspect(**options)
        if plot:
            plot_lengths(result, plot)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(dataclasses.asdict(result), ensure_ascii=False) if as_json else result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
