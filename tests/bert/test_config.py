"""Configs: the recipes number for number, overrides, and every error's words."""

import dataclasses
import glob
import json
import os
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from benchmarks.synthetic import draw_lengths
from bert.command_line import CONFIG_FOLDER, TYPES, parse_command_line
from bert.config import OptimizerConfig
from bert.schedules import learning_rate_at
from data.errors import InputError
from data.packing import largest_prefix
from data.rows import RowShape
from run_pretraining import main
from tests import ROOT

SCHEMA_PATH = os.path.join(CONFIG_FOLDER, "schema.json")


def write_config(folder, **values):
    path = folder / "own.json"
    path.write_text(json.dumps(values))
    return str(path)


PODS = {"pod4": 1, "pod8": 2, "pod16": 4, "pod64": 16}  # replicas of four IPUs


def pod_config(pod, phase, large=False, packed=False):
    return parse_command_line(
        ["--config", f"{'large_' * large}{pod}_phase{phase}{'_packed' * packed}.json", "--device", "ipu"]
    )


def differing(one, other):
    """The keys in which two configs differ, but for the name of the run's folder."""
    one, other = dataclasses.asdict(one), dataclasses.asdict(other)
    differing = {key for key in one if not isinstance(one[key], dict) and one[key] != other[key]}
    for section in (key for key in one if isinstance(one[key], dict)):
        differing |= {f"{section}.{key}" for key in one[section] if one[section][key] != other[section][key]}
    return differing - {"training.output"}


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("phase", [1, 2])
def test_pod_configs_are_the_recipe(pod, phase):
    config = pod_config(pod, phase)
    pick = {
        1: (128, 20, 10500, 32, 65536, 0.006, 0.28, 16384.0, 1, 0.25),
        2: (512, 76, 2038, 8, 16384, 0.002828, 0.128, 128.0, 2, 0.22),
    }[phase]
    training, ipu = config.training, config.ipu
    assert (
        config.data.sequence_length,
        config.data.mask_tokens,
        training.max_steps,
        ipu.micro_batch_size,
        training.global_batch_size,
        config.optimizer.learning_rate,
        config.optimizer.warmup_ratio,
        ipu.loss_scaling,
        ipu.embedding_serialization_factor,
        ipu.matmul_proportion,
    ) == pick
    assert (ipu.replication_factor, ipu.gradient_accumulation_steps, ipu.device_iterations) == (
        PODS[pod],
        2048 // PODS[pod],
        1,
    )
    assert (config.optimizer.betas, config.optimizer.eps, config.optimizer.weight_decay) == ([0.9, 0.999], 1e-8, 0.01)
    assert (training.seed, training.log_every, training.save_every, ipu.layers_per_ipu) == (42, 5, 100, [0, 4, 4, 4])
    model = config.model
    assert (
        model.vocab_size,
        model.hidden_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.intermediate_size,
        model.max_position_embeddings,
        model.layer_norm_eps,
        model.initializer_range,
        model.hidden_dropout_prob,
        model.attention_probs_dropout_prob,
    ) == (30522, 768, 12, 12, 3072, 512, 1e-3, 0.02, 0.1, 0.1)
    assert config.data.workers == {1: 64, 2: 128}[phase]
    assert training.output == f"runs/{pod}_phase{phase}"


