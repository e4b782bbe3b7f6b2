"""Correctness, then speed, on the GPU that is there: one process, each result on disk as soon as it is there.

    python benchmarks/gpu.py                       # into benchmarks/results/gpu-<name of the GPU>, in 9 minutes
    python benchmarks/gpu.py --only phase1 phase1-profile --output tuned
    python benchmarks/gpu.py --device cpu --tiny --output dry-run

gpu.json has all figures, with device, software, command and date; beside it are tables of the kernels and pictures. An
item that fails is recorded with its error, and the others go on. The same command again does what is missing: after the
time was up, a failure, an item that hung or an error that left the device unusable. It is then that the exit status is
1. An item that was done with other code is not done again, and marked; --only does it again.
"""

import time

BEGAN = time.monotonic()  # before torch, whose import takes seconds

import argparse
import importlib.util
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.gpu_checks import operation_checks
from benchmarks.gpu_items import ROOT, Bench, Item, Results, run_items
from benchmarks.gpu_speed import PHASES, own_speed, peer_speed, whole_run
from benchmarks.gpu_training import training_checks
from benchmarks.report import about, print_table
from benchmarks.timing import device_name
from data.errors import InputError

# What parts can do without, and what for.
OPTIONAL = {
    "triton": "its kernels and compiled layers",
    "pytest": "the tests of kernels",
    "hypothesis": "some of those tests",
    "transformers": "the peer",
    "matplotlib": "pictures",
    "tensorboard": "TensorBoard's files of a run",
}


def make_items():
    """Correctness first, then this project's speed, then the peer's."""
    return [*operation_checks(), *training_checks(), *own_speed(), *peer_speed(), Item("run", 40, whole_run)]


def software():
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "transformers"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.import_module(f"{name}").__version__
    return versions


def draw(bench, results):
    """Pictures of sequences/s and of the shares of kernels, as far as they are there."""
    from benchmarks.plot import draw_bars

    def figures(name):
        return results.items[name]["figures"] if results.status(name) == "done" else {}

    speeds = {
        phase: {
            way: figures(name)["sequences_per_second"]
            for way, name in (("this project", phase), ("transformers, compiled", f"{phase}-peer"))
            if "sequences_per_second" in figures(name)
        }
        for phase in PHASES
    }
    shares = {}
    for phase in PHASES:
        kinds = figures(f"{phase}-profile").get("kinds", {})
        shares[phase] = {kind: 100 * seconds / sum(kinds.values()) for kind, seconds in kinds.items()}
    pictures = {
        "sequences": ("sequences/s", speeds),
        "profile": ("share of a micro-batch's time in kernels, %", shares),
    }
    for name, (title, groups) in pictures.items():
        groups = {group: values for group, values in groups.items() if values}
        if groups:
            draw_bars(os.path.join(bench.folder, f"{name}.png"), title, groups)


def summarize(items, results):
    rows = []
    for item in items:
        record = results.items.get(item.name, {"status": "not begun"})
        seconds = f"{record['seconds']:.1f}" if "seconds" in record else ""
        rows.append([item.name, record["status"], seconds])
    print()
    print_table(["", "", "s"], rows)
    for phase in PHASES:
        rates = [
            results.items.get(name, {}).get("figures", {}).get("sequences_per_second")
            for name in (phase, f"{phase}-peer")
        ]
        if all(rates):
            print(f"{phase}: {rates[0] / rates[1]:.2f} times transformers")


def run(own):
    if own.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} of {sys.executable} finds no CUDA device; --device cpu --tiny is a dry run"
        )
    device = device_name(own.device)
    default = os.path.join(ROOT, "benchmarks", "results", f"gpu-{device.lower().replace(' ', '-')}")
    bench = Bench(own.device, own.tiny, own.output or default)
    os.makedirs(bench.folder, exist_ok=True)
    described = about(device=device, tiny=own.tiny, **software())
    results = Results(os.path.join(bench.folder, "gpu.json"), described, same=["device", "tiny", "torch"])
    every = make_items()
    items = [item for item in every if not own.only or item.name in own.only]
    unknown = set(own.only) - {item.name for item in items}
    if unknown:
        raise InputError(f"--only {sorted(unknown)[0]}: expected of {', '.join(item.name for item in every)}")
    print(f"{device}, torch {torch.__version__}, results in {results.path}")
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: without {what}")
    status = run_items(items, bench, results, BEGAN + 60 * own.minutes, again=bool(own.only))
    summarize(items, results)
    if importlib.util.find_spec("matplotlib"):
        draw(bench, results)
    return status


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: %(default)s)")
    parser.add_argument("--output", metavar="FOLDER", help="of the results (default: by the device's name)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", help="these alone, done before or not")
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run of a model that is small; its speed says nothing"
    )
    try:
        sys.exit(run(parser.parse_args()))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted. The same command goes on")


if __name__ == "__main__":
    main()
