"""Converts samples that others made into the project's shards, or shards into NVIDIA's files: `python -m data.convert
--help`.

    files -> blocks of samples -> one sequence length and number of mask slots -> shards, in the order of the files

Files are streamed; one shard is held in memory. The data set is built beside the output folder and moved there when it
is whole.
"""

import contextlib
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any, Dict, Generator, Iterable, Iterator, List, Optional, Sequence, Tuple

import h5py
import numpy as np
from tqdm import tqdm

from data.commands import check_options, option, parse_options, run_command, table
from data.errors import InputError
from data.foreign.bert_layout import fit_samples, to_samples
from data.foreign.hub import is_hub, largest_mask_count, read_hub, table_files
from data.foreign.nvidia import open_nvidia, write_nvidia
from data.foreign.tfrecord import feature_names, read_packed, read_plain
from data.loading.shard_files import open_shards, read_checked
from data.preparing.staging import Staging, check_output, open_staging
from data.samples import Samples
from data.shards import FIRST_TOKENIZER, expand, write_shard
from data.tokenizer import NORMALIZATIONS, Vocabulary, claims_of, find_vocab, vocab_sha256, write_tokenizer_files

__all__ = ["FORMATS", "Conversion", "ConvertOptions", "convert", "main", "recognise"]

NATIVE = "native"
FORMATS = ("nvidia", "tfrecord", "packed-tfrecord", "hub")
BLOCK = 4096  # samples read at a time from HDF5
NAMED_FILES = 20  # in made_by: an attribute has room for 64 KB

NONE = Vocabulary([])

Block = Tuple[Samples, str, int]
"""samples, their file, and the place of the first of them in it"""

EXAMPLES = """examples:
  # the hub's Graphcore/wikipedia-bert-128, downloaded: parquet files, or the folder that datasets' save_to_disk wrote
  python -m data.convert --input 'wikipedia-bert-128/*.parquet' --vocab vocab.txt --mask-tokens 20 \\
      --output shards/wikipedia-128/

  # Google's or Graphcore's TFRecord, plain or packed
  python -m data.convert --input 'tfrecords/*.tfrecord' --vocab vocab.txt --mask-tokens 20 --output shards/own/

  # NVIDIA's HDF5 (training reads it as it is, too, but more slowly), and back
  python -m data.convert --input 'hdf5_lower_case_1_seq_len_128/*.hdf5' --vocab vocab.txt --output shards/nvidia-128/
  python -m data.convert --to nvidia --input 'shards/own/train-*.h5' --output for-nvidia/

The output folder gets train-00000.h5 and so on, in the order of the input, and with --vocab also vocab.txt,
tokenizer.json and tokenizer_config.json."""


@dataclass
class ConvertOptions:
    """Converts samples that others made into shards to train on, token for token; or shards into NVIDIA's files."""

    input: List[str]
    """files, globs in quotes, or folders of parquet or Arrow files"""
    output: str
    """the folder to make; one that holds a data set is refused"""
    source: Optional[str] = option(None, choices=FORMATS, flag="--from")
    """the format of the input (default: each file's is recognised)"""
    target: str = option(NATIVE, choices=(NATIVE, "nvidia"), flag="--to")
    """native: this project's shards. nvidia: HDF5 as NVIDIA's BERT reads it"""
    vocab: Optional[str] = None
    """the vocabulary that the samples were made with: a vocab.txt, a tokenizer.json, or a folder with them; shards of
    this project need none"""
    lowercase: Optional[bool] = option(None, off="--cased")
    """the samples' text was lower-cased (default: as the vocabulary's own files say, else it was)"""
    strip_accents: Optional[bool] = option(None, off="--keep-accents")
    """accents and all other combining marks were removed (default: as the vocabulary's own files say, else as with
    --lowercase)"""
    chinese_characters: Optional[bool] = option(None, off="--no-chinese-characters")
    """each Chinese character was a word of its own (default: as the vocabulary's own files say, else it was)"""
    normalization: Optional[str] = option(None, choices=NORMALIZATIONS)
    """the Unicode normal form that the text was brought into (default: as the vocabulary's own files say, else none)"""
    sequence_length: Optional[int] = option(None, lambda length: 8 <= length <= 65535, "8 to 65535 tokens")
    """token slots of a sample (default: the input's)"""
    mask_tokens: Optional[int] = option(None, lambda count: 1 <= count <= 65535, "1 to 65535")
    """mask slots of a sample (default: the input's; for parquet and Arrow the most that a sample has, for which the
    labels are read once before)"""
    samples_per_shard: int = option(262144, lambda count: count >= 1, "1 or more")
    """samples of a file; one file is held in memory"""