@pytest.mark.parametrize("phase, micro_batch", [(1, 8), (2, 2)])
def test_bert_large_has_the_recipe_with_sizes_and_a_placement_of_its_own(phase, micro_batch):
    large = pod_config("pod16", phase, large=True)
    model, ipu = large.model, large.ipu
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads, model.intermediate_size) == (
        1024,
        24,
        16,
        4096,
    )
    assert (ipu.layers_per_ipu, ipu.matmul_proportion) == ([3, 7, 7, 7], [0.14, 0.19, 0.19, 0.19])
    assert (
        ipu.micro_batch_size,
        ipu.gradient_accumulation_steps,
        ipu.loss_scaling,
        ipu.embedding_serialization_factor,
    ) == (micro_batch, 2048, 32768.0, 2)
    assert differing(pod_config("pod16", phase), large) <= {
        "model." + key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    } | {
        "ipu." + key
        for key in (
            "layers_per_ipu",
            "matmul_proportion",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "loss_scaling",
            "embedding_serialization_factor",
        )
    }


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pod_of_another_size_accumulates_to_the_same_global_batch(large, phase, packed):
    of_pod16 = pod_config("pod16", phase, large, packed)
    for pod, replicas in PODS.items():
        config = pod_config(pod, phase, large, packed)
        state = (
            {"ipu.optimizer_state_offchip"} if large and replicas < 4 else set()
        )  # for BERT-large's, split over fewer replicas, no room
        geometry = {"ipu.replication_factor", "ipu.gradient_accumulation_steps", "ipu.instances"}
        assert differing(of_pod16, config) <= geometry | state
        ipu = config.ipu
        assert ipu.replication_factor == replicas and ipu.instances == max(1, replicas // 4)
        assert ipu.micro_batch_size * ipu.gradient_accumulation_steps * replicas == of_pod16.training.global_batch_size


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("phase, length, mask_tokens", [(1, 128, 20), (2, 512, 76)])
def test_packed_configs_differ_in_their_rows_which_hold_the_recipes_samples(large, phase, length, mask_tokens):
    packed, plain = pod_config("pod16", phase, large, packed=True), pod_config("pod16", phase, large)
    assert (packed.data.packing, plain.data.packing) == ("rows", "auto")
    assert differing(plain, packed) <= {
        "data.packing",
        "data.samples_per_row",
        "training.global_batch_size",
        "ipu.gradient_accumulation_steps",
    }
    # As many samples as fit the rows of one step, of lengths like Wikipedia's.
    samples = 2 * plain.training.global_batch_size
    lengths = draw_lengths("wikipedia", samples, length, np.random.default_rng(0))
    counts = np.clip(np.round(0.15 * lengths), 1, mask_tokens).astype(np.int64)
    per_row = packed.data.samples_per_row
    shape = RowShape.of(length, mask_tokens, per_row)
    fitting = largest_prefix(lengths, counts, packed.training.global_batch_size, *shape)
    assert len(fitting.row) == pytest.approx(plain.training.global_batch_size, rel=0.03)


@pytest.mark.parametrize(
    "name", ["gpu_phase1", "gpu_phase2.json", "gpu24_base", "gpu24_small", "cpu_small.json", "quickstart.json"]
)
def test_other_configs_are_valid_and_found_by_bare_name(name):
    assert parse_command_line(["--config", name]).training.max_steps > 0


@pytest.mark.parametrize("name", ["configs/pod16_phase1.json", "configs/ipu/pod16_phase1.json", "pod16_phase1"])
def test_a_pods_config_is_found_where_it_is_and_where_it_was(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse_command_line(["--config", name]) == parse_command_line(["--config", "pod16_phase1.json"])
    absolute = os.path.join(ROOT, "configs", "pod64_phase2.json")
    assert parse_command_line(["--config", absolute]).training.output == os.path.join("runs", "pod64_phase2")


def test_command_line_overrides_the_file(tmp_path):
    path = write_config(tmp_path, training={"max_steps": 7, "log_every": 3}, data={"files": "a/*.h5"})
    config = parse_command_line(
        [
            "--config=" + path,
            "--optimizer.learning_rate",
            "1e-3",
            "--data.files",
            "shards/*.h5",
            "--training.max_steps",
            "20",
            "--device",
            "cpu",
            "--optimizer.betas",
            "[0.8, 0.9]",
        ]
    )
    assert (
        config.optimizer.learning_rate == 1e-3
        and config.data.files == ["shards/*.h5"]
        and config.optimizer.betas == [0.8, 0.9]
    )
    assert (config.training.max_steps, config.training.log_every, config.device) == (20, 3, "cpu")
    assert parse_command_line(["--data.files", '["a.h5", "b.h5"]']).data.files == ["a.h5", "b.h5"]


def test_options_override_the_file_wherever_config_stands():
    config = parse_command_line(["--training.max_steps=7", "--config", "pod64_phase1.json", "--ipu.loss_scaling", "2"])
    assert (config.training.max_steps, config.ipu.loss_scaling, config.ipu.replication_factor) == (7, 2.0, 16)


def test_a_config_holds_plain_numbers(tmp_path):
    """Not the parser's types: they would reach compiled graphs and other processes."""
    path = write_config(tmp_path, optimizer={"weight_decay": "0.5"}, ipu={"operation_proportions": {"output": 0.5}})
    config = parse_command_line(["--config", path, "--model.hidden_size", "1200", "--optimizer.betas", "[0.8, 0.9]"])
    assert type(config.model.hidden_size) is int and config.model.hidden_size == 1200
    assert type(config.optimizer.weight_decay) is float and config.optimizer.weight_decay == 0.5
    assert {type(value) for value in (*config.optimizer.betas, *config.ipu.operation_proportions.values())} == {float}


@pytest.mark.parametrize("flag", ["--plan", "--compile-only", "--compile_only", "--ipu-model", "--ipu_model"])
def test_a_flag_needs_no_value_and_takes_one(flag, tmp_path):
    name = flag[2:].replace("-", "_")
    assert getattr(parse_command_line([flag, "--device", "ipu"]), name) is True
    assert getattr(parse_command_line(["--device", "ipu", f"{flag}=false"]), name) is False
    assert getattr(parse_command_line(["--config", write_config(tmp_path, **{name: True})]), name) is True


def test_a_config_replaces_the_lines_of_its_base(tmp_path):
    (tmp_path / "base.json").write_text(
        json.dumps({"optimizer": {"learning_rate": 0.5, "betas": [0.1, 0.2]}, "training": {"seed": 1}})
    )
    (tmp_path / "below").mkdir()
    path = write_config(tmp_path / "below", base="../base.json", optimizer={"learning_rate": 0.25})
    config = parse_command_line(["--config", path, "--training.seed", "3"])
    assert (config.optimizer.learning_rate, config.optimizer.betas, config.training.seed) == (0.25, [0.1, 0.2], 3)
    assert config.training.output == "runs/own"


def test_an_error_in_a_base_names_the_base(tmp_path):
    (tmp_path / "base.json").write_text('{"model": {"hidden_size": 0}}')
    with pytest.raises(InputError, match="base.json: model.hidden_size is 0, expected an integer above 0"):
        parse_command_line(["--config", write_config(tmp_path, base="base.json")])


def test_bases_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "other.json").write_text('{"base": "own.json"}')
    with pytest.raises(InputError, match='other.json: base is "own.json", expected none, as .*own.json is based on'):
        parse_command_line(["--config", write_config(tmp_path, base="other.json")])


CONFIGS = sorted(set(glob.glob(os.path.join(CONFIG_FOLDER, "**", "*.json"), recursive=True)) - {SCHEMA_PATH})


@pytest.fixture(scope="module")
def schema():
    with open(SCHEMA_PATH, encoding="utf-8") as file:
        return json.load(file)


def test_the_schema_is_what_its_command_prints():
    command = [sys.executable, "-m", "bert.command_line", "--schema"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with open(SCHEMA_PATH, encoding="utf-8") as file:
        assert file.read() == printed, "python -m bert.command_line --schema > configs/schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_every_config_is_valid_against_the_schema_that_it_names(path, schema):
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    assert os.path.normpath(os.path.join(os.path.dirname(path), config["$schema"])) == SCHEMA_PATH
    jsonschema.validate(config, schema)


@pytest.mark.parametrize(
    "config",
    [
        {"modle": {}},
        {"model": {"hiden_size": 8}},
        {"model": {"hidden_size": 0}},
        {"model": {"hidden_size": None}},
        {"model": {"hidden_dropout_prob": 1}},
        {"device": "tpu"},
        {"training": {"micro_batch_size": 0}},
        {"ipu": {"matmul_proportion": [0.1, 2]}},
        {"ipu": {"operation_proportions": {"mlm_decoder": 0}}},
        {"base": 3},
    ],
)
def test_a_wrong_key_and_a_wrong_value_are_not_valid(config, schema):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, schema)


def test_the_schema_describes_every_key(schema):
    jsonschema.Draft7Validator.check_schema(schema)
    sections = [value for value in schema["properties"].values() if value.get("type") == "object"]
    keys = [key for section in [schema, *sections] for key in section["properties"].values()]
    assert len(sections) == 7 and all(key["description"] for key in keys)
    assert schema["properties"]["training"]["properties"]["log_every"] == {
        "description": "Steps between two lines of metrics.",
        "type": "integer",
        "exclusiveMinimum": 0,
        "default": 5,
    }


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_begins_with_commands_and_has_a_line_for_each_setting_but_those_of_ipus(capsys):
    lines = printed(capsys, "--config", "quickstart.json", "--help").splitlines()
    assert [line.split()[:2] for line in lines[1:6:2]] == [["python", "run_pretraining.py"]] * 3
    assert max(map(len, lines)) <= 120 and len(lines) <= 110
    keys = {line.split()[0][2:] for line in lines if line.startswith("  --")}
    of_ipus = {key for key in TYPES if key.startswith("ipu")} | {"compile_only"}
    assert keys == set(TYPES) - of_ipus
    line = next(line for line in lines if "--optimizer.learning_rate" in line)
    assert line.split(None, 2) == ["--optimizer.learning_rate", "0.006", "The peak"]


@pytest.mark.parametrize("section", ["ipu", "optimizer", "training"])
def test_help_of_a_section_says_all_of_each_setting(section, capsys, schema):
    text = " ".join(printed(capsys, f"--help-{section}").split())
    for key, value in schema["properties"][section]["properties"].items():
        assert f"--{section}.{key} {value['description']}" in text
    assert ("--compile_only" in text) == (section == "ipu")


def test_print_config_prints_a_file_with_all_settings(tmp_path, capsys):
    options = ["--config", "pod16_phase2.json", "--training.max_steps", "7"]
    path = tmp_path / "printed.json"
    path.write_text(printed(capsys, *options, "--print_config"))
    own, config = parse_command_line(["--config", str(path)]), parse_command_line(options)
    assert own.training.output == "runs/printed" and differing(own, config) == set()
    assert set(json.loads(path.read_text())) >= {"device", "plan", "model", "ipu"}
    assert json.loads(printed(capsys, "--print_config=skip_default", "--data.workers", "3")) == {"data": {"workers": 3}}


BAD = [
    ({"modle": {}}, ["own.json", "modle", "did you mean model"]),
    ({"model": {"hiden_size": 8}}, ["own.json", "model.hiden_size", "did you mean model.hidden_size"]),
    ({"model": {"hidden_size": "big"}}, ["own.json", "model.hidden_size", "big", "int"]),
    ({"model": {"hidden_size": 8.5}}, ["own.json", "model.hidden_size", "8.5", "int"]),
    ({"model": 3}, ["own.json", "model is 3", "expected an object"]),
    ({"device": "tpu"}, ["own.json", "device", "tpu", "cuda"]),
    (
        {"model": {"hidden_size": 100}},
        ["own.json", "model.hidden_size is 100", "multiple of model.num_attention_heads, 12"],
    ),
    (
        {"device": "ipu", "ipu": {"layers_per_ipu": [0, 4, 4]}},
        ["own.json", "ipu.layers_per_ipu is [0, 4, 4]", "add up to model.num_hidden_layers, 12"],
    ),
    (
        {"device": "ipu", "ipu": {"matmul_proportion": [0.1, 0.2]}},
        ["own.json", "ipu.matmul_proportion", "each of the 4 IPUs"],
    ),
    ({"ipu": {"matmul_proportion": 1.5}}, ["own.json", "ipu.matmul_proportion is 1.5"]),
    (
        {"device": "ipu", "training": {"global_batch_size": 64}},
        ["own.json", "training.global_batch_size is 64", "32 x 512 x 4 = 65536"],
    ),
    (
        {"device": "ipu", "ipu": {"embedding_serialization_factor": 4}},
        [
            "own.json",
            "ipu.embedding_serialization_factor is 4",
            "divides model.vocab_size, 30522: 1, 2, 3, 6",
            "--model.vocab_size 30524",
        ],
    ),
    ({"device": "ipu", "data": {"packing": "samples"}}, ["own.json", 'data.packing is "samples"', "static"]),
    (
        {"device": "ipu", "training": {"precision": "bfloat16"}},
        ["own.json", 'training.precision is "bfloat16"', "float16"],
    ),
    (
        {"device": "ipu", "ipu": {"layers_per_ipu": [4, 0, 8]}},
        ["own.json", "ipu.layers_per_ipu is [4, 0, 8]", "at least one layer"],
    ),
    (
        {"device": "ipu", "training": {"global_batch_size": 1024}, "ipu": {"gradient_accumulation_steps": 8}},
        ["own.json", "ipu.gradient_accumulation_steps is 8", "at least 9"],
    ),
    (
        {"device": "ipu", "ipu": {"device_iterations": 3}},
        ["own.json", "training.save_every is 100", "a multiple of ipu.device_iterations, 3"],
    ),
    ({"device": "cpu", "compile_only": True}, ["own.json", 'device is "cpu"']),
    (
        {"device": "ipu", "ipu": {"operation_proportions": {"decoder": 0.1}}},
        ["own.json", "ipu.operation_proportions", "mlm_decoder"],
    ),
    ({"data": {"mask_tokens": 128}}, ["own.json", "data.mask_tokens is 128", "at most", "125"]),
    ({"data": {"sequence_length": 1024}}, ["own.json", "data.sequence_length is 1024", "max_position_embeddings, 512"]),
    ({"optimizer": {"learning_rate": -1.0}}, ["own.json", "optimizer.learning_rate is -1.0", "above 0"]),
    ({"optimizer": {"betas": [0.9]}}, ["own.json", "optimizer.betas is [0.9]", "two numbers"]),
    ({"optimizer": {"warmup_ratio": 2.0}}, ["own.json", "optimizer.warmup_ratio is 2.0"]),
    ({"model": {"hidden_dropout_prob": 1.0}}, ["own.json", "model.hidden_dropout_prob is 1.0"]),
    ({"training": {"max_steps": 0}}, ["own.json", "training.max_steps is 0"]),
    ({"training": {"micro_batch_size": 0}}, ["own.json", "training.micro_batch_size is 0"]),
    (
        {"training": {"precision": "float8"}, "model": {"intermediate_size": 3000}},
        ["model.intermediate_size is 3000", "multiple of 16"],
    ),
    ({"model": {"hidden_size": None}}, ["own.json", "model.hidden_size is null", "an integer above 0"]),
    ({"model": {"type_vocab_size": 1}}, ["own.json", "model.type_vocab_size is 1", "at least 2"]),
    ({"training": {"seed": 2**63}}, ["own.json", "training.seed is", "at least 0 and below"]),
    ({"optimizer": {"learning_rate": float("inf")}}, ["own.json", "optimizer.learning_rate is Infinity"]),
    ({"optimizer": {"betas": [0.9, 1.0]}}, ["own.json", "optimizer.betas is [0.9, 1.0]", "below 1"]),
    ({"ipu": {"operation_proportions": {"mlm_decoder": 2}}}, ["own.json", "ipu.operation_proportions", "at most 1"]),
    ({"task": {"name": "finetuning"}}, ['task.name is "finetuning"', "expected one of pretraining"]),
    ({"optimizer": {"decay_ratio": 1.1}}, ["own.json", "optimizer.decay_ratio is 1.1", "at most 1"]),
    (
        {"optimizer": {"schedule": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}},
        ["own.json", "optimizer.decay_ratio is 0.6", "optimizer.warmup_ratio, 0.5"],
    ),
    (
        {"device": "ipu", "optimizer": {"name": "muon"}},
        ["own.json", 'optimizer.name is "muon"', '"lamb" or "adamw"', "--device cuda"],
    ),
    (
        {"device": "ipu", "optimizer": {"max_grad_norm": 1.0}},
        ["own.json", "optimizer.max_grad_norm is 1.0", "expected 0 on IPUs", "loss scaling"],
    ),
    (
        {"optimizer": {"trust_ratio_slices": 4}},
        ["own.json", "optimizer.trust_ratio_slices is 4", "divides model.vocab_size, 30522: 1, 2, 3, 6"],
    ),
    (
        {"optimizer": {"trust_ratio_slices": 2, "name": "adamw"}},
        ["own.json", "optimizer.trust_ratio_slices is 2", '1 where optimizer.name is "adamw"'],
    ),
    (
        {
            "device": "ipu",
            "optimizer": {"trust_ratio_slices": 3},
            "ipu": {"embedding_serialization_factor": 2},
        },
        ["own.json", "optimizer.trust_ratio_slices is 3", "expected 1 or 2, the parts of the decoder's update on IPUs"],
    ),
    (
        {"device": "ipu", "optimizer": {"trust_ratio_slices": 2}},
        ["own.json", "optimizer.trust_ratio_slices is 2", "expected 1, as one part is updated"],
    ),
    (
        {
            "device": "ipu",
            "optimizer": {"trust_ratio_slices": 2},
            "ipu": {"embedding_serialization_factor": 2, "gradient_accumulation_steps": 1},
            "training": {"global_batch_size": 128},
        },
        ["own.json", "optimizer.trust_ratio_slices is 2", "expected 1, as one part is updated"],
    ),
    (
        {"device": "ipu", "ipu": {"instances": 3}},
        ["own.json", "ipu.instances is 3", "a divisor of ipu.replication_factor, 4; without poprun: --ipu.instances 1"],
    ),
    (
        {"training": {"evaluate_every": 5}},
        ["own.json", "data.held_out_files is []", "as training.evaluate_every is set"],
    ),
    (
        {"device": "ipu", "training": {"evaluate_every": 5}, "data": {"held_out_files": ["x.h5"]}},
        ["own.json", "training.evaluate_every is 5", "expected null on IPUs", "python -m bert.evaluate"],
    ),
    ({"base": 3}, ["own.json", "base is 3", "path or name"]),
    ({"base": "nowhere.json"}, ["own.json", 'base is "nowhere.json"', "no such config", "pod16_phase1.json"]),
    ({"base": "own.json"}, ["own.json", 'base is "own.json"', "expected none, as ", "is based on this file"]),
    ({"base": "pod64_phase1"}, ["pod64_phase1.json", 'base is "pod16_phase1.json"', "own.json is based on this file"]),
]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_the_ipu_section_matters_on_ipus_alone(device):
    options = ["--device", device, "--model.num_hidden_layers", "2", "--training.global_batch_size", "24"]
    assert parse_command_line(options).ipu.layers_per_ipu == [0, 4, 4, 4]
    with pytest.raises(InputError, match=r"ipu.layers_per_ipu is \[0, 4, 4, 4\], expected .* 2, such as \[0, 2\]"):
        parse_command_line([*options, "--device", "ipu"])


@pytest.mark.parametrize("values, words", BAD)
def test_a_config_that_cannot_be_is_one_clear_error(values, words, tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path, **values)
    monkeypatch.chdir(tmp_path)
    assert main(["--config", path]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["own.json"]


def test_accumulation_is_derived_from_the_global_batch_on_cpu_and_cuda():
    for device in ("cpu", "cuda", "auto"):
        assert parse_command_line(
            ["--config", "pod16_phase1.json", "--device", device, "--training.global_batch_size", "64"]
        )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "nowhere.json"], ["nowhere.json", "no such config", "pod16_phase1.json"]),
        (["--training.max_stps", "3"], ["command line", "max_stps", "did you mean training.max_steps"]),
        (["--training.max_steps", "three"], ["command line", "training.max_steps", "three", "an integer above 0"]),
        (["--training.max_steps=0"], ["command line", "training.max_steps is 0", "an integer above 0"]),
        (["--device", "tpu"], ["command line", "device is tpu", "auto, ipu, cuda, mps, cpu"]),
        (["--data.files", "a.h5", "b.h5"], ["command line", "b.h5", "Quote a pattern", "; `--help` lists"]),
        (["--plan=perhaps"], ["command line", "plan", "perhaps"]),
        (["--config", "a.json", "--config=b.json"], ["command line", "--config is given twice: a.json, b.json"]),
    ],
)
def test_bad_command_lines_are_named(arguments, words):
    with pytest.raises(InputError) as error:
        parse_command_line(arguments)
    for word in words:
        assert word in str(error.value)


