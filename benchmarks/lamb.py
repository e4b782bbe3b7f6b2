"""Time of one LAMB update of all parameters, beside the copy bandwidth of the same run and PyTorch's fused AdamW.

    python benchmarks/lamb.py --config pod16_phase1.json
    python benchmarks/lamb.py --device cuda --json result.json

Options are run_pretraining.py's, and those below; the parameters are those of its model. An update moves 40 bytes a
parameter at least: gradient, moments and weight read and all but the gradient written, 28, then moments and weight read
once more and the weight written once its norm is known. The last column compares with the time that a copy of so many
bytes, half of them read and half written, takes: above 100 % where what is read again still lies in a cache, or where a
copy reads first what it writes.
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.timing import cuda_or_cpu, device_name, timed
from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.text import count_of
from data.errors import InputError
from ops.lamb import Lamb, lamb_groups


def make_ways(groups):
    """Optimizers over the same parameters and gradients, each with moments of its own."""
    lamb, rounding, plain = [
        Lamb([dict(group) for group in groups], lr=1e-4, implementation=name) for name in ("auto", "auto", "plain")
    ]
    parameters = [p for group in groups for p in group["params"]]
    rounding.compute_weights.update((p, p.detach().to(torch.bfloat16)) for p in parameters)
    adamw_groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    return {
        "this project": lamb,
        "this project, with bfloat16 compute weights": rounding,
        "plain": plain,
        "torch.optim.AdamW(fused=True)": torch.optim.AdamW(adamw_groups, lr=1e-4, fused=True),
    }


def run(own, config):
    device = cuda_or_cpu(config)
    master_weights = make_engine(config, device).master_weights
    groups = lamb_groups(master_weights.items(), config.optimizer.weight_decay)
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
    rows, ours = [], median(seconds["this project"][1:])
    for name, (_, *rounds) in seconds.items():
        update = median(rounds)
        results["ways"][name] = {"seconds": update, "share_of_copy_bandwidth": least / update, "rounds": rounds}
        rows.append([name, f"{1e3 * update:.2f}", f"{update / ours:.2f}", f"{100 * least / update:.0f} %"])
    rounds = f"medians of {count_of(own.rounds, 'round')}"
    print(f"{count / 1e6:.1f} M parameters on {device} ({results['implementation']}); {rounds}")
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s: 40 bytes a parameter take {1e3 * least:.2f} ms")
    print_table(["", "ms", "this project is faster by", "of the copy bandwidth"], rows)
    versions = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "device": device_name(device)}
    write_json(own.json, results, **versions)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="pod16_phase1.json", help="whose model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="in which the ways take turns (default: %(default)s)")
    own, others = parser.parse_known_args()
    try:
        run(own, parse_command_line(["--config", own.config] + others))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
