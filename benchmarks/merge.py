"""One JSON from the results of several benchmarks, by file name, and a table of those of benchmarks/pretraining.py.

python benchmarks/merge.py phase1.json phase2.json lamb.json --output all.json
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import print_table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files that benchmarks wrote")
    parser.add_argument("--output", required=True, help="the JSON file of all of them")
    arguments = parser.parse_args()
    merged, rows = {}, []
    for path in arguments.results:
        name = os.path.splitext(os.path.basename(path))[0]
        with open(path, encoding="utf-8") as file:
            merged[name] = json.load(file)
        for way, figures in merged[name]["results"].get("ways", {}).items():
            if "sequences_per_second" in figures:
                rates = [f"{figures[rate]:.4g}" for rate in ("sequences_per_second", "tokens_per_second")]
                share, peak = 100 * figures["share_of_gemm_rate"], figures["peak_bytes"] / 1e9
                rows.append([f"{name}, {way}", *rates, f"{share:.0f} %", f"{peak:.2f}"])
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(merged, file, indent=2)
        file.write("\n")
    print_table(["", "sequences/s", "tokens/s", "of the matrix product's rate", "peak, GB"], rows)


if __name__ == "__main__":
    main()
