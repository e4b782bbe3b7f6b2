"""Optimizers of DTensors in two and three processes, beside the same optimizers of whole parameters.

Three processes run all of it; where there are two, the third waits. Each checks what it has itself.
"""

import dataclasses
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing import start_processes
from torch.nn import Parameter

from bert.config import OptimizerConfig
from bert.optimizers import make_optimizer
from ops.shards import local_part

NAMES = ["lamb", "adamw", "muon", "lion"]
SHAPES = {  # cut unevenly; in three some have nothing of the last ones, and in two or three the slices are cut
    "bert.embeddings.word_embeddings.weight": (15, 6),
    "bert.encoder.layer.0.attention.self.query.weight": (7, 6),
    "bert.encoder.layer.0.attention.self.query.bias": (7,),
    "bert.encoder.layer.0.intermediate.dense.weight": (5, 8),
    "bert.encoder.layer.0.output.dense.weight": (1, 5),
    "bert.encoder.layer.0.output.LayerNorm.weight": (4,),
    "cls.predictions.bias": (1,),
}


def config(name):
    options = {"lamb": {"trust_ratio_slices": 5}, "adamw": {"max_grad_norm": 0.5}}.get(name, {})
    return OptimizerConfig(name=name, learning_rate=0.1, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.05, **options)


