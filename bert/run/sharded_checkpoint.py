"""Checkpoints of runs whose processes each hold a part: written in parallel, while training goes on, by
torch.distributed.checkpoint; and the whole model made of one.

weights/, optimizer/    shards in safetensors, a file of each process
model.safetensors       the weights as one file, in the last checkpoint of a run that is done
"""

import concurrent.futures
import datetime
import json
import logging
import os
from typing import Any, Dict, Mapping, Optional

import torch
import torch.distributed as dist

from bert.engines.parallel.processes import Processes, failing_together
from bert.run.checkpoint import begin_checkpoint, complete_checkpoint, open_tensors
from bert.run.shards import Shards, Tensors, count_values
from data.files import replacing
from data.tokenizer import Vocabulary

__all__ = ["SavesInBackground", "write_model"]

logger = logging.getLogger(__name__)


class SavesInBackground:
    """Writes checkpoints of all processes of a run. They call its methods at the same places.

    `saved_step` is the step of the newest checkpoint.
    """

    def __init__(self, processes: Processes, timeout: float, saved_step: int):
        self.processes, self.saved_step = processes, saved_step
        # Of its own, so that its messages do not meet those of the training.
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.saving: Optional[concurrent.futures.Future] = None
        self.place = ""

    def start(
        self,
        folder: str,
        state: Dict,
        weights: Tensors,
        optimizer_state: Tensors,
        model: Dict,
        vocabulary: Vocabulary,
        keep: int,
    ) -> None:
        """Begins what `save_checkpoint` does, for tensors of which this process holds a part or which only some have.
        They are copied to the CPU before it returns. The folder is the first process's, on a disk that all see.

        Waits for the save before, and raises what `wait` raises.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.wait()
        parts = {"weights": weights, "optimizer": optimizer_state}
        contiguous = {
            part: {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }
        copies = DefaultStager(StagingOptions(False, False, False, False)).stage(contiguous)
        self.place = f"{folder}: the checkpoint of step {state['step']}"
        self.saving = self.thread.submit(self.save, folder, state, copies, model, vocabulary, keep)

    def save(self, folder: str, state: Dict, parts: Any, model: Dict, vocabulary: Vocabulary, keep: int) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
        from torch.distributed.checkpoint.utils import _DistWrapper

        processes = _DistWrapper(self.group, True, 0)
        temporary = processes.broadcast("begin", lambda: begin_checkpoint(folder, state["step"]))
        written = {}
        for part, tensors in parts.items():
            writer = HuggingFaceStorageWriter(os.path.join(temporary, part), save_distributed=True)
            written[part] = save(tensors, storage_writer=writer, process_group=self.group).state_dict_metadata

        def complete() -> str:
            shards = [f"{part}/{name}" for part in parts for name in sorted(os.listdir(os.path.join(temporary, part)))]
            for part in parts:
                check_all_there(os.path.join(temporary, part), written[part])
            path = complete_checkpoint(temporary, {**state, "shards": shards}, model, vocabulary, keep)
            self.saved_step = state["step"]  # even if another process is lost before it hears of it
            logger.info("saved %s", path)
            return path

        processes.broadcast("complete", complete)
        self.saved_step = state["step"]

    def wait(self) -> None:
        """Waits until the save that was begun is done, if one was.

        Raises in all processes what failed in one of them: OSError where a file could not be written, ProcessLost for a
        process that has ended or hangs.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        with failing_together(), self.processes.naming_who_is_lost():
            try:
                saving.result()
            except CheckpointException as error:
                rank, (reason, _) = next(iter(error.failures.items()))
                raise OSError(
                    f"{self.place} cannot be written, says process {rank}: {reason}. Make room there, or move the run "
                    "and name its new folder in --training.output, and start again with --resume auto"
                )

    def end(self) -> None:
        """Waits for it, whatever it comes to: where a run ends for another reason."""
        if self.saving is not None:
            concurrent.futures.wait([self.saving])


def check_all_there(folder: str, written: Mapping) -> None:
    """Raises OSError where shards that were written are not in the folder, as this process sees it."""
    found, expected = count_values(Shards(folder).tensors), count_values(written)
    for name in expected:
        if found.get(name) != expected[name]:
            raise OSError(
                f"{folder}: has {found.get(name, 0)} values of {name}, expected {expected[name]}. Are other machines' "
                "processes writing to another disk? training.output must be on one that all machines see"
            )


def write_model(checkpoint: str, path: str) -> None:
    """Writes the weights of a checkpoint as one safetensors file, with one of its tensors in memory at a time. The file
    appears whole or not at all."""
    source = open_tensors(checkpoint, "model.safetensors", "weights")
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in source.shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in source.shapes.items():
            tensors = source.read({name: torch.empty(()).expand(shape)}, torch.float32)
            file.write(tensors[name].numpy().data)
