"""Shows what is in shards, this project's or NVIDIA's: `python -m data.inspect --help` tells how.

Shape letters: N samples, L sequence length, M mask slots.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import h5py
import numpy as np
from tqdm import tqdm

from data import histogram
from data.commands import check_options, option, parse_options, run_command, table
from data.errors import InputError
from data.foreign.bert_layout import first_fault
from data.foreign.nvidia import is_nvidia, open_nvidia, read_nvidia
from data.packing import SAMPLES_PER_ROW, pack
from data.preparing.text_file import read_lines
from data.rows import RowShape
from data.samples import Samples, find_bad_sample
from data.shards import ShardInfo, expand, open_shard, read_samples
from data.tokenizer import Vocabulary, altered_characters, find_vocab, make_tokenizer, text_in_words

__all__ = ["InspectOptions", "Inspection", "inspect", "main", "readable", "restored_ids"]

BLOCK = 4096  # samples read at a time
PACKED_SAMPLES = 65536  # that are packed together to see what packing saves: a global batch of the recipe's phase 1
LINES_OF_TEXT = 100000  # that --text reads
ALIKE = ("sequence_length", "mask_tokens", "segments", "masking")  # fields of ShardInfo that shards have in common

EXAMPLES = """examples:
  python -m data.inspect 'shards/wikipedia-128/train-*.h5' --plot lengths.png
  python -m data.inspect 'shards/wikipedia-128/*.h5' --check --samples 0     # exits 2 and names the first bad sample

  # several sources, each in a folder of its own: what each adds
  python -m data.inspect 'shards/*/train-*.h5'

  # what the tokenizer makes of lines of text
  python -m data.inspect 'shards/tr/train-*.h5' --text corpus.txt

  # NVIDIA's files do not bring their vocabulary
  python -m data.inspect 'hdf5_lower_case_1_seq_len_128/*.hdf5' --vocab vocab.txt --json

In the samples [cat→MASK] is a masked token, [cat→dog] one that was replaced at random, [cat→cat] one that was left."""


@dataclass
class InspectOptions:
    """Shows what is in shards: counts, lengths, padding, masking, NSP, duplicates, and samples as text."""

    files: List[str] = option(flag="files")
    """shards of this project or NVIDIA's HDF5 files; paths, or globs in quotes"""
    vocab: Optional[str] = None
    """the vocabulary that the samples were made with (default: vocab.txt beside the first shard)"""
    samples: int = option(3, lambda count: count >= 0, "0 or more")
    """samples to show as text"""
    text: Optional[str] = None
    """a text file, UTF-8: its first --samples lines are shown as tokens and made text again, and the share of its
    characters that normalisation takes something from"""
    check: bool = False
    """verify every sample; exits 2 naming the first bad one"""
    plot: Optional[str] = None
    """the picture to draw of the histogram of lengths, such as lengths.png, .svg or .pdf"""
    json: bool = False
    """print one JSON object instead of text"""


@dataclass
class Source:
    """What the shards of a folder add to a data set."""

    folder: str
    samples: int
    tokens: int
    duplicates: int  # samples that another sample before it equals, wherever that is
    gone_over: int  # how many times data.prepare went over the text; 0 where the first shard does not say