@dataclass
class Conversion:
    """What `convert` did; printed, it is the command's report."""

    output: str
    formats: Tuple[str, ...]  # of the files, each once
    sequence_length: int
    mask_tokens: int
    samples: int = 0
    shards: int = 0
    tokens: int = 0
    masked_tokens: int = 0
    text: str = ""  # how it was normalised; "" where that is not told

    def __str__(self) -> str:
        sizes = f"{self.sequence_length} tokens and {self.mask_tokens} masked tokens at most"
        text = {"text": f"taken to be {self.text}"} if self.text else {}
        return table(
            {
                "read": ", ".join(self.formats),
                "samples": f"{self.samples:,} in {self.shards} files, of {sizes}",
                "tokens": f"{self.tokens:,}, {self.masked_tokens:,} of them masked",
                **text,
                "written to": self.output,
            }
        )


def convert(options: ConvertOptions, progress: bool = True) -> Conversion:
    """Makes the data set `options.output`: train-*.h5 and vocab.txt.

    Samples stay in the order of the files, sorted by name. Raises InputError, and writes nothing, for anything that
    cannot be used, naming the file and sample; OSError when the disk is full.
    """
    check_options(options)
    files = find_files(options)
    check_output(options.output, options.vocab)
    reader = Reader(files, options, progress)
    run = {
        "command": "data.convert",
        "input": [os.path.realpath(path) for path in reader.files],
        "to": options.target,
        "vocabulary": vocab_sha256(reader.vocabulary.tokens),
        "normalised": None if reader.vocabulary.rules == FIRST_TOKENIZER else reader.vocabulary.rules,
    }
    # Another run may differ in these, for it begins anew; but they say whether a data set that is there is its own.
    arguments = {
        "from": list(reader.formats),
        "sequence length": options.sequence_length,
        "mask tokens": reader.mask_tokens,
        "samples": options.samples_per_shard,
    }
    with open_staging(options.output, run) as staging:
        if staging.report is not None:  # a run that was killed as it ended had done all
            staging.remove()
            if staging.report["arguments"] != arguments:
                check_output(options.output, options.vocab)
            return Conversion(**dict(staging.report["result"], output=options.output))
        try:
            with contextlib.closing(reader.blocks()) as blocks:  # or its bar would be drawn below an error
                result = write_files(reader, blocks, staging, options)
        except OSError:
            staging.remove()
            raise
        staging.publish({"arguments": arguments, "result": asdict(result)})
    return result


def find_files(options: ConvertOptions) -> Dict[str, str]:
    """Every file that paths, globs and folders name -> its format, in the order of reading; checks what they may
    become."""
    paths = [name for path in expand(options.input) for name in table_files(path)]
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file")
    files = {path: options.source or recognise(path) for path in paths}
    formats = set(files.values())
    if NATIVE in formats and (options.target == NATIVE or len(formats) > 1):
        raise InputError(
            "the input holds shards of this project. Convert them alone, with --to nvidia; training reads them as "
            "they are"
        )
    if NATIVE not in formats and options.vocab is None:
        raise InputError(
            "--vocab is missing: the samples hold ids only. Give the vocab.txt that they were made with, such as "
            "bert-base-uncased's"
        )
    return files


def recognise(path: str) -> str:
    """One of FORMATS, or NATIVE, by what is in the file. Raises InputError for something else."""
    try:
        if is_hub(path):
            return "hub"
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                return NATIVE if "format" in file.attrs else "nvidia"
        names = feature_names(path)
    except (OSError, InputError) as error:
        raise InputError(f"{path}: is not recognised as NVIDIA's HDF5, TFRecord, parquet or Arrow ({error})")
    if not any(name in ("input_ids", "packed_input_ids") for name in names):
        raise InputError(f"{path}: TFRecord of the features {names}, expected input_ids or packed_input_ids among them")
    return "tfrecord" if "input_ids" in names else "packed-tfrecord"


