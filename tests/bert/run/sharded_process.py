"""One of several processes that save and load what each holds a part of.

    python sharded_process.py run STEP [options of run_pretraining.py]

trains, and the last process gets SIGTERM in this step.

    python sharded_process.py WHOLE FOLDER      (one of three)

WHOLE is a checkpoint of one process. FOLDER gets checkpoints of the same tensors: step 1 with each cut into three, step
2 with those of a stage in each process. Then one process cannot write, and at last one is killed as it writes.
<rank>.json says what came of it.
"""

import errno
import json
import os
import signal
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)))

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import bert.signals
from bert.engines.parallel.processes import current, joined
from bert.engines.torch_engine import TorchEngine
from bert.errors import ProcessLost
from bert.run.checkpoint import load_optimizer_state, load_weights, read_safetensors
from bert.run.sharded_checkpoint import SavesInBackground
from data.files import read_json
from data.tokenizer import read_vocab
from run_pretraining import main as train

TIED = "bert.embeddings.word_embeddings.weight"


def cut(tensors, ranks):
    """The part of this process; of an optimizer's state, what is not as its parameter is stays whole."""
    mesh = DeviceMesh("cpu", list(ranks))
    return {
        name: tensor
        if name.endswith((".step", ".count"))
        else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        for name, tensor in tensors.items()
    }


def of_stage(tensors, rank):
    """Every third, and the tied embedding in the first and the last."""
    return {
        name: tensor
        for i, (name, tensor) in enumerate(sorted(tensors.items()))
        if (rank != 1 if name == TIED else i % 3 == rank)
    }


def equal(tensors, others):
    parts = [[t.to_local() if hasattr(t, "to_local") else t for t in side.values()] for side in (tensors, others)]
    alike = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*parts))
    return tensors.keys() == others.keys() and alike


def fails_in(rank, failure):
    write = HuggingFaceStorageWriter.write_data

    def failing(*arguments):
        if current().rank == rank:
            failure()
        return write(*arguments)

    HuggingFaceStorageWriter.write_data = failing
    return write


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(step, *words):
    passes = TorchEngine.passes

    def stopped(self, *arguments):
        if self.rank == self.world_size - 1 and self.steps_done + 1 == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return passes(self, *arguments)

    TorchEngine.passes = stopped
    sys.exit(train(words))


def main(whole, folder):
    files = [os.path.join(whole, f"{part}.safetensors") for part in ("model", "optimizer")]
    weights, state = map(read_safetensors, files)
    begun = read_json(os.path.join(whole, "training_state.json"))
    others = read_json(os.path.join(whole, "config.json")), read_vocab(os.path.join(whole, "vocab.txt")), 9
    bert.signals.LINGER = 0  # nobody ends those that leave quietly
    with joined("cpu", 10):
        rank = current().rank
        saves = SavesInBackground(current(), 10, 0)
        said = {}

        parts, state_parts = (cut(read_safetensors(file), range(3)) for file in files)
        saves.start(folder, {**begun, "step": 1}, parts, state_parts, *others)
        for tensor in [*parts.values(), *state_parts.values()]:
            tensor.zero_()  # as training goes on
        saves.start(folder, {**begun, "step": 2}, of_stage(weights, rank), of_stage(state, rank), *others)
        saves.wait()
        said["saved"] = saves.saved_step

        for path in (whole, *(os.path.join(folder, f"step_{step:08}") for step in (1, 2))):
            for ranks in (range(3), range(2)):
                expected = cut(weights, ranks) if rank in ranks else {}
                if expected:
                    loaded = load_weights(path, expected), load_optimizer_state(path, expected)
                    said[f"{os.path.basename(path)} {ranks}"] = [
                        equal(expected, {name: loaded[0][name] for name in expected}),
                        equal(cut(state, ranks), {name: loaded[1][name] for name in state}),
                    ]
            stage = of_stage(weights, rank)
            loaded = load_weights(path, stage)
            said[f"{os.path.basename(path)} stage"] = [equal(stage, {name: loaded[name] for name in stage})]

        write = fails_in(1, disk_is_full)
        saves.start(folder, {**begun, "step": 3}, weights, state, *others)
        try:
            saves.wait()
        except (OSError, SystemExit) as error:
            said["full"] = [type(error).__name__, str(error)]

        HuggingFaceStorageWriter.write_data = write
        fails_in(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        saves.start(folder, {**begun, "step": 4}, weights, state, *others)
        try:
            saves.wait()
        except ProcessLost as error:
            said["killed"] = str(error)
        with open(os.path.join(folder, f"{rank}.json"), "w") as file:
            json.dump(said, file)
        os._exit(0)  # the group is broken


if __name__ == "__main__":
    run(*sys.argv[2:]) if sys.argv[1] == "run" else main(*sys.argv[1:])