@dataclass
class Inspection:
    """What `inspect` counted; printed, it is the command's report. Shares are of 1."""

    files: int
    bytes: int
    sequence_length: int
    mask_tokens: int
    vocab_size: int
    masking: str  # static, or dynamic: the loader's, in each epoch
    segments: int  # of a sample
    samples: int
    tokens: int
    length_histogram: List[int]  # samples of 0, 1, .. L tokens
    padding: float  # of the token slots, one sample a row
    padding_packed: float  # of the token slots, with the first PACKED_SAMPLES packed
    masked: float  # of the tokens but [CLS] and [SEP]; BERT's: 0.15
    masked_as_mask: float  # of the masked tokens, how many are [MASK]; BERT's: 0.8
    masked_as_random: float  # how many are another token; BERT's: 0.1
    masked_unchanged: float  # how many are as they were; BERT's: 0.1
    not_next: float  # of the samples, how many second segments do not follow the first; BERT's: 0.5
    duplicates: int  # samples whose tokens, before masking, are those of another sample before it
    sources: List[Source]  # the folders of the files
    checked: bool  # every sample was verified and is good
    tokenizer: str  # how text is normalised: Vocabulary.rules
    altered_characters: Optional[float]  # share that normalisation took something from, of --text or as shards say
    examples: List[str]

    def __str__(self) -> str:
        percent = {name: f"{100 * share:.1f} %" for name, share in vars(self).items() if isinstance(share, float)}
        masked = (
            f"{100 * self.masked:.2f} % of the tokens (BERT: 15): {percent['masked_as_mask']} of them [MASK] (80), "
            f"{percent['masked_as_random']} random (10), {percent['masked_unchanged']} kept (10)"
        )
        not_next = f"{percent['not_next']} of the second segments do not follow the first (50)"
        sizes = f"{self.sequence_length} tokens, {self.mask_tokens} masked at most"
        rows = {
            "samples": f"{self.samples:,} in {self.files} files, {self.bytes // self.samples} bytes a sample",
            "layout": f"{sizes}; {self.vocab_size:,} tokens in the vocabulary",
            "tokens": f"{self.tokens:,}, {self.tokens / self.samples:.1f} a sample",
            "padding": f"{percent['padding']} of the token slots, {percent['padding_packed']} when packed",
            "masked": masked if self.masking == "static" else "nothing yet: the loader masks anew in each epoch",
            **text_in_words(self.tokenizer, self.altered_characters),
            "NSP": not_next if self.segments > 1 else "none: a sample is one segment",
            "duplicates": f"{self.duplicates:,} samples, {100 * self.duplicates / self.samples:.2f} %",
            **({"sources": "\n            ".join(map(self.share, self.sources))} if len(self.sources) > 1 else {}),
            "checked": "every sample is good" if self.checked else "no: --check verifies every sample",
        }
        examples = ["", *self.examples] if self.examples else []
        return "\n".join([table(rows), "", *histogram.bars(self.length_histogram), *examples])

    def share(self, source: Source) -> str:
        """A source's shares in words."""
        samples = f"{source.samples:,} samples ({100 * source.samples / self.samples:.1f} %)"
        tokens = f"{source.tokens:,} tokens ({100 * source.tokens / self.tokens:.1f} %)"
        gone_over = f", text gone over {source.gone_over} times" if source.gone_over else ""
        return f"{source.folder}: {samples}, {tokens}, {source.duplicates:,} duplicates{gone_over}"