class Reader:
    """Reads files (path -> format) as blocks of samples, and shows their bytes on a bar.

    `vocabulary` has no tokens where none is given, which only shards of this project allow. `mask_tokens`: a
    sample's mask slots; None where they are the first block's.
    """

    def __init__(self, files: Dict[str, str], options: ConvertOptions, progress: bool):
        self.files, self.progress = files, progress
        self.formats = tuple(sorted(set(files.values())))
        shards = open_shards(self.of_format(NATIVE)) if NATIVE in self.formats else []
        for shard in shards:
            if shard.masking != "static":
                raise InputError(
                    f"{shard.path}: its masking is {shard.masking}: nothing is masked yet, and NVIDIA's layout needs "
                    "masked samples. Prepare the text with --masking static"
                )
        said = claims_of(options)
        for flag, _ in said.values() if not options.vocab else ():
            raise InputError(f"{flag} needs --vocab: without it nothing says how text was normalised")
        self.vocabulary = find_vocab(options.vocab, shards, claims=said, strict=True)[0] if options.vocab else NONE
        self.vocab_size = shards[0].vocab_size if shards else len(self.vocabulary)
        shards += [open_nvidia(path, self.vocab_size) for path in self.of_format("nvidia")]
        self.shards = {shard.path: shard for shard in shards}
        self.segments = shards[0].segments if shards else 2
        for path in files:
            found = self.shards[path].segments if path in self.shards else 2
            if found != self.segments:
                raise InputError(
                    f"{path}: its samples have {found} segment(s), others {self.segments}. Convert it alone"
                )
        self.mask_tokens = options.mask_tokens
        if "hub" in self.formats and not self.mask_tokens:
            bar = partial(tqdm, unit="file", desc="masked tokens", disable=not progress)
            self.mask_tokens = largest_mask_count(self.of_format("hub"), bar)

    def of_format(self, name: str) -> List[str]:
        return [path for path, format in self.files.items() if format == name]

    def blocks(self) -> Generator[Block, None, None]:
        sizes = {path: os.path.getsize(path) for path in self.files}
        total = sum(sizes.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="samples", disable=not self.progress) as bar:
            for path in self.files:
                before, first = bar.n, 0
                for samples, done in self.blocks_of(path):
                    if self.vocabulary:
                        check_begins(samples, self.vocabulary.tokens.index("[CLS]"), path, first)
                    yield samples, path, first
                    first += len(samples)
                    bar.update(before + done - bar.n)
                bar.update(before + sizes[path] - bar.n)

    def blocks_of(self, path: str) -> Iterator[Tuple[Samples, int]]:
        """Samples, at least one, and how many bytes of the file they and those before them take."""
        if path in self.shards:
            shard = self.shards[path]
            for start in range(0, shard.num_samples, BLOCK):
                stop = min(start + BLOCK, shard.num_samples)
                yield read_checked(shard, start, stop, 0), shard.file_size * stop // shard.num_samples
            return
        if self.files[path] == "hub":
            contents = read_hub(path, self.mask_tokens or 0)
        else:
            contents = (read_plain if self.files[path] == "tfrecord" else read_packed)(path)
        first = 0
        for arrays, done in contents:
            samples = to_samples(arrays, self.vocab_size, path, first)
            if len(samples):
                yield samples, done
            first += len(samples)


def check_begins(samples: Samples, cls_id: int, path: str, first: int) -> None:
    good = samples.input_ids[:, 0] == cls_id
    if not good.all():
        bad = int(np.argmin(good))
        raise InputError(
            f"{path}: sample {first + bad} begins with id {samples.input_ids[bad, 0]}, expected {cls_id}, [CLS]. Is "
            "--vocab the vocabulary that the samples were made with?"
        )


def write_files(reader: Reader, blocks: Iterator[Block], staging: Staging, options: ConvertOptions) -> Conversion:
    for name in os.listdir(staging.data):  # of a run that was killed: its input may have been another
        os.remove(os.path.join(staging.data, name))
    head = next(blocks, None)
    if head is None:
        raise InputError(f"{', '.join(reader.files)}: no samples")
    length = options.sequence_length or head[0].input_ids.shape[1]
    slots = reader.mask_tokens or head[0].mlm_positions.shape[1]
    result = Conversion(options.output, reader.formats, length, slots)
    result.text = reader.vocabulary.in_words() if reader.vocabulary else ""
    fitted = (fit_samples(samples, length, slots, path, first) for samples, path, first in chain([head], blocks))
    if reader.vocabulary:
        write_tokenizer_files(staging.data, reader.vocabulary)
    made_by: Dict[str, Any] = {
        "command": "data.convert",
        "input": [os.path.basename(path) for path in list(reader.files)[:NAMED_FILES]],
        "input_files": len(reader.files),
        "from": result.formats,
    }
    for parts in shard_parts(fitted, options.samples_per_shard):
        path = os.path.join(staging.data, f"train-{result.shards:05}.h5")
        if options.target == NATIVE:
            samples = Samples.concatenate(parts)
            more: Dict[str, Any] = {"segments": reader.segments, "tokenizer": reader.vocabulary.rules}
            vocab_hash = vocab_sha256(reader.vocabulary.tokens)
            write_shard(path, samples, len(reader.vocabulary), vocab_hash, made_by, **more)
        else:
            write_nvidia(path, parts, reader.segments)
        result.shards += 1
        result.samples += sum(map(len, parts))
        result.tokens += sum(int(part.lengths.sum(dtype=np.int64)) for part in parts)
        result.masked_tokens += sum(int(part.mlm_counts.sum(dtype=np.int64)) for part in parts)
    return result


def shard_parts(blocks: Iterable[Samples], limit: int) -> Iterator[List[Samples]]:
    """The samples in the same order, in lists of `limit` samples but for the last."""
    parts: List[Samples] = []
    room = limit
    for block in blocks:
        while len(block) >= room:
            yield [*parts, block.take(slice(0, room))]
            parts, block, room = [], block.take(slice(room, None)), limit
        if len(block):
            parts.append(block)
            room -= len(block)
    if parts:
        yield parts


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status, as `run_command` says."""
    options = parse_options(ConvertOptions, arguments, "data.convert", EXAMPLES)
    advice = f"{options.output} was not made; the same command begins anew"
    return run_command(lambda: print(convert(options)), advice)


if __name__ == "__main__":
    sys.exit(main())
