"""Converts samples that others made into the project's shards, or shards into NVIDIA's files: `python -m data.convert
--help`.

    files -> blocks of samples -> one sequence length and number of mask slots -> shards, in the order of the files

Files are streamed; one shard is held in memory. The data set is built beside the output folder and moved there when it
is whole.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import h5py
import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.foreign.bert_layout import fit_samples, to_samples
from data.foreign.hub import is_hub, largest_mask_count, read_hub, table_files
from data.foreign.nvidia import open_nvidia, read_nvidia, write_nvidia
from data.foreign.tfrecord import feature_names, read_packed, read_plain
from data.loading.shard_files import open_shards
from data.preparing.staging import Staging, check_output, moving, open_staging
from data.samples import Samples, check_samples
from data.shards import ShardInfo, expand, read_samples, write_shard
from data.tokenizer import read_vocab, vocab_sha256, write_tokenizer_files

__all__ = ["FORMATS", "Conversion", "convert", "main", "recognise"]

NATIVE = "native"
FORMATS = ("nvidia", "tfrecord", "packed-tfrecord", "hub")
TARGETS = (NATIVE, "nvidia")
BLOCK = 4096  # samples read at a time from HDF5
SHARD_NAME = "train-%05d.h5"
NAMED_FILES = 20


@dataclass
class Conversion:
    """What `convert` did; printed, it is the command's report."""

    output: str
    formats: Tuple[str, ...]
    """of the files, each once"""
    sequence_length: int
    mask_tokens: int
    samples: int = 0
    shards: int = 0
    tokens: int = 0
    masked_tokens: int = 0

    def count(self, parts: Sequence[Samples]) -> None:
        """Adds a file that was written."""
        self.shards += 1
        for samples in parts:
            self.samples += len(samples)
            self.tokens += int(samples.lengths.sum(dtype=np.int64))
            self.masked_tokens += int(samples.mlm_counts.sum(dtype=np.int64))

    def __str__(self) -> str:
        return "\n".join(
            [
                f"read        {', '.join(self.formats)}",
                (
                    f"samples     {format(self.samples, ',')} in {self.shards} files, of {self.sequence_length} "
                    f"tokens and {self.mask_tokens} masked tokens at most"
                ),
                f"tokens      {format(self.tokens, ',')}, {format(self.masked_tokens, ',')} of them masked",
                f"written to  {self.output}",
            ]
        )


def convert(
    input: Sequence[str],
    output: str,
    vocab: Optional[str] = None,
    source: Optional[str] = None,
    target: str = NATIVE,
    sequence_length: Optional[int] = None,
    mask_tokens: Optional[int] = None,
    samples_per_shard: int = 262144,
    progress: bool = True,
) -> Conversion:
    """Makes the data set `output` from the files `input` (paths, globs, folders of the hub's layout): train-*.h5 and
    vocab.txt.

    `source` is one of FORMATS, by default what each file is found to be; `target` is "native" or "nvidia". `vocab` is
    the vocabulary that the samples were made with; only shards of this project know their own. Samples stay in the
    order of the files, sorted by name. Raises InputError, and writes nothing, for anything that cannot be used, naming
    the file and sample; OSError when the disk is full.
    """
    check_options(source, target, sequence_length, mask_tokens, samples_per_shard)
    files = find_files(input, source)
    kinds = tuple(sorted({kind for kind, _ in files}))
    check_direction(kinds, target, vocab)
    if not moving(output):
        check_output(output, vocab)
    words = None if vocab is None else read_vocab(vocab)
    vocab_size, infos = open_hdf5(files, words)
    if mask_tokens is None and "hub" in kinds:
        mask_tokens = largest_mask_count(
            [path for kind, path in files if kind == "hub"],
            lambda paths: tqdm(paths, unit="file", desc="masked tokens", disable=not progress),
        )

    options = {
        "command": "data.convert",
        "input": [os.path.realpath(path) for _, path in files],
        "to": target,
        "vocabulary": vocab_sha256(words or []),
        "chunks of a group": 1,
    }
    arguments = {
        "from": kinds,
        "sequence length": sequence_length,
        "mask tokens": mask_tokens,
        "samples": samples_per_shard,
    }
    arguments = json.loads(json.dumps(arguments))
    size = sum(os.path.getsize(path) for _, path in files)
    with open_staging(output, options) as staging, tqdm(
        total=size, unit="B", unit_scale=True, desc="samples", disable=not progress
    ) as bar:
        if staging.report is not None:  # a run that was killed as it ended had done all
            staging.remove()
            if staging.report["arguments"] != arguments:
                check_output(output, vocab)
            return Conversion(**dict(staging.report["result"], output=output))
        try:
            result = write_files(
                read_files(files, infos, vocab_size, mask_tokens, words, bar),
                staging,
                output,
                files,
                words,
                vocab_size,
                target,
                sequence_length,
                mask_tokens,
                samples_per_shard,
            )
        except OSError:
            staging.remove()
            raise
        staging.publish({"arguments": arguments, "result": asdict(result)})
    return result


