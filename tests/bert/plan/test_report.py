"""The plan's lines, its picture, and the command that prints them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from bert.engines.cores import Core, read_cores
from bert.plan.measured import Measured, measure_on, measured_report
from bert.plan.picture import visits_of
from bert.plan.report import ipu_report, is_for_ipu
from bert.plan.speed import Speed, calibrate, other_pods
from bert.plan.step import DataFacts, look_at_data
from bert.text import duration
from data.errors import InputError
from data.rows import packed_batch
from data.shards import read_samples, write_shard
from run_pretraining import main
from tests.bert.plan.plans import SMALL, config_of, plan_of
from tests.make_samples import random_samples


def test_the_plan_is_imported_without_torch():
    subprocess.run([sys.executable, "-c", "import bert.plan, sys; sys.exit('torch' in sys.modules)"], check=True)


def test_the_calibration_gives_back_the_published_speed():
    config, speed = calibrate()
    assert config.training.global_batch_size / speed.step == pytest.approx(2409)
    assert speed.efficiency == pytest.approx(0.315, abs=0.001)
    assert any("about 2,409 sequences/s" in line for line in ipu_report(config, speed.plan, look_at_data(config)))


def test_the_estimate_of_another_config_is_its_own():
    efficiency = calibrate()[1].efficiency
    speed = Speed(plan_of("pod16_phase1"), efficiency)
    assert speed.step == pytest.approx(953.5e9 / (0.3152 * 250e12) * 520, rel=1e-3)
    pods = {ipus: (step, fits) for ipus, step, fits in other_pods(config_of("pod16_phase1"), speed)}
    assert sorted(pods) == [4, 8, 32, 64]
    assert pods[64] == (pytest.approx(Speed(plan_of("pod64_phase1"), efficiency).step), True)
    large = other_pods(config_of("large_pod16_phase1"), Speed(plan_of("large_pod16_phase1"), efficiency))
    assert [(ipus, fits) for ipus, _, fits in large] == [(4, False), (8, False), (32, True), (64, True)]
    large = other_pods(config_of("large_pod64_phase1"), Speed(plan_of("large_pod64_phase1"), efficiency))
    assert [(ipus, fits) for ipus, _, fits in large] == [(4, False), (8, False), (16, True), (32, True)]


def test_the_run_takes_its_steps_times_a_step():
    lines = ipu_report(config_of("pod16_phase1"), plan_of("pod16_phase1"), DataFacts(1000000, 0.9, 1.05))
    seconds = 10500 * Speed(plan_of("pod16_phase1"), calibrate()[1].efficiency).step
    assert any(f"about {duration(seconds)}, {10500 * 65536 / 1e6:.2f} epochs" in line for line in lines)
    assert any("about 7,549,747 tokens, which fill 90 % of the slots" in line for line in lines)


def test_the_plan_names_the_optimizer(monkeypatch):
    options = "--optimizer.name adamw"
    lines = ipu_report(config_of("pod16_phase1", options), plan_of("pod16_phase1", options), DataFacts())
    assert any("optimizer: AdamW's two moments, 1/4 of them on each replica." in line for line in lines)
    lines = ipu_report(config_of("pod64_phase1"), plan_of("pod64_phase1"), DataFacts())
    assert any("1/4 of them on each replica (poprun's 4 processes have 4 each)." in line for line in lines)
    monkeypatch.setattr("bert.plan.measured.measure", lambda config, rows: Measured("here", 100, 0.5, 0.25))
    lines = measured_report(config_of("cpu_small", "--optimizer.name muon"), DataFacts(), "")
    assert any("Muon's update 0.250 s" in line for line in lines)


def test_what_was_measured_is_scaled_to_a_step_and_a_run(monkeypatch):
    monkeypatch.setattr("bert.plan.measured.measure", lambda config, rows: Measured("here", 100, 0.5, 0.25))
    config = config_of("cpu_small", "--training.global_batch_size 256 --optimizer.name lamb")  # 10,000 steps
    lines = " ".join(measured_report(config, DataFacts(25600, 0.9, 1.0), ""))
    assert "3 micro-batches" in lines and f"3 x 0.500 s + 0.250 s = 1.75 s, {256 / 1.75:.3g} sequences/s" in lines
    assert "about 4 h 52 min, 100.00 epochs" in lines and "LAMB's update" in lines


@pytest.mark.parametrize("layers", ["[1,2,2]", "[0,5]", "[5]"])
def test_the_pictures_schedule_does_everything_once_and_in_order(layers):
    plan = plan_of("pod16_phase1", f"{SMALL} --ipu.layers_per_ipu {layers} --ipu.gradient_accumulation_steps 12")
    done, stages = {}, range(len(plan.stages))
    for cycle in range(plan.cycles):
        for ipu in range(len(plan.memory)):
            end = 0.0
            for visit in visits_of(plan, ipu, cycle):
                work = visit.stage, visit.phase, visit.micro_batch
                assert visit.begin == end and work not in done and plan.stages[visit.stage].stage.ipu == ipu
                end, done[work] = visit.end, (cycle, visit.begin)
            assert end <= 1.1
    assert len(done) == 12 * (3 * len(stages) - 1)
    for micro_batch in range(12):
        order = [done[stage, "forward", micro_batch] for stage in stages]
        order += [done[stage, "backward", micro_batch] for stage in reversed(stages)]
        assert order == sorted(order)
    cycles = [done[stage, "backward", 0][0] - done[stage, "forward", 0][0] + 1 for stage in stages]
    assert cycles == [stage.stashed for stage in plan.stages]


def test_which_plan_it_is():
    assert is_for_ipu(config_of("pod16_phase1"))[0] and is_for_ipu(config_of("pod4_phase2", "--device ipu"))[0]
    assert not is_for_ipu(config_of("pod16_phase1", "--device cpu"))[0]
    for_ipu, why_not = is_for_ipu(config_of("quickstart"))
    assert not for_ipu and "ipu.gradient_accumulation_steps" in why_not


@pytest.mark.parametrize(
    "options, key",
    [
        ("--ipu.gradient_accumulation_steps 510", "training.global_batch_size"),
        ("--ipu.layers_per_ipu [0,12,0]", "ipu.layers_per_ipu"),
        ("--ipu.embedding_serialization_factor 5", "ipu.embedding_serialization_factor"),
    ],
)
def test_an_ipu_section_that_cannot_run_is_an_error_with_the_way_out(options, key):
    with pytest.raises(InputError, match=f"{key} is .*--device cpu, or --device cuda"):
        is_for_ipu(config_of("pod16_phase1", options))


def test_ipus_that_cannot_run_the_config_are_an_error_as_in_training(monkeypatch, capsys):
    monkeypatch.setattr("bert.engines.choosing.choose_device", lambda *arguments: ("ipu", "4 IPUs"))
    assert main(["--config", "quickstart.json", "--plan"]) == 2
    assert "ipu.layers_per_ipu is [0, 4, 4, 4]" in capsys.readouterr().err


def write_shards(folder, length, masks, vocab):
    """Writes 5,000 random samples, and returns the option that names them."""
    samples = random_samples(np.random.default_rng(0), 5000, length, masks, vocab)
    write_shard(str(folder / "train-00000.h5"), samples, vocab, "0" * 64, {})
    return f"--data.files {folder}/train-*.h5"


def printed_plan(capsys, name, options=""):
    assert main(["--config", f"{name}.json", "--plan", *options.split()]) == 0
    return capsys.readouterr().out


def test_without_matplotlib_the_plan_has_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "no picture is drawn. For one: pip install matplotlib" in printed_plan(capsys, "pod16_phase2")
    assert os.listdir(str(tmp_path)) == []


def test_the_command_prints_the_plan_and_writes_the_picture_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = printed_plan(capsys, "pod16_phase2").splitlines()
    assert os.listdir(str(tmp_path)) == ["plan-pod16_phase2.svg"]
    assert b"<svg" in (tmp_path / "plan-pod16_phase2.svg").read_bytes()
    assert max(map(len, lines)) <= 120
    for words in (
        "16 IPUs",
        "layers4-7",
        "897",
        "an estimate",
        "about 2,409 sequences/s",
        "no shards at shards/wikipedia-512",
        "LAMB's two moments",
        "No warnings.",
        "8 of the cycles fill and drain the pipeline: 1.5 %",
        "POD64",
        "plan-pod16_phase2.svg",
        "--device cpu",
    ):
        assert any(words in line for line in lines), words


def test_shards_tell_the_epochs_and_how_many_samples_share_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = write_shards(tmp_path, 128, 20, 30522)
    printed = printed_plan(capsys, "pod16_phase1", files)
    assert f"{10500 * 65536 / 5000:,.2f} epochs" in printed and "% of the slots" in printed
    config = config_of("pod16_phase1", f"--data.packing rows {files}")
    facts = look_at_data(config)
    samples = read_samples(str(tmp_path / "train-00000.h5"), 0, 5000)
    rows = packed_batch(samples, config.data.samples_per_row)["input_ids"]
    assert facts.filled == pytest.approx(samples.lengths.mean() / 128)
    assert facts.per_row == pytest.approx(5000 / len(rows))
    printed = printed_plan(capsys, "pod16_phase1", f"--data.packing rows {files}")
    assert f"{facts.per_row:.2f} a row, as the first of data.files pack" in printed


def test_shards_that_do_not_fit_the_config_are_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = write_shards(tmp_path, 64, 9, 1000).split()
    assert main(["--config", "pod16_phase1.json", "--plan", *files]) == 2
    assert "sequence length 64" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_on_a_cpu_a_micro_batch_is_measured(tmp_path, monkeypatch, capsys, packing):
    monkeypatch.chdir(tmp_path)
    files = write_shards(tmp_path, 48, 9, 1000)
    printed = printed_plan(capsys, "cpu_small", f"{SMALL} --training.compile off --data.packing {packing} {files}")
    printed = " ".join(printed.split())
    assert "cpu" in printed and "measured: a micro-batch of" in printed and "sequences/s" in printed
    assert "the whole run, 10,000 steps, 320,000 samples: about" in printed and "64.00 epochs" in printed
    assert ("one a row" in printed) == (packing == "off")
    assert os.listdir(str(tmp_path)) == ["train-00000.h5"]


NODES = [[Core(0, (0,))], [Core(1, (1,))]]


@pytest.mark.parametrize("seconds, better", [(0.9, True), (1.1, False)])
def test_one_process_on_each_numa_node_is_recommended_where_it_was_measured_to_be_faster(monkeypatch, seconds, better):
    monkeypatch.setattr("bert.plan.measured.measure", lambda config, rows: Measured("here", 100, 0.5, 0.25, NODES))
    monkeypatch.setattr("bert.plan.measured.measure_on", lambda cores, config, rows: Measured("", 100, seconds, 0.25))
    lines = " ".join(measured_report(config_of("cpu_small"), DataFacts(), ""))
    assert f"1 core of one of 2 NUMA nodes: 2 x {100 / seconds:.3g}" in lines.replace("rows/s", "")
    assert ("Faster: torchrun --nproc-per-node 2 run_pretraining.py" in lines) == better


@pytest.mark.slow
def test_with_the_cores_of_one_node_a_process_of_its_own_measures():
    cores = read_cores({min(os.sched_getaffinity(0))})
    config = config_of("cpu_small", f"{SMALL} --training.micro_batch_size 2 --device cpu")
    measured = measure_on(cores, config, 2)
    assert measured.machine.startswith("cpu (1 threads") and measured.micro_batch > 0


def test_processes_share_the_micro_batches(monkeypatch):
    monkeypatch.setattr("bert.plan.measured.measure", lambda config, rows: Measured("here", 16, 0.5, 0.25))
    monkeypatch.setenv("WORLD_SIZE", "8")
    lines = " ".join(
        measured_report(
            config_of("cpu_small", "--parallel.pipeline 2 --training.global_batch_size 256"), DataFacts(), ""
        )
    )
    # 256 rows in 4 copies are 4 micro-batches each, and filling takes as long as one more
    assert f"on 8 processes, if sending takes no time: {5 * 0.5 / 2 + 0.25 / 2:.3g} s a step" in lines
