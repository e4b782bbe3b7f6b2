"""Which device a run trains on, and why: what was asked for, or the best that is there."""

import importlib
import importlib.util
import os
import platform
import sys
from typing import List, Tuple

from bert.config import Config
from bert.engines.cores import Core, bind, cores_of_process, describe, nodes, read_cores
from bert.validation import validate_for_ipu
from data.errors import InputError
from data.rows import WHOLE, Part

__all__ = ["check_processes", "choose_device", "evaluated_part", "find_device", "has_static_shapes", "local_parts"]
__all__ += ["makes_up_input", "numa_nodes", "part_of", "process_of", "take_card", "take_cores"]

# What the IPU engine takes from Graphcore's packages. Others of these names have none of it.
SDK_NAMES = {
    "poptorch": ("Options", "PipelinedExecution", "optim", "trainingModel"),
    "popart": ("AccumulateOuterFragmentSchedule", "SubgraphCopyingStrategy"),
}
IPU_KINDS = {2: "Mk2 ", 21: "float8 Mk2 "}  # as poptorch.ipuHardwareVersion() numbers them


def choose_device(wanted: str, ipus: int = 1, needs_hardware: bool = True) -> Tuple[str, str]:
    """`auto`, `ipu`, `cuda`, `mps` or `cpu` -> (the device, one line that says why).

    A run on IPUs takes `ipus` of them; without `needs_hardware` (it compiles only, or runs on Graphcore's simulator)
    PopTorch is enough. Raises InputError with the way out where a device is asked for that is not there.
    """
    import torch

    if wanted not in ("auto", "ipu", "cuda", "mps", "cpu"):  # a fork's, which is taken at its word
        return wanted, wanted
    why = "no PopTorch"
    # For auto, a package named popart alone is left alone: it is hardly Graphcore's.
    if wanted == "ipu" or (wanted == "auto" and is_installed("poptorch")):
        why, message = why_no_poptorch(torch.__version__)
        if not why and needs_hardware:
            why, message = why_no_hardware(ipus)
        if not why:
            return "ipu", f"ipu ({describe_ipus(ipus) if needs_hardware else 'PopTorch without hardware'})"
        if wanted == "ipu":
            raise InputError(f'device is "ipu", but {message}, or use --device auto')
    # The IPU's torch 2.0 is too old for the kernels.
    has_cuda = torch.cuda.is_available() and hasattr(torch, "compiler")
    if wanted == "cuda" and not has_cuda:
        raise InputError(
            f'device is "cuda", but torch {torch.__version__} finds no CUDA device, or is older than requirements.txt '
            "asks for. Install a CUDA build of torch and a driver, or use --device auto"
        )
    if wanted == "cuda" or (wanted == "auto" and has_cuda):
        take_card()
        reason = "" if wanted == "cuda" else f": {why}"
        return "cuda", f"cuda ({torch.cuda.get_device_name()}{reason})"
    # On a Mac several processes would share one GPU.
    if wanted == "mps" or (wanted == "auto" and torch.backends.mps.is_available() and process_of("cpu")[1] == 1):
        from bert.engines.mps import why_not_mps  # here: it needs a model

        why_no_mps = why_not_mps()
        if not why_no_mps:
            return "mps", "mps (Apple GPU)" if wanted == "mps" else f"mps (Apple GPU: no CUDA device, {why})"
        if wanted == "mps":
            remedy = f"Use --device auto, or another version of torch than {torch.__version__}"
            raise InputError(f'device is "mps", but {why_no_mps}. {remedy}')
        why = f"{why_no_mps}, {why}"
    reason = "" if wanted == "cpu" else f": no CUDA device, {why}"
    own = cores_of_process() if process_of("cpu")[1] > 1 else None
    words = describe(*own) if own else f"{torch.get_num_threads()} threads"
    return "cpu", f"cpu ({words}{reason})"


def find_device(config: Config) -> Tuple[str, str]:
    """(device, line that says why) for a run of `config`. Raises InputError, too, where it is an IPU and the config
    asks more of IPUs than there is."""
    ipus = len(config.ipu.layers_per_ipu) * config.ipu.replication_factor // process_of("ipu")[1]
    without_hardware = config.compile_only or config.ipu_model
    device, line = choose_device("ipu" if without_hardware else config.device, ipus, not without_hardware)
    if device == "ipu":
        try:
            validate_for_ipu(config)
        except InputError as error:
            raise InputError(f"{error}. To train without the IPUs that are here: --device cuda or --device cpu")
    return device, line


def has_static_shapes(device: str) -> bool:
    """Whether all global batches must have the same shape there."""
    return device == "ipu"


def makes_up_input(config: Config, device: str) -> bool:
    """Whether the device computes with input of its own making, for its speed alone."""
    return device == "ipu" and config.ipu.synthetic_data


def process_of(device: str) -> Tuple[int, int]:
    """(rank, number) of this process among those of the run: poprun's on IPUs, torchrun's on CUDA and CPU; (0, 1) for a
    process alone."""
    if device in ("cpu", "cuda") and {"RANK", "WORLD_SIZE"} <= set(os.environ):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device != "ipu" or importlib.util.find_spec("popdist") is None:
        return 0, 1
    popdist = importlib.import_module("popdist")
    return (popdist.getInstanceIndex(), popdist.getNumInstances()) if popdist.isPopdistEnvSet() else (0, 1)


def part_of(config: Config, device: str) -> Part:
    """Which rows of a global batch this process gets: all processes of a pipeline get the same."""
    parts, rank = local_parts(config, device)
    return parts[rank]