def write_files(
    blocks: Iterator[Tuple[Samples, str, int]],
    staging: Staging,
    output: str,
    files: Sequence[Tuple[str, str]],
    words: Optional[Sequence[str]],
    vocab_size: int,
    target: str,
    sequence_length: Optional[int],
    mask_tokens: Optional[int],
    samples_per_shard: int,
) -> Conversion:
    for name in os.listdir(staging.data):  # of a run that was killed: its input may have been another
        os.remove(os.path.join(staging.data, name))
    head = next(blocks, None)
    if head is None:
        raise InputError(f"{', '.join((path for _, path in files))}: no samples")
    result = Conversion(
        output,
        tuple(sorted({kind for kind, _ in files})),
        sequence_length or head[0].input_ids.shape[1],
        mask_tokens or head[0].mlm_positions.shape[1],
    )
    fitted = (
        fit_samples(samples, result.sequence_length, result.mask_tokens, path, first)
        for samples, path, first in chain([head], blocks)
    )
    if words is not None:
        write_tokenizer_files(staging.data, words)
    # The names of a few files only: an attribute has room for 64 KB.
    made_by = {
        "command": "data.convert",
        "input": [os.path.basename(path) for _, path in files[:NAMED_FILES]],
        "input_files": len(files),
        "from": result.formats,
    }
    for parts in shard_parts(fitted, samples_per_shard):
        path = os.path.join(staging.data, SHARD_NAME % result.shards)
        if target == NATIVE:
            write_shard(path, Samples.concatenate(parts), vocab_size, vocab_sha256(words), made_by)
        else:
            write_nvidia(path, parts)
        result.count(parts)
    return result


def check_options(source, target, sequence_length, mask_tokens, samples_per_shard) -> None:
    for name, value, good, expected in [
        ("--from", source, source is None or source in FORMATS, " or ".join(FORMATS)),
        ("--to", target, target in TARGETS, " or ".join(TARGETS)),
        (
            "--sequence-length",
            sequence_length,
            sequence_length is None or 8 <= sequence_length <= 65535,
            "8 to 65535 tokens",
        ),
        ("--mask-tokens", mask_tokens, mask_tokens is None or 1 <= mask_tokens <= 65535, "1 to 65535"),
        ("--samples-per-shard", samples_per_shard, samples_per_shard >= 1, "1 or more"),
    ]:
        if not good:
            raise InputError(f"{name} is {value}, expected {expected}")


def check_direction(kinds: Sequence[str], target: str, vocab: Optional[str]) -> None:
    if NATIVE in kinds and (target == NATIVE or len(kinds) > 1):
        raise InputError(
            "the input holds shards of this project. Convert them alone, with --to nvidia; training reads them as "
            "they are"
        )
    if NATIVE not in kinds and vocab is None:
        raise InputError(
            "--vocab is missing: the samples hold ids only. Give the vocab.txt that they were made with, such as "
            "bert-base-uncased's"
        )


def find_files(patterns: Sequence[str], source: Optional[str]) -> List[Tuple[str, str]]:
    """(format, path) of every file that paths, globs and folders name, in the order of reading."""
    paths = [name for path in expand(patterns) for name in table_files(path)]
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file")
    return [(source or recognise(path), path) for path in paths]


def recognise(path: str) -> str:
    """One of FORMATS, or "native", by what is in the file. Raises InputError for something else."""
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


def open_hdf5(files: Sequence[Tuple[str, str]], words: Optional[Sequence[str]]) -> Tuple[int, Dict[str, ShardInfo]]:
    """The vocabulary's size, and path -> what is known of it for the HDF5 files."""
    own = open_shards([path for _, path in files]) if files[0][0] == NATIVE else []
    for shard in own:
        if shard.masking != "static":
            raise InputError(
                f"{shard.path}: its masking is {shard.masking}: nothing is masked yet, and NVIDIA's layout "
                "needs masked samples. Prepare the text with --masking static"
            )
        if words is not None and vocab_sha256(words) != shard.vocab_sha256:
            raise InputError(
                f"{shard.path}: was made with another vocabulary than --vocab. Leave --vocab out, or give the "
                "vocab.txt beside the shards"
            )
    vocab_size = own[0].vocab_size if own else len(words)
    foreign = [open_nvidia(path, vocab_size) for kind, path in files if kind == "nvidia"]
    return vocab_size, {info.path: info for info in own + foreign}


