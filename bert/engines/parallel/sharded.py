"""Sharded state, on FSDP2: each process holds a part of each parameter, of its gradient and of the optimizer's state.

The parts are slices of the first dimension (DTensors, Shard(0)), float32. Before a layer computes, its weights are
gathered, in the type that it computes in. What happens when, in a step of several micro-batches:

    optimizer    gathered once a step (in a pipeline, once a round); gradients are kept whole, and summed into their
                 parts in the last backward pass
    full         gathered in each forward and each backward pass, layer by layer; so are gradients summed into parts
"""

import warnings
from typing import Any, Iterable, List, Mapping

import torch
import torch.distributed as dist
from torch import nn

from bert.engines.parallel.processes import Processes
from bert.engines.parallel.reduction import MicroBatches, SumAcross, Work, with_next
from bert.signals import Stop

__all__ = ["Sharded", "make_mesh", "shard"]


def make_mesh(device: str, size: int) -> Any:
    """All processes, in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (size,))


def shard(model: nn.Module, layers: Iterable[nn.Module], mesh: Any, dtype: torch.dtype, full: bool) -> List:
    """Makes the parameters of `model` DTensors over the processes of `mesh`, computes with them in `dtype`, and returns
    the modules that gather theirs together: the layers, and last the model for what is in none."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Nothing changes what a layer returns in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    modules: List = []
    for module in dict.fromkeys(layers):
        modules.append(fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=full))
    modules.append(fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False))
    for module in modules:
        # A batch's weights sum to 1 over all processes, so gradients are sums.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return modules


class Sharded:
    """`modules` are those of `shard`, and `model` the last of them."""

    sharded, gathers, static, can_redo = True, True, False, False
    holders: Mapping[str, int] = {}

    def __init__(self, processes: Processes, modules: List, full: bool):
        self.processes, self.modules, self.full = processes, modules, full
        self.sum_across: SumAcross = self.sum

    def count(self, own: int) -> int:
        return self.processes.meet(own)

    def run(self, micro_batches: MicroBatches, work: Work, training: bool) -> None:
        try:
            for (first, micro_batch), following in with_next(micro_batches):
                self.processes.meet()
                whole = training and (self.full or following is None)
                root = self.modules[-1]
                root.set_is_last_backward(whole)
                root.set_requires_gradient_sync(whole)
                root.set_reshard_after_backward(whole)
                with self.processes.naming_who_is_lost(computing=True):
                    work(first, micro_batch)
        finally:
            if not training:
                for module in self.modules:
                    module.reshard()  # what was gathered would not see the next update

    def finish(self, failed: bool) -> bool:
        return failed

    def stop(self, stop: Stop) -> None:
        pass

    def sum(self, sums: torch.Tensor) -> None:
        with self.processes.naming_who_is_lost():
            dist.all_reduce(sums)