def local_parts(config: Config, device: str) -> Tuple[List[Part], int]:
    """The parts of all processes that torchrun started on this machine, and which of them this process is; of another
    one its part alone."""
    rank, size = process_of(device)
    replicas = size if device == "ipu" else max(1, size // config.parallel.pipeline)
    place, count = 0, 1
    if device != "ipu" and {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= set(os.environ):
        place, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    first = rank - place  # torchrun numbers machine after machine
    return [Part(number % replicas, replicas) for number in range(first, first + count)], place


def evaluated_part(config: Config, device: str) -> Part:
    """Which rows this process evaluates. On IPUs all, in each of poprun's processes: they do not add up metrics."""
    return WHOLE if device == "ipu" else part_of(config, device)


def check_processes(config: Config, device: str) -> None:
    """Raises InputError where the processes of the run are not so many as its pipelines need."""
    pipeline, size = config.parallel.pipeline, process_of(device)[1]
    if device != "ipu" and size % pipeline:
        there = f"torchrun started {size}" if size > 1 else "there is one process"
        raise InputError(
            f"parallel.pipeline is {pipeline}, but {there}: expected a multiple of {pipeline}. Start as many: torchrun "
            f"--nproc-per-node {-(-size // pipeline) * pipeline} run_pretraining.py ..., or --parallel.pipeline 1"
        )


def take_card() -> None:
    """Has each of torchrun's processes on a machine use a card of its own."""
    import torch

    if process_of("cuda")[1] == 1:
        return
    card, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", card + 1))
    if processes > cards:  # all of them say so
        raise InputError(
            f"torchrun started {processes} processes on a machine with {cards} CUDA devices, one for each process. "
            f"Start fewer: torchrun --nproc-per-node {cards}, or use --device cpu"
        )
    torch.cuda.set_device(card)


def take_cores() -> None:
    """Has each of torchrun's processes on a machine use cores of its own. To be called before weights are made, so that
    their memory is near, and after the loader has started, which may use all cores."""
    own = cores_of_process() if process_of("cpu")[1] > 1 else None
    if own:
        bind(own[0])


def numa_nodes(device: str) -> List[List[Core]]:
    """The cores of each NUMA node that this process may use, where the device is the CPU; none elsewhere."""
    return nodes(read_cores(os.sched_getaffinity(0))) if device == "cpu" and hasattr(os, "sched_getaffinity") else []


def is_installed(name: str) -> bool:
    return sys.modules[name] is not None if name in sys.modules else importlib.util.find_spec(name) is not None


def why_no_poptorch(torch_version: str) -> Tuple[str, str]:
    """Why Graphcore's packages cannot be used, in a few words and in full with the way out; both empty where they
    can."""
    versions = "under Python 3.8 with torch 2.0.1"
    enable = "Enable the Poplar SDK in this shell (source its enable.sh)"
    installed = [name for name in SDK_NAMES if is_installed(name)]
    for name in installed:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # another's package of this name may raise anything
            origin = getattr(importlib.util.find_spec(name), "origin", None)
            here = f"this is Python {platform.python_version()} with torch {torch_version}"
            return "PopTorch cannot be imported", (
                f"{name} ({origin}) cannot be imported: {' '.join(str(error).split())}. {enable}, and use Python 3.8 "
                f"with torch 2.0.1, which its wheels are built for: {here}. See docs/ipu.md"
            )
        missing = [needed for needed in SDK_NAMES[name] if not hasattr(module, needed)]
        if missing:
            place = getattr(module, "__file__", None) or list(module.__path__)[0]
            return f"the {name} here is not Graphcore's", (
                f"the {name} in {place} is not Graphcore's: it has no {missing[0]}. Remove it (pip uninstall {name}), "
                "enable the Poplar SDK in this shell (source its enable.sh) and install its wheel, "
                f"pip install poptorch-*.whl in the SDK's folder, {versions}. See docs/ipu.md"
            )
    if "poptorch" not in installed:
        return "no PopTorch", (
            "PopTorch is not installed. Its wheel comes with Graphcore's Poplar SDK, from no package index (the "
            f"package named popart on PyPI is something else): install it from the SDK, {versions}. See docs/ipu.md"
        )
    if "popart" not in installed:
        return "PopTorch has no popart", (
            f"PopTorch is there without popart, which comes with it. {enable}, or install its wheel, popart-*.whl. See "
            "docs/ipu.md"
        )
    return "", ""


def why_no_hardware(ipus: int) -> Tuple[str, str]:
    """The same for IPUs, `ipus` of them."""
    is_available = sys.modules["poptorch"].ipuHardwareIsAvailable
    # IPUs come in groups of 1, 2, 4, 8, ...: PopTorch takes the next one up.
    group = 1
    while group < ipus:
        group *= 2
    if is_available(group):
        return "", ""
    there = group // 2
    while there and not is_available(there):
        there //= 2
    return f"PopTorch finds {f'{there} IPUs, not {group}' if there else 'no IPU'}", (
        f"PopTorch finds {there} IPUs, expected {group}. Take the config of a smaller POD, or fewer replicas "
        "(--ipu.replication_factor, with more --ipu.gradient_accumulation_steps); without IPUs, --compile-only "
        "compiles and --ipu-model simulates"
    )


def describe_ipus(ipus: int) -> str:
    return f"{ipus} {IPU_KINDS.get(sys.modules['poptorch'].ipuHardwareVersion(), '')}IPU{'s' if ipus > 1 else ''}"
