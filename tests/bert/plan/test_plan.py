"""The plan: the graph's figures against formulas and facts, warnings, the picture's schedule, and the command."""

import functools
import glob
import json
import os

import numpy as np
import pytest
import torch

from bert.command_line import CONFIG_FOLDER, parse_command_line
from bert.model.stages import make_stages
from bert.plan.ipu_plan import IPU_BYTES, make_ipu_plan, temporaries
from bert.plan.measure import Measured
from bert.plan.measured import measured_report
from bert.plan.picture import visits_of
from bert.plan.report import ipu_report, is_for_ipu
from bert.plan.speed import calibrate, other_pods, speed_of
from bert.plan.step import DataFacts, look_at_data
from bert.plan.trace import trace
from bert.plan.warnings import warnings_of
from bert.tasks import make_model, make_task
from bert.text import duration
from data.errors import InputError
from data.rows import packed_batch
from data.shards import read_samples, write_shard
from ops.ipu import MATMULS, is_lowering
from run_pretraining import main
from tests.make_samples import random_samples

SMALL = [
    "--model.vocab_size",
    "1000",
    "--model.hidden_size",
    "64",
    "--model.num_hidden_layers",
    "5",
    "--model.num_attention_heads",
    "2",
    "--model.intermediate_size",
    "160",
    "--model.max_position_embeddings",
    "64",
    "--data.sequence_length",
    "48",
    "--data.mask_tokens",
    "9",
    "--ipu.layers_per_ipu",
    "[1, 2, 2]",
]


@functools.lru_cache(maxsize=None)
def config_of(name, *changes):
    return parse_command_line(["--config", name, *changes])


@functools.lru_cache(maxsize=None)
def plan_of(*arguments):
    return make_ipu_plan(config_of(*arguments))


def parameters_of(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(config, make_task(config)).parameters())


def useful_flops(config):
    """Of a sample, forward and backward, by the formula of the recipe."""
    model, data = config.model, config.data
    hidden, length, layers = model.hidden_size, data.sequence_length, model.num_hidden_layers
    encoder = (
        6 * layers * (4 * hidden * hidden + 2 * hidden * model.intermediate_size) * length
        + 12 * layers * hidden * length**2
    )
    return encoder + 6 * data.mask_tokens * (hidden * hidden + hidden * model.vocab_size)


@pytest.mark.parametrize(
    "arguments",
    [
        ["pod16_phase1"],
        ["pod16_phase2"],
        ["pod16_phase2", "--ipu.layers_per_ipu", "[3, 3, 3, 3]"],
        ["pod16_phase1", "--ipu.layers_per_ipu", "[12]"],
        ["pod16_phase1", *SMALL],
    ],
)
def test_parameters_and_work_of_the_stages_are_the_models(arguments):
    config = config_of(*arguments)
    found = plan_of(*arguments)
    assert sum(one.parameters for one in found.stages) == parameters_of(config)
    work = sum(one.forward + one.backward for one in found.stages) / config.ipu.micro_batch_size
    assert work == pytest.approx(useful_flops(config), rel=0.02)


@pytest.mark.parametrize("phase, gflop", [(1, 70), (2, 301)])
def test_the_recipes_work_per_sample_comes_out_of_the_graph(phase, gflop):
    work = sum(one.forward + one.backward for one in plan_of(f"pod16_phase{phase}").stages)
    assert work / config_of(f"pod16_phase{phase}").ipu.micro_batch_size == pytest.approx(gflop * 1e9, rel=0.01)


def test_the_trace_names_every_product_and_leaves_nothing_behind():
    found = trace(config_of("pod16_phase1", *SMALL, "--ipu.embedding_serialization_factor", "4"))
    products = [one for one in found.operations if one.flops]
    assert set(MATMULS) <= {one.name for one in products} and not is_lowering()
    assert [one.parts for one in products if one.name == "mlm_decoder"] == [4]
    assert {one.name: one.gradients for one in products}["select_tokens"] == 1  # its positions have no gradient
    assert len(found.checkpoints) == 5
    assert {one.block for one in found.operations} == {block for one in found.stages for block in one.blocks}


