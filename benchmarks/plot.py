"""Bars of sequences/s, for each result of benchmarks/pretraining.py beside its peers.

python benchmarks/plot.py phase1.json phase2.json --output sequences.png
"""

import argparse
import importlib.util
import json
import os
import sys

if importlib.util.find_spec("matplotlib") is None:
    sys.exit("error: pictures need matplotlib, which is not installed: pip install matplotlib")
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw_bars", "draw_lines"]


def draw_bars(path, title, groups):
    """Draws {group: {way: value}} as a picture: a row of bars for each group, each with its value; ways keep their
    colour."""
    ways = list(dict.fromkeys(way for values in groups.values() for way in values))
    height = 1 + 0.35 * sum(len(values) + 1 for values in groups.values())
    figure, axes = plt.subplots(figsize=(8, height), constrained_layout=True)
    place, ticks = 0, []
    for group, values in groups.items():
        ticks.append((place + (len(values) - 1) / 2, group))
        for way, value in values.items():
            bar = axes.barh(place, value, color=f"C{ways.index(way)}", label=way)
            axes.bar_label(bar, [f"{value:.3g}" if value < 1000 else f"{value:.0f}"], padding=3)
            place += 1
        place += 1
    axes.set_yticks(*zip(*ticks))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_lines(path, title, across, lines):
    """Draws {label: {x: y}} as a picture of lines; `across` says what x is, whose axis doubles from tick to tick."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for label, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=label)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.set(xlabel=across, title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files that benchmarks/pretraining.py wrote")
    parser.add_argument("--output", required=True, help="the picture: a PNG file")
    arguments = parser.parse_args()
    groups = {}
    for path in arguments.results:
        with open(path, encoding="utf-8") as file:
            ways = json.load(file)["results"]["ways"]
        groups[os.path.splitext(os.path.basename(path))[0]] = {
            name: way["sequences_per_second"] for name, way in ways.items()
        }
    draw_bars(arguments.output, "sequences/s", groups)


if __name__ == "__main__":
    main()