class Run:
    """The same weights twice: as DTensors on a mesh, and whole."""

    def __init__(self, name, mesh, weights):
        self.mesh, self.whole = mesh, {key: Parameter(w.clone()) for key, w in weights.items()}
        self.parts = {key: Parameter(self.cut(w)) for key, w in weights.items()}
        compute_weights = {p: p.detach().bfloat16() for p in self.parts.values()}
        self.optimizer = make_optimizer(self.parts.items(), config(name), compute_weights, self.sum_across)
        self.expected = make_optimizer(self.whole.items(), config(name))

    def cut(self, tensor):
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None)

    def sum_across(self, sums):
        dist.all_reduce(sums, group=self.mesh.get_group())

    def step(self, spoil=None):
        """With new gradients, those of the whole parameters spoiled where one process spoils its own."""
        gradients = {key: torch.randn(shape) * 10.0 ** torch.randint(-3, 2, ()) for key, shape in SHAPES.items()}
        for key, gradient in gradients.items():
            self.parts[key].grad = self.cut(gradient)
            if spoil:
                self.parts[key].grad.to_local()[-1:] *= spoil
                gradient *= float("nan")
            self.whole[key].grad = gradient
        for optimizer in (self.optimizer, self.expected):
            optimizer.step(0.1)

    def check(self):
        close = {"rtol": 1e-5, "atol": 1e-6}
        for key, part in self.parts.items():
            torch.testing.assert_close(part.detach().full_tensor(), self.whole[key].detach(), **close)
            assert torch.equal(local_part(self.optimizer.compute_weights[part]), local_part(part.detach()).bfloat16())
        states, skipped = (self.optimizer.state_dict(), self.expected.state_dict()), self.expected.skipped
        assert states[0].keys() == states[1].keys() and self.optimizer.skipped == skipped
        for key, value in states[0].items():
            if states[1][key].shape == SHAPES[key.rpartition(".")[0]]:
                assert isinstance(value, DTensor) and value.placements == (Shard(0),)
            torch.testing.assert_close(whole(value), states[1][key], **close)
        assert self.optimizer.state_bytes() == sum(local_part(v).nbytes for v in states[0].values())

    def weights(self):
        return {key: whole(part.detach()) for key, part in self.parts.items()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def draw():
    return {key: torch.randn(shape) for key, shape in SHAPES.items()}


def steps_of_two(name, mesh, folder):
    run = Run(name, mesh, draw())
    for _ in range(3):
        run.step()
        run.check()
    state = run.optimizer.state_dict()
    dcp.save(state, checkpoint_id=f"{folder}/{name}", process_group=mesh.get_group())
    weights, state = run.weights(), {key: whole(value) for key, value in state.items()}
    if mesh.get_rank() == 0:
        save_file(weights, f"{folder}/{name}/weights.safetensors")
        save_file(state, f"{folder}/{name}/state.safetensors")


def steps_of_three(name, mesh, folder):
    weights, state = [load_file(f"{folder}/{name}/{what}.safetensors") for what in ("weights", "state")]
    run = Run(name, mesh, weights)
    likes = run.optimizer.state_layout()
    read = {key: torch.empty_like(v) if isinstance(v, torch.Tensor) else torch.tensor(v) for key, v in likes.items()}
    dcp.load(read, checkpoint_id=f"{folder}/{name}")
    assert read.keys() == state.keys() and all(torch.equal(whole(read[key]), state[key]) for key in state)
    run.expected.load_state_dict(state, 7)
    for tensors in (state, read):  # whole ones, and DTensors
        run.optimizer.load_state_dict(tensors, 7)
        run.check()
    for _ in range(2):
        run.step()
        run.check()
    for rank in range(3):  # a NaN in this one alone
        before = {**run.weights(), **run.optimizer.state_dict()}
        before = {key: local_part(value).clone() for key, value in before.items()}
        run.step(spoil=float("nan") if mesh.get_rank() == rank else 1.0)
        after = {**run.weights(), **run.optimizer.state_dict()}
        assert all(torch.equal(local_part(after[key]), before[key]) for key in before)
        assert run.optimizer.skipped == 8 + rank
    run.check()
    run.step()
    run.check()


def pipeline(name, rank):
    """Parameters are whole, some in several processes, and only the norm and whether to skip are common."""

    def sum_last(sums):
        assert name == "lamb" or sums.shape == (1,)
        dist.all_reduce(sums[-1:])

    keys, all_keys = list(SHAPES)[: 3 + rank], list(SHAPES)[:5]
    holders = {key: 3 - max(0, place - 2) for place, key in enumerate(all_keys)}
    parameters, alone = [{key: Parameter(w.clone()) for key, w in draw().items() if key in keys} for _ in range(2)]
    for key in keys:
        alone[key].data.copy_(parameters[key].data)
    optimizer = make_optimizer(parameters.items(), config(name), sum_across=sum_last, holders=holders)
    expected = make_optimizer(alone.items(), dataclasses.replace(config(name), max_grad_norm=0.0))
    for step in range(3):
        gradients = {key: torch.randn(SHAPES[key]) for key in all_keys}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        for key in keys:
            alone[key].grad = gradients[key] * min(1.0, (config(name).max_grad_norm or 1e9) / float(norm))
            parameters[key].grad = gradients[key]
        if step == 1:
            parameters[keys[0]].grad.view(-1)[3] = float("inf") if rank == 1 else 0.0
        optimizer.step(0.1)
        if step != 1:
            expected.step(0.1)
        for key in keys:
            torch.testing.assert_close(parameters[key], alone[key], rtol=1e-5, atol=1e-6)
    assert optimizer.skipped == 1


def process(rank, folder, seed):
    import tests.forks.lion  # one more of OPTIMIZERS

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=3, init_method=f"file://{folder}/rendezvous")
    two, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])
    for number, name in enumerate(NAMES):
        torch.manual_seed(seed + number)
        if rank < 2:
            steps_of_two(name, two, folder)
        dist.barrier()
        torch.manual_seed(seed - number)  # the third drew nothing
        steps_of_three(name, three, folder)
        pipeline(name, rank)
    dist.destroy_process_group()


def test_sharded_parameters_become_what_whole_ones_become_and_their_state_moves(tmp_path):
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    multiprocessing.set_forkserver_preload([__name__])  # imported once for the three
    start_processes(process, (str(tmp_path), seed), nprocs=3, start_method="forkserver")


def test_sharded_parameters_need_a_sum_over_their_processes():
    class Part(Parameter):
        def to_local(self):
            return self.data

    with pytest.raises(ValueError, match="sum_across is None, expected a sum"):
        make_optimizer([("a.weight", Part(torch.ones(2, 2)))], config("adamw"))