def test_the_recipes_pipeline_is_popart_s():
    found = plan_of("pod16_phase1")
    assert (found.cycles, found.filling) == (512 + 8, 8)
    assert [one.stashed for one in found.stages] == [9, 7, 5, 3, 1]
    tokens = 32 * 128
    # Four layers' inputs and the samples' ids, in float16.
    assert [one.stash for one in found.stages[1:4]] == [4 * tokens * 768 * 2 + tokens * 2] * 3
    assert [one.recompute == one.forward for one in found.stages] == [True] * 4 + [False] and found.stages[
        -1
    ].recompute == 0
    assert found.memory[1].parts["stashes"] > found.memory[2].parts["stashes"] > found.memory[3].parts["stashes"]
    assert found.slowest == 1 and 0 < found.work_of(0) < 0.2 * found.work_of(1) == 0.2 * found.work_of(3)


def test_one_ipu_has_no_pipeline_and_recomputes_nothing():
    found = plan_of("pod16_phase1", *SMALL, "--ipu.layers_per_ipu", "[5]")
    assert (found.cycles, found.filling, len(found.stages), found.stages[0].recompute) == (512, 0, 1, 0)


def test_work_and_stashes_grow_with_the_micro_batch_and_weights_do_not():
    one, two = plan_of("pod16_phase2", "--ipu.micro_batch_size", "4"), plan_of("pod16_phase2")
    for less, more in zip(one.stages, two.stages):
        assert (more.forward, more.backward, more.stash) == (2 * less.forward, 2 * less.backward, 2 * less.stash)
    for less, more in zip(one.memory, two.memory):
        assert (less.parts["weights"], less.parts["gradients"], less.parts["optimizer"]) == (
            more.parts["weights"],
            more.parts["gradients"],
            more.parts["optimizer"],
        )
        assert (
            less.parts["activations"] < more.parts["activations"]
            and less.parts["temporaries"] <= more.parts["temporaries"]
        )


def test_checkpoints_of_layers_cost_stashes_and_save_activations():
    with_them, without = (
        plan_of("pod16_phase1"),
        plan_of("pod16_phase1", "--ipu.recompute_checkpoint_every_layer", "false"),
    )
    for more, less in zip(with_them.memory[1:], without.memory[1:]):
        assert (
            less.parts["stashes"] < 0.3 * more.parts["stashes"]
            and less.parts["activations"] > 2 * more.parts["activations"]
        )


def test_the_optimizers_state_is_split_over_replicas_halved_or_off_the_chip():
    def states(*changes):
        return [one.parts["optimizer"] for one in plan_of("pod16_phase1", *changes).memory]

    weights = [one.parts["weights"] for one in plan_of("pod16_phase1").memory]
    assert states() == [
        size * 3 // 4 for size in weights
    ]  # 2 + 4 bytes a parameter beside the weight's 2, over 4 replicas
    assert states("--ipu.replicated_tensor_sharding", "false") == [3 * size for size in weights]
    assert states("--ipu.replication_factor", "1") == [3 * size for size in weights]
    assert states("--ipu.enable_half_first_order_momentum", "false") == weights
    assert states("--ipu.optimizer_state_offchip", "true") == [0] * 4
    assert states("--training.precision", "float32") == weights  # 4 + 4 bytes a parameter, over 4 replicas


def test_temporaries_stay_within_the_memory_proportion_and_a_factor_makes_them_less():
    for share in (0.1, 0.22):
        memory = plan_of("pod16_phase2", "--ipu.matmul_proportion", str(share)).memory
        assert max(one.parts["temporaries"] for one in memory) == int(share * IPU_BYTES)
    proportions = "--ipu.operation_proportions", json.dumps({"output": 0.05, "intermediate": 0.05})
    assert plan_of("pod16_phase2", *proportions).memory[1].total < plan_of("pod16_phase2").memory[1].total
    parts = [
        plan_of("pod16_phase1", "--ipu.embedding_serialization_factor", str(factor)).memory[0].total
        for factor in (1, 2, 6)
    ]
    assert parts[0] > parts[1] > parts[2]


def test_float32_takes_twice_the_memory_and_a_quarter_of_the_speed():
    half, full = plan_of("pod16_phase1"), plan_of("pod16_phase1", "--training.precision", "float32")
    assert (
        full.memory[1].parts["weights"] == 2 * half.memory[1].parts["weights"]
        and full.stages[1].forward == half.stages[1].forward
    )
    assert full.peak_flops == half.peak_flops / 4


