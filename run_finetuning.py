"""Fine-tunes a BERT for a task on labelled files. `python run_finetuning.py --help` tells how.

It is run_pretraining.py with another task: the same engines, loop, checkpoints and options.
"""

import argparse
import dataclasses
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from bert.command_line import SUITE, find_config, help_lines_of, parse_command_line
from bert.config import Config
from bert.errors import Diverged, ProcessesDiffer, ProcessLost, said_once_a_machine
from bert.validation import has_examples
from data.commands import run_command
from data.errors import InputError
from data.files import read_json, write_json
from run_pretraining import wait_asleep

EXAMPLES = """examples:
  python run_finetuning.py --config sst2.json --model bert-base-uncased --task.folder GLUE
  python run_finetuning.py --config classification.json --model runs/mine/checkpoints/step_00001000 \\
      --data.files train.csv --data.held_out_files dev.csv --seeds 5 --baseline random
  python run_finetuning.py --config glue.json --model bert-base-uncased --task.folder GLUE

All settings of run_pretraining.py --help are options here, too. --help-task and the like say more. The most useful:
"""
USEFUL = (
    *("task.text_columns", "task.label_column", "task.labels", "task.regression", "task.metric", "task.new_head"),
    *("task.folder", "data.files", "data.held_out_files", "data.sequence_length"),
    *("training.epochs", "training.global_batch_size", "training.seed", "training.evaluate_every", "training.patience"),
    *("training.output", "training.precision", "optimizer.learning_rate", "optimizer.warmup_ratio", "resume", "device"),
)


class Run(NamedTuple):
    """One training of several."""

    name: str
    """of the config"""
    start: str
    """pre-trained or random"""
    config: Config

    def title(self) -> str:
        return f"{self.name}, {self.start}, seed {self.config.training.seed}"


def main(arguments: Optional[Sequence[str]] = None, **parts: Any) -> int:
    """Runs the command and returns its exit status. `parts` are as in run_pretraining.py."""

    def command() -> None:
        with said_once_a_machine():
            runs, output = find_runs(sys.argv[1:] if arguments is None else arguments)
        wait_asleep()
        from bert.run.console import show_progress  # torch takes seconds to import
        from bert.run.loop import check, train

        show_progress()
        firsts = {run.name: run for run in reversed(runs)}
        for run in firsts.values() if len(firsts) > 1 else ():  # or a later config may fail after hours
            check(run.config)
        failed: Dict[str, str] = {}
        for run in runs:
            if len(runs) > 1:
                print(run.title(), flush=True)
            try:
                train(run.config, **parts)
            except Diverged as error:  # one seed of many: the others go on
                if len(runs) == 1:
                    raise
                failed[run.title()] = str(error)
        if len(runs) > 1:
            print(report([run for run in runs if run.title() not in failed], output))
        if failed:
            raise Diverged("; ".join(f"{title}: {why}" for title, why in failed.items()))

    return run_command(command, failures=(Diverged, ProcessLost, ProcessesDiffer))


def find_runs(arguments: Sequence[str]) -> Tuple[List[Run], str]:
    """The trainings that a command line asks for, and the folder of all."""
    own, others = parse_own(arguments)
    paths, all_of = configs_of(own.config)
    names = [os.path.splitext(os.path.basename(path))[0] if path else "finetuning" for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"{own.config}: lists {', '.join(names)}; expected different names, for folders of their own")
    many = own.seeds > 1 or own.baseline or len(paths) > 1
    if many and "RANK" in os.environ:
        raise InputError("--seeds, --baseline and several configs run one after the other in one process: no torchrun")
    output = option_of(others, "--training.output") or os.path.join("runs", all_of)
    runs = []
    for name, path in zip(names, paths):
        given = [
            *(["--config", path] if path else []),
            *others,
            *(["--training.start_from", own.model] if own.model else []),
        ]
        first = parse_command_line(given)
        if first.task.name == "pretraining":
            raise InputError(
                'task.name is "pretraining", expected another, as --config classification.json has; or '
                "run_pretraining.py, which is for that"
            )
        if first.plan:
            raise InputError("--plan is an option of run_pretraining.py: pre-training is what it plans")
        model = first.training.start_from
        if not (model or first.training.branch_from or first.data.vocab or not has_examples(first)):
            raise InputError("--model is missing: the folder of a checkpoint, or of a BERT of transformers")
        if many and not first.data.held_out_files:
            raise InputError("data.held_out_files is empty, expected files to compare runs on")
        if own.baseline and first.training.branch_from:
            raise InputError("--baseline random begins anew, and training.branch_from is set: leave one of them out")
        if len(paths) == 1:
            output = place = first.training.output
        else:
            place = os.path.join(output, name)
        for start in ("pre-trained", *([own.baseline] if own.baseline else [])):
            for seed in range(first.training.seed, first.training.seed + own.seeds):
                folder = os.path.join(place, f"{start}_seed{seed}") if many else place
                runs.append(Run(name, start, with_start(first, start, seed, folder, model)))
    return runs, output


