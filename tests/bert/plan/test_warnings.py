"""What a plan for IPUs warns of: each warning where it should be, with settings that were tried."""

import glob
import os

import pytest

from bert.command_line import CONFIG_FOLDER
from bert.plan.warnings import warnings_of
from tests.bert.plan.plans import config_of, plan_of


def warnings_for(name, options=""):
    return warnings_of(config_of(name, options), plan_of(name, options))


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(CONFIG_FOLDER, "ipu", "*.json"))), ids=os.path.basename)
def test_the_pod_configs_fit(path):
    assert not any(line.startswith(("does not fit", "factor missing")) for line in warnings_for(path))


@pytest.mark.parametrize(
    "word, options",
    [
        ("tight", "--ipu.replication_factor 1"),
        ("unbalanced", "--ipu.layers_per_ipu [0,3,4,5]"),
        ("bubble", "--ipu.gradient_accumulation_steps 64"),
        ("partial sums", "--ipu.enable_half_partials false"),
        ("does not fit", "--ipu.micro_batch_size 128"),
    ],
)
def test_each_warning_comes_alone_where_it_should(word, options):
    assert warnings_for("pod16_phase1") == []
    warnings = [line.split(":")[0] for line in warnings_for("pod16_phase1", options) if line[0] != " "]
    assert warnings.count(word) == 1 and set(warnings) <= {word, "tight"}


def test_a_missing_factor_is_warned_of_where_logits_are_large(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"ipu": {"embedding_serialization_factor": null}}')
    (line,) = warnings_for(str(path))
    assert line.startswith("factor missing") and "ipu.embedding_serialization_factor, for example to 2" in line
    assert f"logits of {32 * 20 * 30522 * 2 / 2**20:.0f} MiB" in line
    (line,) = warnings_for(str(path), "--model.vocab_size 30517")
    assert "No number up to 100 divides model.vocab_size" in line
    small = warnings_for(str(path), "--model.vocab_size 50 --ipu.layers_per_ipu [3,3,3,3]")
    assert not any("factor" in line for line in small)


def test_what_does_not_fit_comes_with_settings_that_were_tried():
    lines = warnings_for("pod16_phase1", "--ipu.micro_batch_size 64 --ipu.gradient_accumulation_steps 256")
    assert "does not fit: IPU 1 needs" in lines[0]
    remedy = next(line for line in lines if "micro_batch_size 32, ipu.gradient_accumulation_steps 512" in line)
    fullest = max(memory.total for memory in plan_of("pod16_phase1").memory) / 2**20
    assert remedy.endswith(f": {fullest:.0f} MiB")


def test_float16_is_the_first_remedy_of_float32():
    geometry = "--ipu.micro_batch_size 31 --ipu.gradient_accumulation_steps 528 --training.global_batch_size 65472"
    lines = warnings_for("pod16_phase1", f"--training.precision float32 {geometry}")
    assert lines[1].startswith('  training.precision "auto": ') and lines[1].endswith(" MiB")
    assert lines[2].endswith("still too much")


@pytest.mark.parametrize("instances, helps", [(1, True), (4, False)])
def test_sharding_is_no_remedy_where_each_process_has_one_replica(instances, helps):
    options = f"--ipu.micro_batch_size 128 --ipu.instances {instances} --ipu.replicated_tensor_sharding"
    whole, sharded = (plan_of("pod16_phase1", f"{options} {value}").fullest_share for value in ("false", "true"))
    assert sharded < whole if helps else sharded == whole
    lines = warnings_for("pod16_phase1", f"{options} false")
    assert any("ipu.replicated_tensor_sharding true" in line for line in lines) == helps


def test_where_nothing_is_enough_more_ipus_are_named():
    lines = warnings_for("large_pod16_phase1", "--ipu.layers_per_ipu [24] --ipu.matmul_proportion 0.2")
    assert any("all of these together" in line and "still too much. More IPUs" in line for line in lines)


def test_a_better_balance_is_tried_before_it_is_named():
    (line,) = (line for line in warnings_for("large_pod16_phase1") if line.startswith("unbalanced"))
    even = plan_of("large_pod16_phase1", "--ipu.layers_per_ipu [6,6,6,6]")
    gain = 1 - even.slowest_work / plan_of("large_pod16_phase1").work_of(1)
    assert f"[6, 6, 6, 6]: {100 * gain:.0f} % less work" in line and f"{100 * even.fullest_share:.0f} % full" in line
    assert 0.05 < gain < 0.15