def test_a_config_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"model": {"hidden_size": 8,}}')
    with pytest.raises(InputError, match="broken.json: is not JSON: .*line 1"):
        parse_command_line(["--config", str(path)])


def test_ipu_without_poptorch_is_a_clear_error(capsys):
    assert main(["--config", "pod16_phase1.json", "--device", "ipu"]) == 2
    message = capsys.readouterr().err
    assert "PopTorch" in message and "Poplar SDK" in message and "--device auto" in message


def test_the_learning_rate_rises_to_the_peak_and_falls_to_zero_after_the_last_step():
    optimizer = OptimizerConfig(learning_rate=0.006, warmup_ratio=0.28)
    rates = [learning_rate_at(step, optimizer, 10500) for step in range(1, 10501)]
    assert rates[0] == 0.006 / 2940 and rates[2939] == max(rates) == 0.006
    assert all(a < b for a, b in zip(rates[:2939], rates[1:2940])) and all(
        a > b for a, b in zip(rates[2939:], rates[2940:])
    )
    assert rates[-1] == pytest.approx(0.006 / 7561) and rates[-1] - (rates[-2] - rates[-1]) == pytest.approx(
        0, abs=1e-12
    )
    assert learning_rate_at(1, optimizer, 1) == 0.006
    assert learning_rate_at(1, OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0), 4) == 1.0