def parse_own(arguments: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    parser = argparse.ArgumentParser(
        prog="python run_finetuning.py",
        description="Fine-tunes a BERT for a task on labelled files, and scores it (docs/fine-tuning.md).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="\n".join([EXAMPLES, *help_lines_of(USEFUL)]),
    )
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint, or a BERT folder of transformers")
    parser.add_argument("--config", metavar="NAME", help="a JSON file of settings, or the name of one in configs/")
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="train N times: mean and deviation")
    parser.add_argument("--baseline", choices=["random"], help="train from random weights, too, to compare")
    own, others = parser.parse_known_args(arguments)
    if own.seeds < 1:
        raise InputError(f"--seeds is {own.seeds}, expected 1 or more")
    return own, others


def configs_of(name: Optional[str]) -> Tuple[List[Optional[str]], str]:
    """The configs that a name stands for: those that its file lists, or itself; and its name without ending."""
    if name is None:
        return [None], ""
    path = find_config(name)
    content = read_json(path)
    listed = content.get(SUITE, [path]) if isinstance(content, dict) else [path]
    if SUITE in content and (set(content) - {"$schema"} != {SUITE} or not isinstance(listed, list)):
        raise InputError(f'{path}: expected {{"{SUITE}": [names of configs]}} and nothing else')
    return [find_config(each) for each in listed], os.path.splitext(os.path.basename(path))[0]


def option_of(arguments: Sequence[str], option: str) -> str:
    found = ""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument == option:
            found = following
        elif argument.startswith(f"{option}="):
            found = argument[len(option) + 1 :]
    return found


def with_start(config: Config, start: str, seed: int, folder: str, model: Optional[str]) -> Config:
    """The config with this start, seed and output folder."""
    training = dataclasses.replace(config.training, seed=seed, output=folder)
    if start != "random":
        return dataclasses.replace(config, training=training)
    data = dataclasses.replace(config.data, vocab=config.data.vocab or model)
    return dataclasses.replace(config, data=data, training=dataclasses.replace(training, start_from=None))


def report(runs: Sequence[Run], output: str) -> str:
    """A table of each config's metric over the seeds, which results.json in the folder of all has, too."""
    from bert.tasks import make_task, with_labels

    rows: List[Dict[str, Any]] = []
    for name in dict.fromkeys(run.name for run in runs):
        row: Dict[str, Any] = {"config": name}
        for run in (run for run in runs if run.name == name):
            best = read_json(os.path.join(run.config.training.output, "checkpoints", "best.json"))
            row["metric"] = make_task(with_labels(run.config)).selected_by
            row.setdefault(run.start, []).append(best[row["metric"]])
        rows.append(row)
    write_json(os.path.join(output, "results.json"), {"runs": rows})
    starts = list(dict.fromkeys(run.start for run in runs))
    lines = [["", "metric", *starts, *(["difference"] if len(starts) > 1 else [])]]
    for row in rows:
        means = [mean(row[start]) for start in starts]
        difference = [f"{means[0] - means[1]:+.4f}"] if len(starts) > 1 else []
        lines.append([row["config"], row["metric"], *(spread(row[start]) for start in starts), *difference])
    if len(rows) > 1:
        averages = [mean([mean(row[start]) for row in rows]) for start in starts]
        lines.append(["average", "", *(f"{average:.4f}" for average in averages)])
    widths = [max(len(line[column]) for line in lines if column < len(line)) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> str:
    """The mean, and of several values the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    deviation = (sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean(values):.4f} ± {deviation:.4f} ({len(values)} seeds)"


if __name__ == "__main__":
    sys.exit(main())
