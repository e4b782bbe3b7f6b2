"""Time of one LAMB update of all parameters, beside the copy bandwidth of the same run and PyTorch's fused AdamW.

    python benchmarks/lamb.py --config pod16_phase1.json
    python benchmarks/lamb.py --device cuda --json result.json

Options are run_pretraining.py's, and those below; the parameters are those of its model. An update moves 40 bytes a
parameter at least: gradient, moments and weight read and all but the gradient written, 28, then moments and weight read
once more and the weight written once its norm is known. The last column compares with the time that a copy of so many
bytes, half of them read and half written, takes: above 100 % where what is read again still lies in a cache, or where a
copy reads first what it writes.
"""

import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import median, print_table, write_json
from benchmarks.timing import cuda_or_cpu, timed
from bert.command_line import parse_command_line
from bert.engines import make_engine
from data.errors import InputError
from ops.lamb import Lamb, lamb_groups


def make_ways(groups):
    """Optimizers over the same parameters and gradients, each with moments of its own."""

    def lamb(implementation, rounded=False):
        optimizer = Lamb([dict(group) for group in groups], lr=1e-4, implementation=implementation)
        if rounded:
            optimizer.compute_weights.update(
                (p, p.detach().to(torch.bfloat16)) for group in groups for p in group["params"]
            )
        return optimizer

    options = ("params", "weight_decay")
    return {
        "this project": lamb("auto"),
        "this project, with bfloat16 compute weights": lamb("auto", rounded=True),
        "foreach": lamb("foreach"),
        "plain": lamb("plain"),
        "torch.optim.AdamW(fused=True)": torch.optim.AdamW(
            [{name: group[name] for name in options} for group in groups], lr=1e-4, fused=True
        ),
    }


def run(own, config):
    device = cuda_or_cpu(config)
    groups = [
        {name: group[name] for name in ("params", "weight_decay", "trust_ratio")}
        for group in lamb_groups(make_engine(config, device).master_weights.items(), config.optimizer.weight_decay)
    ]
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    count, ways = sum(p.numel() for p in parameters), make_ways(groups)
    source, target = torch.randn(count, device=device), torch.zeros(count, device=device)
    copies, seconds = [], {name: [] for name in ways}
    for _ in range(own.rounds + 1):  # the first one allocates and compiles
        copies.append(timed(device, lambda: target.copy_(source)))
        for name, optimizer in ways.items():
            seconds[name].append(timed(device, optimizer.step))
    bandwidth = 8 * count / median(copies[1:])
    least = 40 * count / bandwidth
    results = {
        "parameters": count,
        "implementation": ways["this project"].implementation,
        "copy_bytes_per_second": bandwidth,
        "seconds_of_40_bytes": least,
        "ways": {},
        "copy_rounds": copies[1:],
    }
    for name, every in seconds.items():
        results["ways"][name] = {
            "seconds": median(every[1:]),
            "share_of_copy_bandwidth": least / median(every[1:]),
            "rounds": every[1:],
        }
    print(
        f"{count / 1e6:.1f} M parameters on {device} ({results['implementation']}); a copy moves "
        f"{bandwidth / 1e9:.1f} GB/s, so 40 bytes a parameter take {1e3 * least:.2f} ms; medians of "
        f"{own.rounds} rounds"
    )
    ours = results["ways"]["this project"]["seconds"]
    print_table(
        ["", "ms", "this project is faster by", "of the copy bandwidth"],
        [
            [
                name,
                f"{1e3 * figures['seconds']:.2f}",
                f"{figures['seconds'] / ours:.2f}",
                f"{100 * figures['share_of_copy_bandwidth']:.0f} %",
            ]
            for name, figures in results["ways"].items()
        ],
    )
    write_json(
        own.json,
        results,
        torch=torch.__version__,
        threads=str(torch.get_num_threads()),
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="pod16_phase1.json", help="whose model (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="the ways alternate this many times (default: %(default)s)"
    )
    parser.add_argument("--json", help="write the figures here")
    own, others = parser.parse_known_args()
    try:
        run(own, parse_command_line(["--config", own.config] + others))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
