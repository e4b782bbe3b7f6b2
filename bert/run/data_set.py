"""The data of a run: its shards, made from text where they are not there yet, their vocabulary, its loader."""

import contextlib
import glob
import json
import logging
import os
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Protocol

import h5py
import numpy as np

from bert.config import Config, DataConfig
from bert.engines import Engine, has_static_shapes, local_parts
from bert.engines.parallel.processes import current
from bert.geometry import packing_of
from bert.run.evaluation import evaluate
from bert.run.state import RunState
from bert.tasks import ShardTask
from data.errors import InputError
from data.loading.loader import GlobalBatch, Loader, LoaderSettings, batches_in_order
from data.loading.shard_files import open_shards
from data.loading.sharing import LocalRanks, can_share, connect, listen
from data.prepare import prepare
from data.preparing.finding import find_files
from data.preparing.options import PrepareOptions
from data.preparing.remote import base_name
from data.rows import Part
from data.shards import ShardInfo
from data.subprocesses import usable_cpus
from data.tokenizer import FLAGS, Vocabulary, claims_of, find_vocab, flag_of, vocab_sha256

__all__ = ["BatchSource", "DataSet", "ShardSet", "make_shards_from_text", "next_batch", "open_shard_set"]
__all__ += ["sharing_loader"]

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """What the training loop takes batches from."""

    def next(self) -> GlobalBatch:
        """The next global batch, or this process's part of it. Its arrays are valid until the following call."""

    def check(self) -> None:
        """Raises what `next` would, where that is known already."""

    def __enter__(self) -> "BatchSource": ...

    def __exit__(self, *exception: Any) -> None: ...


class DataSet(Protocol):
    """What a run learns from and is evaluated on, checked against the config."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def skipped(self) -> Dict[str, str]:
        """Files that are left out, and why."""

    @property
    def samples(self) -> int:
        """To train on."""

    def identity(self) -> Dict:
        """What a resumed run must find again: "shards", "vocab_sha256", "tokenizer"."""

    def facts(self) -> Dict[str, Any]:
        """What all processes of a run must have alike beside its identity."""

    def describe(self) -> str:
        """For people: the samples, and where they are."""

    def open_loader(self, config: Config, state: RunState, device: str, local: LocalRanks) -> BatchSource:
        """This process's part of the global batches, from where `state` is."""

    def evaluate(self, config: Config, engine: Engine, part: Part) -> Dict[str, Any]:
        """The line of held_out.jsonl for the engine's weights; the same in all processes."""

    def report(self, folder: str) -> None:
        """Writes what the last evaluation found, beyond that line, into a folder."""


class ShardSet(NamedTuple):
    """Shards: a DataSet."""

    shards: List[ShardInfo]
    held_out: List[ShardInfo]
    vocabulary: Vocabulary
    skipped: Dict[str, str]

    @property
    def samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def identity(self) -> Dict:
        sizes = [[os.path.basename(shard.path), shard.num_samples] for shard in self.shards]
        vocabulary = self.vocabulary
        return {"shards": sizes, "vocab_sha256": vocab_sha256(vocabulary.tokens), "tokenizer": vocabulary.rules}

    def facts(self) -> Dict[str, Any]:
        sizes = {f"bytes of {os.path.basename(shard.path)}": shard.file_size for shard in self.shards}
        for shard in self.held_out:
            sizes[f"bytes of {os.path.basename(shard.path)} (held out)"] = shard.file_size
        return sizes

    def describe(self) -> str:
        return f"{self.samples} samples in {len(self.shards)} shards"

    def open_loader(self, config: Config, state: RunState, device: str, local: LocalRanks) -> Loader:
        data, training = config.data, config.training
        settings = LoaderSettings(
            batch_size=training.global_batch_size,
            seed=training.seed,
            packing=packing_of(data, has_static_shapes(device)),
            samples_per_row=data.samples_per_row,
            skip_bad=data.on_bad_shard == "skip",
            workers=min(data.workers, usable_cpus()),
        )
        timeout = config.parallel.timeout if current() else None
        return Loader(self.shards, settings, state.position, state.skipped, local, timeout)

    def evaluate(self, config: Config, engine: Engine, part: Part) -> Dict[str, Any]:
        return evaluate(config, engine, part)

    def report(self, folder: str) -> None:
        """Nothing: the line says it all."""


def make_shards_from_text(config: Config) -> None:
    """Makes the shards from data.text where data.files match nothing yet."""
    data = config.data
    count = sum(len(glob.glob(pattern)) for pattern in data.files)
    if count:
        if data.text:
            check_made_of(data)
            logger.info("data.text is not read: data.files has %d shards already", count)
        return
    folder = os.path.dirname(data.files[0]) if data.files else ""
    if not data.text:
        named = ", ".join(repr(pattern) for pattern in data.files) or "anything: it is empty"
        output = folder if folder and not glob.has_magic(folder) else "shards"
        raise InputError(
            f"data.files: no file matches {named}. Make the shards from text, one sentence or paragraph a line, a "
            "blank line between documents; in the project's folder:\n"
            f"  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length "
            f"{data.sequence_length} --mask-tokens {data.mask_tokens} --output {output}/\n"
            f"(without --vocab it trains one of --vocab-size {config.model.vocab_size}), or name shards with "
            "--data.files"
        )
    if not folder or os.path.basename(data.files[0]) != "train-*.h5" or len(data.files) != 1:
        raise InputError(
            f"data.files is {json.dumps(data.files)}, expected one pattern FOLDER/train-*.h5, which says where the "
            "shards made from data.text go"
        )
    start = config.training.start_from
    try:
        summary = prepare(
            PrepareOptions(
                input=list(data.text),
                output=folder,
                format=data.text_format,
                text_field=data.text_field,
                encoding=data.encoding,
                vocab=data.vocab or start,
                vocab_size=config.model.vocab_size,
                lowercase=data.lowercase,
                strip_accents=data.strip_accents,
                chinese_characters=data.chinese_characters,
                normalization=data.normalization,
                sequence_length=data.sequence_length,
                mask_tokens=data.mask_tokens,
                nsp=config.task.nsp and config.task.name != "mlm",
                duplicates=data.duplicates,
                held_out=data.held_out,
                seed=config.training.seed,
            )
        )
    except InputError as error:
        raise InputError(f"data.text: {with_settings(str(error))}")
    logger.info("%s", with_settings(str(summary)))


