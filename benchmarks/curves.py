"""The losses of several runs in one picture, seeds of one setting together, and their held-out losses in a table.

    for p in float32 bfloat16 float8; do
        python run_pretraining.py --config quickstart.json --training.precision $p --training.output runs/$p; done
    python benchmarks/curves.py runs/float32 runs/bfloat16 runs/float8 --output curves.png --json curves.json
    python benchmarks/curves.py runs/plain-seed* runs/wide-seed* --against hours --output curves.pdf

Losses are the metrics whose names end in "loss", without their sum; those that all runs have are compared. Runs whose
run.json differ only in their seed are one curve: the mean, with a band from the lowest to the highest. `--group
NAME=GLOB` names others. Training losses are smoothed over a fiftieth of a run; the points are held-out losses. In PDF
and SVG text stays text.
"""

import glob
import importlib.util
import json
import math
import os
import re
import statistics
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import make_parser, print_table, write_json

FONTS = {"svg.fonttype": "none", "pdf.fonttype": 42}
AXES = {"steps": "step", "samples": "samples", "hours": "hours of training"}


def read_run(folder, against):
    """The run's losses and where they are on the axis, its evaluations, and what run.json says of it."""
    from bert.run.curve import read_metrics

    metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
    if not metrics:
        sys.exit(f"error: {folder}: has no metrics.jsonl with lines in it; expected the folder of a run")
    held_out = read_metrics(os.path.join(folder, "held_out.jsonl"))
    if not held_out and os.path.exists(os.path.join(folder, "held_out.json")):  # of older runs
        held_out = [read_json(os.path.join(folder, "held_out.json"))]
    places = {"steps": [line["step"] for line in metrics], "places": places_of(metrics, against)}
    losses = {name: [line[name] for line in metrics] for name in metrics[0] if name.endswith("loss")}
    return {"held_out": held_out[-1] if held_out else {}, "evaluations": held_out, **places, **losses}


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def places_of(metrics, against):
    """Where the lines are on the axis: steps, samples seen, or hours without saving and evaluating."""
    if against != "hours":
        return [line["step" if against == "steps" else "samples_seen"] for line in metrics]
    seen = [line["samples_seen"] for line in metrics]
    counts = [after - before for before, after in zip(seen, seen[1:])]
    counts.insert(0, min([seen[0], *counts[:1]]))  # a branch begins with those of another run
    hours, total = [], 0.0
    for count, line in zip(counts, metrics):
        total += count / line["sequences_per_second"] / 3600
        hours.append(total)
    return hours


def seed_and_settings(folder):
    """The seed, and all other settings of the run, in a form that can be compared; none of a run that is older."""
    path = os.path.join(folder, "run.json")
    sessions = read_json(path).get("sessions", []) if os.path.exists(path) else []
    if not sessions:
        return None, folder
    config = sessions[-1]["config"]
    training = dict(config["training"], seed=None, output=None, stop_at_step=None)
    return config["training"]["seed"], json.dumps({**config, "training": training, "resume": None}, sort_keys=True)


def group_runs(folders, named):
    """Name of a curve -> its runs' folders: those of `named` (NAME=GLOB), then the others by what run.json says."""
    groups = {}
    for words in named:
        name, _, pattern = words.partition("=")
        groups[name] = sorted(glob.glob(pattern))
        if not groups[name]:
            sys.exit(f"error: --group {words}: no folder matches, expected NAME=GLOB")
    by_settings = {}
    for folder in folders:
        seed, settings = seed_and_settings(folder)
        runs = by_settings.setdefault(settings, {})
        runs[folder if seed is None or seed in runs else seed] = folder
    for runs in by_settings.values():
        members = list(runs.values())
        if len(members) > 1 and not all(isinstance(seed, int) for seed in runs):
            groups.update({os.path.normpath(folder): [folder] for folder in members})  # one seed, twice
        else:
            groups[name_of(members)] = members
    return groups


def name_of(folders):
    """What the names of folders have in common, without "seed" at its end: `wide` of wide-seed1 and wide-seed2."""
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    common = re.sub(r"[-_.]*(seed)?[-_.]*$", "", os.path.commonprefix(names)) if len(names) > 1 else names[0]
    return common or names[0]