def inspect(options: InspectOptions, progress: bool = True) -> Inspection:
    """Reads all samples of the shards, block by block, and counts what is in them.

    Of each sample 8 bytes stay in memory, some 32 at the end, to find duplicates. With `options.check` it verifies
    every sample as `find_fault` does, else only what reading needs. Raises InputError that names the file and sample
    that cannot be used.
    """
    check_options(options)
    vocabulary, shards = open_all(options)
    tokens = vocabulary.tokens
    ids = {token: tokens.index(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    first, samples = shards[0], sum(shard.num_samples for shard in shards)
    counts: Counter = Counter()
    lengths = np.zeros(first.sequence_length + 1, np.int64)
    parts: List[Tuple[str, int, int]] = []
    hashes, sizes, to_pack = [], [], PACKED_SAMPLES
    for shard, block in blocks(shards, samples, ids if options.check else None, progress):
        parts.append((shard.path, len(block), int(block.lengths.sum(dtype=np.int64))))
        lengths += np.bincount(block.lengths, minlength=len(lengths))
        counts.update(count_masks(block, ids["[MASK]"]), not_next=int(block.nsp_labels.sum()))
        hashes.append(hash_rows(restored_ids(block)))
        sizes.append(np.stack([block.lengths[:to_pack], block.mlm_counts[:to_pack]]))
        to_pack -= sizes[-1].shape[1]
    total, masked = int(lengths @ np.arange(len(lengths))), max(1, counts["masked"])
    sources = sources_of(parts, np.concatenate(hashes))
    shown: List[str] = []
    altered = altered_share(shards)
    if options.text:
        altered, shown = try_text(vocabulary, options.text, options.samples)
    common: Dict[str, Any] = {name: getattr(first, name) for name in ALIKE}
    common["tokenizer"] = vocabulary.rules  # of NVIDIA's files, which do not say it, too
    return Inspection(
        files=len(shards),
        bytes=sum(shard.file_size for shard in shards),
        vocab_size=len(tokens),
        samples=samples,
        tokens=total,
        length_histogram=lengths.tolist(),
        padding=1 - total / (samples * first.sequence_length),
        padding_packed=padding_when_packed(np.concatenate(sizes, axis=1), first),
        masked=counts["masked"] / max(1, counts["maskable"]),
        masked_as_mask=counts["as_mask"] / masked,
        masked_as_random=(counts["masked"] - counts["as_mask"] - counts["unchanged"]) / masked,
        masked_unchanged=counts["unchanged"] / masked,
        not_next=counts["not_next"] / samples,
        duplicates=sum(source.duplicates for source in sources),
        sources=sources,
        checked=options.check,
        altered_characters=altered,
        examples=[*shown, *show_examples(shards, vocabulary, options.samples)],
        **common,
    )


def open_all(options: InspectOptions) -> Tuple[Vocabulary, List[ShardInfo]]:
    """The vocabulary and the shards, checked against it and each other."""
    paths = expand(options.files)
    shards = [open_nvidia(path, 65536) if is_nvidia(path) else open_shard(path) for path in paths]
    for name, shard in itertools.product(ALIKE, shards):
        value, other = getattr(shard, name), getattr(shards[0], name)
        if value != other:
            differs = f"{shard.path}: its {name} is {value}, that of {shards[0].path} is {other}"
            raise InputError(f"{differs}. Inspect them one after another")
    vocabulary, _ = find_vocab(options.vocab, shards)
    if not any(shard.num_samples for shard in shards):
        raise InputError(f"{', '.join(paths)}: holds no samples")
    return vocabulary, [dataclasses.replace(shard, vocab_size=len(vocabulary)) for shard in shards]


def blocks(
    shards: Sequence[ShardInfo], total: int, ids: Optional[Dict[str, int]], progress: bool
) -> Iterator[Tuple[ShardInfo, Samples]]:
    with tqdm(total=total, unit=" samples", unit_scale=True, disable=not progress) as bar:
        for shard in shards:
            for start in range(0, shard.num_samples, BLOCK):
                samples = read_block(shard, start, min(start + BLOCK, shard.num_samples), ids)
                yield shard, samples
                bar.update(len(samples))


def read_block(shard: ShardInfo, start: int, stop: int, ids: Optional[Dict[str, int]] = None) -> Samples:
    """Samples that are safe to use; with `ids`, those of the special tokens, they are also as BERT's must be."""
    place = (shard.path, start, stop)
    samples = good = read_nvidia(*place, shard.vocab_size) if shard.is_nvidia else read_samples(*place)
    fault = None
    # find_bad_sample gives one of those that fail its first check: an earlier one may fail another.
    while (bad := find_bad_sample(good, shard.vocab_size)) is not None:
        fault, good = bad, good.take(slice(0, bad[0]))
    if ids is not None:
        fault = find_fault(good, ids, shard.segments) or fault
    if fault is not None:
        raise InputError(f"{shard.path}: sample {start + fault[0]}: {fault[1]}")
    return samples


def used_slots(samples: Samples) -> np.ndarray:
    return np.arange(samples.mlm_positions.shape[1]) < samples.mlm_counts[:, None]


def count_masks(samples: Samples, mask_id: int) -> Dict[str, int]:
    used = used_slots(samples)
    shown = np.take_along_axis(samples.input_ids, samples.mlm_positions.astype(np.intp), axis=1)
    special = 2 * len(samples) + (samples.first_lengths < samples.lengths).sum()
    return {
        "maskable": int(samples.lengths.sum(dtype=np.int64) - special),
        "masked": int(used.sum()),
        "as_mask": int((used & (shown == mask_id)).sum()),
        "unchanged": int((used & (shown == samples.mlm_labels)).sum()),
    }


def restored_ids(samples: Samples) -> np.ndarray:
    """[N, L] ids before masking."""
    ids = samples.input_ids.copy()
    row, slot = np.nonzero(used_slots(samples))
    ids[row, samples.mlm_positions[row, slot]] = samples.mlm_labels[row, slot]
    return ids


def hash_rows(ids: np.ndarray) -> np.ndarray:
    """[N] uint64: equal rows have equal hashes, others almost surely have not."""
    weights = np.random.default_rng(0).integers(0, 1 << 63, ids.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    return ids.astype(np.uint64) @ weights


def sources_of(parts: Sequence[Tuple[str, int, int]], hashes: np.ndarray) -> List[Source]:
    """The folders of parts (a shard's path, samples, tokens), which together have the samples with these hashes."""
    repeated = np.ones(len(hashes), np.int64)
    repeated[np.unique(hashes, return_index=True)[1]] = 0
    starts = np.cumsum([0, *(samples for _, samples, _ in parts)])[:-1]
    sources: Dict[str, Source] = {}
    for (path, samples, tokens), duplicates in zip(parts, np.add.reduceat(repeated, starts).tolist()):
        folder = os.path.dirname(path)
        source = sources.get(folder) or Source(folder, 0, 0, 0, gone_over(path))
        source.samples, source.tokens = source.samples + samples, source.tokens + tokens
        source.duplicates, sources[folder] = source.duplicates + duplicates, source
    return list(sources.values())


def gone_over(path: str) -> int:
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs.get("made_by", "{}")).get("duplicates", 0)


def find_fault(samples: Samples, ids: Dict[str, int], segments: int) -> Optional[Tuple[int, str]]:
    """The first sample that is not as BERT's are, and what is wrong with it; None when all are good.

    For samples that `data.samples.find_bad_sample` found good. `ids` are those of [PAD], [CLS], [SEP] and [MASK],
    `segments` how many a sample has.
    """
    shown, before, used = samples.input_ids, restored_ids(samples), used_slots(samples)
    lengths, first_lengths = samples.lengths, samples.first_lengths
    places, labels = samples.mlm_positions, samples.mlm_labels
    position, last, first_last = np.arange(shown.shape[1]), lengths[:, None] - 1, first_lengths[:, None] - 1
    inside, end = position <= last, (position == last) | (position == first_last)
    in_text = (places > 0) & (places != last) & (places != first_last)
    ascending = places[:, 1:] > places[:, :-1]
    pairs = segments > 1
    checks = [
        ("lengths", lengths, "at least 2: [CLS] and [SEP]", lengths >= 2),
        ("first_lengths", first_lengths, "at least 2: [CLS] and [SEP]", first_lengths >= 2),
        ("first_lengths", first_lengths, "the sample's length: it has one segment", pairs | (first_lengths == lengths)),
        ("nsp_labels", samples.nsp_labels, "0: the sample has one segment", pairs | (samples.nsp_labels == 0)),
        ("input_ids", shown, f"{ids['[CLS]']}, [CLS], at the start", (position > 0) | (shown == ids["[CLS]"])),
        ("input_ids", shown, f"{ids['[SEP]']}, [SEP], at a segment's end", ~end | (shown == ids["[SEP]"])),
        ("input_ids", shown, "0 behind the sample's end", inside | (shown == 0)),
        ("input_ids before masking", before, "no [PAD] in a sample", ~inside | (before != ids["[PAD]"])),
        ("mlm_positions", places, "a token's place, not that of [CLS] or [SEP]", ~used | in_text),
        ("mlm_positions", places[:, 1:], "more than the one before", ~used[:, 1:] | ascending),
        ("mlm_positions", places, "0 behind the last masked token", used | (places == 0)),
        ("mlm_labels", labels, "a token that is not special", ~used | ~np.isin(labels, list(ids.values()))),
        ("mlm_labels", labels, "0 behind the last masked token", used | (labels == 0)),
    ]
    return first_fault(checks)


def padding_when_packed(sizes: np.ndarray, shard: ShardInfo) -> float:
    """The padding's share of the token slots. `sizes`: [2, N], samples' lengths and mask counts."""
    lengths, mask_counts = sizes
    shape = RowShape.of(shard.sequence_length, shard.mask_tokens, SAMPLES_PER_ROW)
    return 1 - int(lengths.sum(dtype=np.int64)) / (pack(lengths, mask_counts, *shape).rows * shard.sequence_length)


def altered_share(shards: Sequence[ShardInfo]) -> Optional[float]:
    """The share of the text's characters that normalisation took something from, as far as the shards say."""
    said = []
    for shard in shards:
        with h5py.File(shard.path, "r") as file:
            share = json.loads(file.attrs.get("made_by", "{}")).get("altered_characters")
        said += [(share, shard.num_samples)] if share is not None else []
    return sum(share * samples for share, samples in said) / sum(samples for _, samples in said) if said else None


def try_text(vocabulary: Vocabulary, path: str, count: int) -> Tuple[float, List[str]]:
    """The share of a text's characters that normalisation takes something from; and its first `count` lines, as tokens
    and as the text that is made of these."""
    lines = list(islice(filter(None, read_lines(path, lambda size: None)), LINES_OF_TEXT))
    tokenizer = make_tokenizer(vocabulary)
    tokenizer.encode_special_tokens = True
    shown = []
    for line in lines[:count]:
        encoding = tokenizer.encode(line, add_special_tokens=False)
        decoded = tokenizer.decode(encoding.ids, skip_special_tokens=False)
        shown.append(f"{path}: {line}\n  tokens   {' '.join(encoding.tokens)}\n  decoded  {decoded}")
    counts = Counter("".join(lines))
    counted = sum(number for character, number in counts.items() if not character.isspace())
    return sum(altered_characters(vocabulary, counts).values()) / max(1, counted), shown


def show_examples(shards: Sequence[ShardInfo], vocabulary: Vocabulary, count: int) -> Iterator[str]:
    """Samples from all over the data set as text, headed by where they are."""
    ends = np.cumsum([shard.num_samples for shard in shards])
    for number in sorted({index * int(ends[-1]) // max(1, count) for index in range(count)}):
        place = int(np.searchsorted(ends, number, side="right"))
        shard = shards[place]
        index = number - int(ends[place]) + shard.num_samples
        samples = read_block(shard, index, index + 1)
        follows = ", the second segment " + ("does not follow" if samples.nsp_labels[0] else "follows")
        heading = f"sample {index}, {samples.lengths[0]} tokens{follows if shard.segments > 1 else ''}"
        yield f"{shard.path}: {heading}\n  {readable(samples, 0, vocabulary.tokens, vocabulary.prefix)}"


def readable(samples: Samples, index: int, tokens: Sequence[str], prefix: str = "##") -> str:
    """A sample as text, word pieces joined; a masked token as `[before→after]`, MASK for [MASK]."""
    shown = [tokens[token] for token in samples.input_ids[index, : samples.lengths[index]]]
    for slot in range(samples.mlm_counts[index]):
        place = samples.mlm_positions[index, slot]
        replacement = "MASK" if shown[place] == "[MASK]" else shown[place]
        shown[place] = f"[{tokens[samples.mlm_labels[index, slot]]}→{replacement}]"
    return " ".join(shown).replace(f" {prefix}", "")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status, as `run_command` says."""
    options = parse_options(InspectOptions, arguments, "data.inspect", EXAMPLES)

    def show() -> None:
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib")
        result = inspect(options)
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False) if options.json else result)
        if options.plot:
            title = f"{result.samples:,} samples, {100 * result.padding:.1f} % padding"
            histogram.plot(result.length_histogram, title, options.plot)

    return run_command(show)


if __name__ == "__main__":
    sys.exit(main())