def read_files(
    files: Sequence[Tuple[str, str]],
    infos: Dict[str, ShardInfo],
    vocab_size: int,
    mask_tokens: Optional[int],
    words: Optional[Sequence[str]],
    bar: tqdm,
) -> Iterator[Tuple[Samples, str, int]]:
    """Yields (samples, their file, the index of the first of them in it), and moves the bar on by bytes."""
    cls_id = None if words is None else words.index("[CLS]")
    for kind, path in files:
        before, first = bar.n, 0
        blocks = read_hdf5(kind, infos[path]) if path in infos else read_arrays(kind, path, vocab_size, mask_tokens)
        for samples, place in blocks:
            if cls_id is not None:
                check_begins(samples, cls_id, path, first)
            yield samples, path, first
            first += len(samples)
            bar.update(before + place - bar.n)
        bar.update(before + os.path.getsize(path) - bar.n)


def read_arrays(kind: str, path: str, vocab_size: int, mask_tokens: Optional[int]) -> Iterator[Tuple[Samples, int]]:
    reader = {
        "tfrecord": read_plain,
        "packed-tfrecord": read_packed,
        "hub": partial(read_hub, mask_tokens=mask_tokens),
    }[kind]
    first = 0
    for arrays, place in reader(path):
        samples = to_samples(arrays, vocab_size, path, first)
        if len(samples):
            yield samples, place
        first += len(samples)


def read_hdf5(kind: str, info: ShardInfo) -> Iterator[Tuple[Samples, int]]:
    for start in range(0, info.num_samples, BLOCK):
        stop = min(start + BLOCK, info.num_samples)
        if kind == "nvidia":
            samples = read_nvidia(info.path, start, stop, info.vocab_size)
        else:
            samples = read_samples(info.path, start, stop)
            check_samples(samples, info.vocab_size, info.path, start)
        yield samples, info.file_size * stop // info.num_samples


def check_begins(samples: Samples, cls_id: int, path: str, first: int) -> None:
    good = samples.input_ids[:, 0] == cls_id
    if not good.all():
        bad = int(np.argmin(good))
        raise InputError(
            f"{path}: sample {first + bad} begins with id {samples.input_ids[bad, 0]}, expected {cls_id}, "
            "[CLS]. Is --vocab the vocabulary that the samples were made with?"
        )


def shard_parts(blocks: Iterable[Samples], limit: int) -> Iterator[List[Samples]]:
    """The samples in the same order, in lists of `limit` samples but for the last."""
    parts, held = [], 0
    for block in blocks:
        while held + len(block) >= limit:
            parts.append(block.take(slice(0, limit - held)))
            block = block.take(slice(limit - held, None))
            yield parts
            parts, held = [], 0
        if len(block):
            parts.append(block)
            held += len(block)
    if parts:
        yield parts


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Converts samples that others made into shards to train on, token for token; or shards into NVIDIA's files."
        ),
        epilog="""examples:
  # the hub's Graphcore/wikipedia-bert-128, downloaded: parquet files, or the folder that datasets' save_to_disk wrote
  python -m data.convert --input 'wikipedia-bert-128/*.parquet' --vocab vocab.txt --mask-tokens 20 --output
  shards/wikipedia-128/

  # Google's or Graphcore's TFRecord, plain or packed
  python -m data.convert --input 'tfrecords/*.tfrecord' --vocab vocab.txt --mask-tokens 20 --output shards/own/

  # NVIDIA's HDF5 (training reads it as it is, too, but more slowly), and back
  python -m data.convert --input 'hdf5_lower_case_1_seq_len_128/*.hdf5' --vocab vocab.txt --output shards/nvidia-128/
  python -m data.convert --to nvidia --input 'shards/own/train-*.h5' --output for-nvidia/

The output folder gets train-00000.h5 and so on, in the order of the input, and with --vocab also vocab.txt,
tokenizer.json and tokenizer_config.json.""",
    )
    option = parser.add_argument
    option(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, globs in quotes, or folders of parquet or Arrow files",
    )
    option("--output", required=True, metavar="FOLDER", help="the folder to make; one that holds a data set is refused")
    option(
        "--from",
        dest="source",
        choices=FORMATS,
        help="the format of the input (default: what each file is found to be)",
    )
    option(
        "--to",
        dest="target",
        choices=TARGETS,
        default=NATIVE,
        help="native (default): this project's shards. nvidia: HDF5 as NVIDIA's BERT reads it",
    )
    option(
        "--vocab",
        metavar="FILE",
        help="the vocab.txt that the samples were made with; shards of this project need none",
    )
    option("--sequence-length", type=int, help="token slots of a sample (default: the input's)")
    option(
        "--mask-tokens",
        type=int,
        help="mask slots of a sample (default: the input's; for parquet and Arrow the most that a "
        "sample has, for which the labels are read once before)",
    )
    option(
        "--samples-per-shard",
        type=int,
        default=262144,
        help="samples of a file (default 262144; one is held in memory)",
    )
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status: 0, 2 for input that cannot be used, 1 when it stopped, 130 when
    interrupted."""
    options: Dict = vars(make_parser().parse_args(arguments))
    try:
        print(convert(**options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"stopped: {error}; the same command begins anew", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {options['output']} was not made; the same command begins anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