def mean_and_band(runs, loss):
    """The smoothed losses of several runs where all have a line: places, means, lowest, highest."""
    from bert.run.curve import smooth

    curves = [dict(zip(run["steps"], zip(run["places"], smooth(run[loss])))) for run in runs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    places = [statistics.mean(curve[step][0] for curve in curves) for step in steps]
    values = [[curve[step][1] for curve in curves] for step in steps]
    return places, list(map(statistics.mean, values)), list(map(min, values)), list(map(max, values))


def draw_group(axes, name, runs, loss, colour):
    places, means, lowest, highest = mean_and_band(runs, loss)
    label = f"{name} (mean of {len(runs)}, lowest to highest)" if len(runs) > 1 else name
    if len(runs) > 1:
        axes.fill_between(places, lowest, highest, color=colour, alpha=0.2, linewidth=0)
    elif len(places) >= 100:  # else nothing is smoothed
        axes.plot(runs[0]["places"], runs[0][loss], color=colour, alpha=0.25, linewidth=0.6)
    axes.plot(places, means, color=colour, label=label, linewidth=1.2)
    at = {}
    for run in runs:
        for line in run["evaluations"]:
            if loss in line and "step" in line:
                place = np.interp(line["step"], run["steps"], run["places"])
                at.setdefault(line["step"], []).append((place, line[loss]))
    for points in (points for points in at.values() if len(points) == len(runs)):
        place, values = statistics.mean(x for x, _ in points), [y for _, y in points]
        mean = statistics.mean(values)
        error = [[mean - min(values)], [max(values) - mean]]
        axes.errorbar(place, mean, error, fmt="o", color=colour, markersize=4, markeredgecolor="black", capsize=2)


def draw(groups, losses, output, against):
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: pictures need matplotlib, which is not installed: pip install matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    from bert.config import Config
    from bert.tasks import make_task

    chance = {panel.loss: panel.chance for panel in make_task(Config()).panels}
    figure = Figure(figsize=(7 * len(losses), 4), layout="constrained")
    for axes, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses):
        axes.set(xlabel=AXES[against], ylabel=f"{loss}, nats")
        for number, (name, runs) in enumerate(groups.items()):
            draw_group(axes, name, runs, loss, f"C{number}")
        if not math.isnan(chance.get(loss, math.nan)):
            axes.axhline(chance[loss], color="grey", linestyle=":", label="chance")
        axes.legend(fontsize="small")
    with matplotlib.rc_context(FONTS):
        figure.savefig(output, dpi=120)


def in_words(values):
    """`5.7712`, and of several `5.7712 ± 0.0104`: the standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="*", help="folders of runs: metrics.jsonl and, where they are, held_out.jsonl")
    parser.add_argument("--group", action="append", default=[], metavar="NAME=GLOB", help="folders that are one curve")
    parser.add_argument("--against", choices=list(AXES), default="steps", help="what the x axis is (default steps)")
    parser.add_argument("--output", required=True, help="the picture: a name that ends in .png, .pdf or .svg")
    arguments = parser.parse_args()
    folders = group_runs(arguments.runs, arguments.group)
    if not folders:
        parser.error("name folders of runs, or --group NAME=GLOB")
    runs = {folder: read_run(folder, arguments.against) for members in folders.values() for folder in members}
    groups = {name: [runs[folder] for folder in members] for name, members in folders.items()}
    first, *others = runs.values()
    losses = [name for name in first if name.endswith("loss") and all(name in run for run in others)]
    losses = [name for name in losses if name != "loss" or len(losses) == 1]  # which is the sum of the others
    draw(groups, losses, arguments.output, arguments.against)
    rows = []
    for name, members in groups.items():
        last = [in_words([run[loss][-1] for run in members]) for loss in losses]
        held_out = [in_words([run["held_out"].get(loss, math.nan) for run in members]) for loss in losses]
        rows.append([name, str(len(members)), *(cell for pair in zip(last, held_out) for cell in pair)])
    print_table(["", "runs", *(title for loss in losses for title in (f"{loss}, last line", "held out"))], rows)
    write_json(arguments.json, {name: dict(zip(folders[name], members)) for name, members in groups.items()})


if __name__ == "__main__":
    main()