def check_made_of(data: DataConfig) -> None:
    """Raises InputError where the shards that are there say that they were made of other files than data.text names."""
    path = next(path for pattern in data.files for path in sorted(glob.glob(pattern)))
    try:
        with h5py.File(path, "r") as file:
            made_by = json.loads(file.attrs["made_by"])
        made_of = made_by["input"], made_by["input_files"]
        named = [base_name(name) for name in find_files(data.text)]
    except (OSError, KeyError, ValueError):  # no shard of ours, or its text is there no more
        return
    if made_of != (named[: len(made_of[0])], len(named)):
        raise InputError(
            f"{path}: was made of {', '.join(made_of[0][:3])}, and data.text names {', '.join(named[:3])}. Name "
            "another folder for the shards of this text, with --data.files 'FOLDER/train-*.h5', or leave data.text out"
        )


def with_settings(message: str) -> str:
    """What `data.prepare` says, with the settings of a config in place of its options."""
    names = {
        "--format": "text_format",
        "--text-field": "text_field",
        "--encoding": "encoding",
        "--held-out": "held_out",
    }
    names.update({flag_of(name, value): f"{name} {str(value).lower()}" for name in FLAGS for value in (False, True)})
    for flag, setting in names.items():
        message = re.sub(rf"{flag}(?![\w-])", f"--data.{setting}", message)
    return message


def open_shard_set(config: Config, task: ShardTask) -> ShardSet:
    """Opens the shards. Raises InputError where they do not fit the config, the task or each other; held-out samples
    are checked one by one."""
    data = config.data
    expected = (data.sequence_length, data.mask_tokens, config.model.vocab_size)
    skipped: Dict[str, str] = {}
    shards = open_shards(data.files, *expected, skipped=skipped if data.on_bad_shard == "skip" else None)
    held_out = open_shards(data.held_out_files, *expected) if data.held_out_files else []
    said = claims_of(data, lambda name, value: f"data.{name} {json.dumps(value)}")
    vocabulary, path = find_vocab(data.vocab, [*shards, *held_out], "--data.vocab", said)
    if len(vocabulary) > config.model.vocab_size:
        sizes = f"has {len(vocabulary)} tokens, model.vocab_size is {config.model.vocab_size}"
        raise InputError(f"{path}: {sizes}. Set model.vocab_size to {len(vocabulary)}")
    task.check_shards(shards)
    if held_out:
        task.check_shards(held_out)
        both = {os.path.realpath(shard.path) for shard in shards} & {os.path.realpath(shard.path) for shard in held_out}
        if both:
            raise InputError(
                f"{sorted(both)[0]}: is named by data.files and by data.held_out_files; expected different files: "
                "--data.files '.../train-*.h5' and --data.held_out_files '.../held_out-*.h5'"
            )
        for _ in batches_in_order(held_out, 4096):
            pass
    return ShardSet(shards, held_out, vocabulary, skipped)


@contextlib.contextmanager
def sharing_loader(config: Config, device: str) -> Iterator[LocalRanks]:
    """The processes of this machine, which share one loader: open it inside.

    To be entered before anything that one of them may fail at: leaving it, whether the loader is open or not, tells the
    others that wait for it. Raises ProcessLost and LoaderDied where the first of them has ended.
    """
    parts, rank = local_parts(config, device)
    processes = current()
    if processes is None or len(parts) == 1 or not can_share():
        yield LocalRanks(parts[rank : rank + 1])
        return
    key = f"loader of process {processes.rank - rank}"
    if rank == 0:
        endpoint, address = listen()
        processes.set(key, address)
    else:
        endpoint = connect(processes.wait_for(key), rank)
    with endpoint:
        yield LocalRanks(parts, rank, endpoint)


def next_batch(loader: BatchSource, count: int) -> GlobalBatch:
    """The next `count` global batches, or this process's part of each, one after the other in one."""
    if count == 1:
        return loader.next()
    arrays, counts, rows, samples = [], [], 0, 0
    for _ in range(count):
        batch = loader.next()
        # The loader takes its memory back with the next batch.
        arrays.append({name: array.copy() for name, array in batch.arrays.items()})
        counts.append(batch.counts)
        rows, samples = rows + batch.rows, samples + batch.samples
    together = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    sums = {name: sum(part[name] for part in counts) for name in counts[0]}
    return GlobalBatch(together, rows, sums, batch.position, batch.skipped, samples)
