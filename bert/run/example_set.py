"""The data of a run that learns from labelled examples: read from files, scored as the task says."""

import importlib.util
import json
import os
from typing import Any, Dict, List, Optional

import numpy as np
from tqdm import tqdm

from bert.config import Config
from bert.engines import Engine, has_static_shapes, local_parts
from bert.engines.parallel.processes import current
from bert.geometry import packing_of, samples_per_row
from bert.run.console import bar_width
from bert.run.extending import find_branch
from bert.run.state import RunState
from bert.tasks import ExampleTask
from data.errors import InputError
from data.examples.examples import LABELS, Examples, ranges
from data.examples.loader import ExampleLoader, batches_to_score
from data.examples.records import existing
from data.files import replacing
from data.loading.sharing import LocalRanks
from data.rows import Part
from data.tokenizer import Vocabulary, read_vocab, vocab_sha256

__all__ = ["ExampleSet", "HeldOut"]

EVALUATED = 256  # examples at a time, of each process


class HeldOut:
    """Labelled examples to score a model on. Raises InputError, too, where a library that scores them is missing, or
    nothing of that name is scored."""

    def __init__(self, config: Config, task: ExampleTask, device: str, vocabulary: Vocabulary, files: List[str]):
        static = has_static_shapes(device)
        self.task, self.packing = task, packing_of(config.data, static)
        self.shape = task.row_shape(config.data, samples_per_row(config.data, static))
        self.examples = task.read(files, vocabulary, config.data)
        self.counts = self.examples.counts if task.output_slots == LABELS.weights else self.examples.lengths
        self.outputs = np.zeros((int(self.counts.sum()), task.output_size), np.float32)
        scores = task.score(self.examples, self.outputs)
        known = [name for name in scores if not name.endswith("_thresh")]
        if task.selected_by not in known:
            raise InputError(f'task.metric is "{task.selected_by}", expected one of {", ".join(known)}')

    def evaluate(self, engine: Engine, part: Part) -> Dict[str, Any]:
        """What the task scores of the engine's weights; the same in all processes."""
        starts, count = np.cumsum(self.counts) - self.counts, len(self.examples)
        outputs, quiet = np.zeros_like(self.outputs), True if engine.rank else None
        with tqdm(total=count, desc="evaluating", disable=quiet, leave=False, ncols=bar_width()) as bar:
            for batch in batches_to_score(self.examples, self.shape, EVALUATED * part.size, self.packing, part):
                found = engine.predict(batch.arrays)
                if len(found):  # in a pipeline the last process has them all
                    outputs[ranges(starts[batch.examples], self.counts[batch.examples])] = found
                bar.update(len(batch.examples) * part.size)
        processes = current()
        self.outputs = processes.sum_array(outputs) if processes else outputs
        return {"step": engine.steps_done, "samples": count, **self.task.score(self.examples, self.outputs)}

    def report(self, folder: str) -> None:
        """predictions.jsonl, a line for each example, and predictions.png, of the last evaluation."""
        path = os.path.join(folder, "predictions.jsonl")
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for line in self.task.predictions(self.examples, self.outputs):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if importlib.util.find_spec("matplotlib"):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(5, 4), layout="constrained")
            self.task.draw(self.examples, self.outputs, figure.subplots())
            with replacing(os.path.join(folder, "predictions.png")) as temporary:
                figure.savefig(temporary, dpi=110, format="png")


class ExampleSet:
    """Labelled examples: a DataSet (bert/run/data_set.py). Raises InputError for files that cannot be learned from, and
    where no vocabulary is named."""

    def __init__(self, config: Config, task: ExampleTask, device: str):
        data, folder = config.data, config.data.vocab or config.training.start_from or find_branch(config)
        if not folder:
            raise InputError(
                "training.start_from is null, expected the folder of a BERT (--model FOLDER), or data.vocab"
            )
        self.vocabulary = read_vocab(folder)
        self.skipped: Dict[str, str] = {}
        self.longest = data.sequence_length
        if len(self.vocabulary) > config.model.vocab_size:
            sizes = f"has {len(self.vocabulary)} tokens, model.vocab_size is {config.model.vocab_size}"
            raise InputError(f"{folder}: {sizes}. Set model.vocab_size to {len(self.vocabulary)}")
        static = has_static_shapes(device)
        self.packing = packing_of(data, static)
        self.shape = task.row_shape(data, samples_per_row(data, static))
        self.files, self.held_out_files = existing(data.files), existing(data.held_out_files)
        if not self.files:
            raise InputError("data.files is empty, expected the files to train on: --data.files train.tsv")
        both = set(map(os.path.realpath, self.files)) & set(map(os.path.realpath, self.held_out_files))
        if both:
            raise InputError(f"{sorted(both)[0]}: is named by data.files and by data.held_out_files, expected by one")
        self.train = task.read(self.files, self.vocabulary, data)
        self.held_out: Optional[HeldOut] = None
        if self.held_out_files:
            self.held_out = HeldOut(config, task, device, self.vocabulary, self.held_out_files)

    @property
    def samples(self) -> int:
        return len(self.train)

    def identity(self) -> Dict:
        vocabulary, name = self.vocabulary, ", ".join(map(os.path.basename, self.files))
        tokens = vocab_sha256(vocabulary.tokens)
        return {"shards": [[name, len(self.train)]], "vocab_sha256": tokens, "tokenizer": vocabulary.rules}

    def facts(self) -> Dict[str, Any]:
        return {f"bytes of {os.path.basename(p)}": os.path.getsize(p) for p in self.files + self.held_out_files}

    def describe(self) -> str:
        held_out = f", {self.of(self.held_out.examples)} held out" if self.held_out else ""
        return f"{self.of(self.train)}{held_out}"

    def of(self, examples: Examples) -> str:
        cut = f" ({examples.cut:,} cut to {self.longest} tokens)" if examples.cut else ""
        return f"{len(examples):,} examples{cut}"

    def open_loader(self, config: Config, state: RunState, device: str, local: LocalRanks) -> ExampleLoader:
        training, (parts, rank) = config.training, local_parts(config, device)
        batches = training.global_batch_size, training.seed, self.packing
        return ExampleLoader(self.train, self.shape, *batches, state.position, parts[rank])

    def evaluate(self, config: Config, engine: Engine, part: Part) -> Dict[str, Any]:
        assert self.held_out is not None
        return self.held_out.evaluate(engine, part)

    def report(self, folder: str) -> None:
        assert self.held_out is not None
        self.held_out.report(folder)