def test_the_calibration_gives_back_the_published_speed():
    config, found, speed = calibrate()
    assert config.training.global_batch_size / speed_of(found, speed.efficiency).step == pytest.approx(2409)
    assert 0.2 < speed.efficiency < 0.5
    assert any("about 2,409 sequences/s" in line for line in ipu_report(config, found, look_at_data(config)))


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(CONFIG_FOLDER, "ipu", "*.json"))), ids=os.path.basename)
def test_the_pod_configs_fit(path):
    config = config_of(path)
    assert not any(
        line.startswith(("does not fit", "factor missing")) for line in warnings_of(config, make_ipu_plan(config))
    )


WARNINGS = [
    ("tight", ["--ipu.replication_factor", "1"]),
    ("unbalanced", ["--ipu.layers_per_ipu", "[0, 3, 4, 5]"]),
    ("bubble", ["--ipu.gradient_accumulation_steps", "64"]),
    ("does not fit", ["--ipu.micro_batch_size", "128"]),
]


@pytest.mark.parametrize("word, changes", WARNINGS)
def test_each_warning_comes_alone_where_it_should(word, changes):
    assert warnings_of(config_of("pod16_phase1"), plan_of("pod16_phase1")) == []
    lines = [
        line
        for line in warnings_of(config_of("pod16_phase1", *changes), plan_of("pod16_phase1", *changes))
        if line[0] != " "
    ]
    assert len([line for line in lines if line.startswith(word)]) == 1
    assert {line.split(":")[0] for line in lines} <= {word, "tight"}


def test_a_missing_factor_is_warned_of_where_logits_are_large(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"ipu": {"embedding_serialization_factor": None}}))
    large, small = (
        config_of(str(path)),
        config_of(str(path), "--model.vocab_size", "50", "--ipu.layers_per_ipu", "[3, 3, 3, 3]"),
    )
    (line,) = warnings_of(large, make_ipu_plan(large))
    assert line.startswith("factor missing") and "ipu.embedding_serialization_factor, for example to 2" in line
    assert f"logits of {32 * 20 * 30522 * 2 / 2**20:.0f} MiB" in line
    assert not any("factor" in line for line in warnings_of(small, make_ipu_plan(small)))


def test_what_does_not_fit_comes_with_settings_that_were_tried():
    config = config_of("pod16_phase1", "--ipu.micro_batch_size", "64", "--ipu.gradient_accumulation_steps", "256")
    lines = warnings_of(config, make_ipu_plan(config))
    assert "does not fit: IPU 1 needs" in lines[0]
    remedy = next(line for line in lines if "micro_batch_size 32, ipu.gradient_accumulation_steps 512" in line)
    fullest = max(one.total for one in plan_of("pod16_phase1").memory) / 2**20
    assert remedy.endswith(f": {fullest:.0f} MiB")
    full = config_of(
        "pod16_phase1",
        "--training.precision",
        "float32",
        "--ipu.micro_batch_size",
        "31",
        "--ipu.gradient_accumulation_steps",
        "528",
        "--training.global_batch_size",
        str(31 * 528 * 4),
    )
    lines = warnings_of(full, make_ipu_plan(full))
    assert (
        lines[1].startswith('  training.precision "auto": ')
        and lines[1].endswith(" MiB")
        and lines[2].endswith("still too much")
    )
    hopeless = config_of("large_pod16_phase1", "--ipu.layers_per_ipu", "[24]", "--ipu.matmul_proportion", "0.2")
    assert any(
        "all of these together" in line and "still too much. More IPUs" in line
        for line in warnings_of(hopeless, make_ipu_plan(hopeless))
    )


def test_a_better_balance_is_tried_before_it_is_named():
    config = config_of("large_pod16_phase1")
    line = next(line for line in warnings_of(config, make_ipu_plan(config)) if line.startswith("unbalanced"))
    even = plan_of("large_pod16_phase1", "--ipu.layers_per_ipu", "[6, 6, 6, 6]")
    gain = 1 - even.work_of(even.slowest) / make_ipu_plan(config).work_of(1)
    assert f"[6, 6, 6, 6]: {100 * gain:.0f} % less work" in line and f"{100 * even.fullest:.0f} % full" in line
    assert 0.05 < gain < 0.15


