"""Seconds of work on a device, of the parts of a step, and the machine's own rates to hold them against."""

import contextlib
import functools
import time

import torch

from bert.config import Config
from bert.engines.choosing import choose_device
from data.errors import InputError

__all__ = ["Stopwatch", "cuda_or_cpu", "device_name", "gemm_rate", "timed"]


def cuda_or_cpu(config: Config) -> str:
    """The config's device. Raises InputError for an IPU: there a step cannot be taken apart."""
    device, _ = choose_device(config.device)
    if device == "ipu":
        raise InputError(
            "this benchmark takes steps apart on CUDA and CPU: add --device cuda or --device cpu. On IPUs, "
            "benchmarks/data_wait.py measures sequences/s"
        )
    return device


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else device


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device, work, repeat=1):
    """Seconds of one call of `work`, the mean of `repeat`."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeat


def gemm_rate(device, shape, dtype):
    """FLOP/s of the fastest matrix product of any library, of random data: PyTorch's into memory that is allocated
    already, and on the CPU oneDNN's with a packed weight. The best of five tries, each of a tenth of a second. `shape`
    is rows, common size, columns."""
    rows, common, columns = shape
    options = dict(device=device, dtype=dtype)
    a, b = torch.randn(rows, common, **options), torch.randn(common, columns, **options)
    ways = [functools.partial(torch.mm, a, b, out=torch.empty(rows, columns, **options))]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), rows)
        ways.append(functools.partial(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], ""))
    return max(2 * rows * common * columns / best_time(device, work) for work in ways)


def best_time(device, work):
    """Seconds of one call of `work`: the best of five tries, each of a tenth of a second."""
    timed(device, work)
    repeat = max(1, int(0.1 / timed(device, work)))
    return min(timed(device, work, repeat) for _ in range(5))


class Stopwatch:
    """Seconds of each part of a step; the device is waited for before and after each."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def part(self, name):
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def around(self, name, function):
        """`function`, its calls timed."""

        def timed_function(*arguments):
            with self.part(name):
                return function(*arguments)

        return timed_function

    def around_each(self, name, generator):
        """`generator`, the making of each of its items timed; None is no item."""

        def timed_generator(*arguments):
            items = generator(*arguments)
            while True:
                with self.part(name):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return timed_generator