def test_the_fullest_of_a_backward_pass_is_what_a_hand_counts():
    rows, hidden, inner, heads = 32 * 128, 768, 3072, 12
    product = plan_of("pod16_phase1", "--ipu.matmul_proportion", "1.0").trace
    mlp = next(one for one in product.operations if one.name == "intermediate" and one.block == "layer0")
    a, b, c = rows * hidden * 2, hidden * inner * 2, rows * inner * 2
    assert temporaries(product, mlp, True) == int(3 * (a * b * c * 1472) ** (1 / 3))
    assert temporaries(product, mlp, False) == int(3 * (a * b * 2 * c * 1472) ** (1 / 3))
    # In the backward pass of a layer, at the gradient of its last product: what the products, softmax, GELU and norms
    # keep, and gradients.
    saved = next(one for one in plan_of("pod16_phase1").memory if one.operation == "output of layer0").parts[
        "activations"
    ]
    kept = 2 * (rows * hidden * 6 + rows * inner * 2 + 2 * heads * 32 * 128 * 128)
    assert 0.8 * kept < saved < 2.2 * kept


def test_the_estimate_of_another_config_is_its_own():
    efficiency = calibrate()[2].efficiency
    assert efficiency == pytest.approx(0.315, abs=0.001)
    phase1 = speed_of(plan_of("pod16_phase1"), efficiency)
    assert phase1.step == pytest.approx(953.5e9 / (0.3152 * 250e12) * 520, rel=1e-3)
    config, pods = config_of("pod16_phase1"), dict()
    for pod, seconds, fits in other_pods(config, plan_of("pod16_phase1"), phase1):
        pods[pod] = seconds, fits
    assert sorted(pods) == [4, 8, 32, 64]
    assert pods[64] == (pytest.approx(speed_of(plan_of("pod64_phase1"), efficiency).step), True)
    large = config_of("large_pod16_phase1")
    assert {pod: fits for pod, _, fits in other_pods(large, make_ipu_plan(large), phase1)} == {
        4: False,
        8: False,
        32: True,
        64: True,
    }


def test_the_run_takes_its_steps_times_a_step():
    config = config_of("pod16_phase1")
    lines = ipu_report(config, plan_of("pod16_phase1"), DataFacts(1000000, 0.9, 1.05))
    seconds = 10500 * speed_of(plan_of("pod16_phase1"), calibrate()[2].efficiency).step
    assert any(f"about {duration(seconds)}, {10500 * 65536 / 1e6:.2f} epochs" in line for line in lines)
    assert any("about 7,549,747 tokens, which fill 90 % of the slots" in line for line in lines)


def test_what_was_measured_is_scaled_to_a_step_and_a_run(monkeypatch):
    monkeypatch.setattr("bert.plan.measured.measure", lambda config, rows: Measured("here", 100, 0.5, 0.25))
    config = config_of("cpu_small")  # 256 samples a step, 10,000 steps
    lines = " ".join(measured_report(config, DataFacts(25600, 0.9, 1.0), ""))
    assert "3 micro-batches" in lines and f"3 x 0.500 s + 0.250 s = 1.75 s, {256 / 1.75:.3g} sequences/s" in lines
    assert "about 4 h 52 min, 100.00 epochs" in lines


@pytest.mark.parametrize("layers", ["[1, 2, 2]", "[0, 5]", "[5]"])
def test_the_pictures_schedule_does_everything_once_and_in_order(layers):
    found = plan_of("pod16_phase1", *SMALL, "--ipu.layers_per_ipu", layers, "--ipu.gradient_accumulation_steps", "12")
    done, last = {}, len(found.stages) - 1
    for cycle in range(found.cycles):
        for ipu in range(len(found.memory)):
            end = 0.0
            for stage, phase, micro_batch, begin, stop in visits_of(found, ipu, cycle):
                assert begin == end and (stage, phase, micro_batch) not in done and found.stages[stage].stage.ipu == ipu
                end, done[stage, phase, micro_batch] = stop, (cycle, begin)
            assert end <= 1.1
    assert len(done) == 12 * (3 * last + 2)
    for micro_batch in range(12):
        order = [done[stage, "forward", micro_batch] for stage in range(last + 1)]
        order += [done[stage, "backward", micro_batch] for stage in reversed(range(last + 1))]
        assert order == sorted(order)
    assert [done[stage, "backward", 0][0] - done[stage, "forward", 0][0] + 1 for stage in range(last + 1)] == [
        one.stashed for one in found.stages
    ]


def test_which_plan_it_is():
    assert is_for_ipu(config_of("pod16_phase1"))[0] and is_for_ipu(config_of("pod4_phase2", "--device", "ipu"))[0]
    assert not is_for_ipu(config_of("pod16_phase1", "--device", "cpu"))[0]
    for_ipu, why = is_for_ipu(config_of("quickstart"))
    assert not for_ipu and "ipu.gradient_accumulation_steps" in why
    for broken in (
        ["--ipu.gradient_accumulation_steps", "510"],
        ["--ipu.layers_per_ipu", "[0, 12, 0]"],
        ["--ipu.embedding_serialization_factor", "5"],
    ):
        key = "training.global_batch_size" if "510" in broken else broken[0][2:]
        with pytest.raises(InputError, match=f"{key} is .*--device cpu, or --device cuda"):
            is_for_ipu(config_of("pod16_phase1", *broken))


def test_ipus_that_cannot_run_the_config_are_an_error_as_in_training(monkeypatch, capsys):
    monkeypatch.setattr("bert.plan.measure.choose_device", lambda wanted: ("ipu", "4 IPUs"))
    assert main(["--config", "quickstart.json", "--plan"]) == 2
    assert "training.global_batch_size is 32" in capsys.readouterr().err


def shards_of(tmp_path, length, masks, vocab):
    samples = random_samples(np.random.default_rng(0), 5000, length, masks, vocab)
    write_shard(str(tmp_path / "train-00000.h5"), samples, vocab, "0" * 64, {})
    return ["--data.files", str(tmp_path / "train-*.h5")]


def test_the_command_prints_the_plan_and_writes_the_picture_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "pod16_phase2.json", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        os.listdir(str(tmp_path)) == ["plan-pod16_phase2.svg"]
        and b"<svg" in (tmp_path / "plan-pod16_phase2.svg").read_bytes()
    )
    assert max(map(len, lines)) <= 120
    for words in (
        "16 IPUs",
        "layers4-7",
        "897",
        "an estimate",
        "about 2,409 sequences/s",
        "no shards at shards/wikipedia-512",
        "No warnings.",
        "8 of the cycles fill and drain the pipeline: 1.5 %",
        "POD64",
        "plan-pod16_phase2.svg",
        "--device cpu",
    ):
        assert any(words in line for line in lines), words


def test_shards_tell_the_epochs_and_how_many_samples_share_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = shards_of(tmp_path, 128, 20, 30522)
    assert main(["--config", "pod16_phase1.json", "--plan", *files]) == 0
    printed = capsys.readouterr().out
    assert f"{10500 * 65536 / 5000:,.2f} epochs" in printed and "% of the slots" in printed
    assert main(["--config", "pod16_phase1.json", "--plan", "--data.packing", "rows", *files]) == 0
    facts = look_at_data(config_of("pod16_phase1", "--data.packing", "rows", *files))
    samples = read_samples(str(tmp_path / "train-00000.h5"), 0, 5000)
    assert facts.filled == pytest.approx(samples.lengths.mean() / 128)
    assert facts.per_row == pytest.approx(
        5000 / len(packed_batch(samples, config_of("pod16_phase1").data.samples_per_row)["input_ids"])
    )
    assert f"{facts.per_row:.2f} a row, as the first of data.files pack" in capsys.readouterr().out


def test_shards_that_do_not_fit_the_config_are_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "pod16_phase1.json", "--plan", *shards_of(tmp_path, 64, 9, 1000)]) == 2
    assert "sequence length 64" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.slow
def test_on_a_cpu_a_micro_batch_is_measured(tmp_path, monkeypatch, capsys, packing):
    monkeypatch.chdir(tmp_path)
    files = shards_of(tmp_path, 48, 9, 1000)
    arguments = [
        "--config",
        "cpu_small.json",
        *SMALL,
        "--plan",
        "--training.compile",
        "off",
        "--data.packing",
        packing,
        *files,
    ]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "cpu" in printed and "measured: a micro-batch of" in printed and "sequences/s" in printed
    assert "the whole run, 10,000 steps, 2,560,000 samples: about" in printed and "512.00 epochs" in printed
    assert ("one a row" in printed) == (packing == "off")
    assert os.listdir(str(tmp_path)) == ["train-00000.h5"]
