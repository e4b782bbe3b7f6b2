"""The figures of a plan for IPUs, read off the graph, against formulas and facts."""

import pytest
import torch

from bert.model.stages import make_stages
from bert.plan.ipu_plan import IPU_BYTES, temporaries
from bert.plan.trace import trace
from bert.tasks import make_model, make_task
from ops.ipu import MATMULS, is_lowering
from tests.bert.plan.plans import SMALL, config_of, plan_of


def parameters_of(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(config, make_task(config)).parameters())


def useful_flops(config):
    """Of a sample, forward and backward, by the formula of the recipe."""
    model, data = config.model, config.data
    hidden, length, layers = model.hidden_size, data.sequence_length, model.num_hidden_layers
    weights = 4 * hidden * hidden + 2 * hidden * model.intermediate_size
    heads = hidden * hidden + hidden * model.vocab_size
    return 6 * layers * weights * length + 12 * layers * hidden * length**2 + 6 * data.mask_tokens * heads


def flops_of_a_sample(config, plan):
    return sum(stage.forward + stage.backward for stage in plan.stages) / config.ipu.micro_batch_size


def sizes(plan, name):
    """Of each IPU, in bytes."""
    return [memory.parts[name] for memory in plan.memory]


@pytest.mark.parametrize(
    "name, options",
    [
        ("pod16_phase1", ""),
        ("pod16_phase2", ""),
        ("pod16_phase2", "--ipu.layers_per_ipu [3,3,3,3]"),
        ("pod16_phase1", "--ipu.layers_per_ipu [12]"),
        ("pod16_phase1", SMALL),
    ],
)
def test_parameters_and_work_of_the_stages_are_the_models(name, options):
    config, plan = config_of(name, options), plan_of(name, options)
    assert sum(stage.parameters for stage in plan.stages) == parameters_of(config)
    assert flops_of_a_sample(config, plan) == pytest.approx(useful_flops(config), rel=0.02)


@pytest.mark.parametrize("name, gflop", [("pod16_phase1", 70), ("pod16_phase2", 301)])
def test_the_recipes_work_per_sample_comes_out_of_the_graph(name, gflop):
    assert flops_of_a_sample(config_of(name), plan_of(name)) == pytest.approx(gflop * 1e9, rel=0.01)


def test_the_trace_names_every_product_and_leaves_nothing_behind():
    traced = trace(config_of("pod16_phase1", f"{SMALL} --ipu.embedding_serialization_factor 4"))
    products = {operation.name: operation for operation in traced.operations if operation.flops}
    assert set(MATMULS) <= set(products) and not is_lowering()
    assert products["mlm_decoder"].parts == 4
    assert products["select_tokens"].gradients == 1  # its positions have no gradient
    assert len(traced.checkpoints) == 5
    blocks = {block for stage in traced.stages for block in stage.blocks}
    assert {operation.block for operation in traced.operations} == blocks


def test_the_recipes_pipeline_is_popart_s():
    plan = plan_of("pod16_phase1")
    assert (plan.cycles, plan.filling) == (512 + 8, 8)
    assert [stage.stashed for stage in plan.stages] == [9, 7, 5, 3, 1]
    tokens = 32 * 128
    # Four layers' inputs and the samples' ids, in float16.
    assert [stage.stash for stage in plan.stages[1:4]] == [4 * tokens * 768 * 2 + tokens * 2] * 3
    *others, heads = plan.stages
    assert all(stage.recompute == stage.forward for stage in others) and heads.recompute == 0 < heads.forward
    stashes = sizes(plan, "stashes")
    assert stashes[1] > stashes[2] > stashes[3]
    assert plan.slowest == 1 and 0 < plan.work_of(0) < 0.2 * plan.work_of(1) == 0.2 * plan.work_of(3)


def test_one_ipu_has_no_pipeline_and_recomputes_nothing():
    plan = plan_of("pod16_phase1", f"{SMALL} --ipu.layers_per_ipu [5]")
    assert (plan.cycles, plan.filling, len(plan.stages), plan.stages[0].recompute) == (512, 0, 1, 0)


def test_work_and_stashes_grow_with_the_micro_batch_and_weights_do_not():
    small, large = plan_of("pod16_phase2", "--ipu.micro_batch_size 4"), plan_of("pod16_phase2")
    for less, more in zip(small.stages, large.stages):
        assert (more.forward, more.backward, more.stash) == (2 * less.forward, 2 * less.backward, 2 * less.stash)
    for name in ("weights", "gradients", "optimizer"):
        assert sizes(small, name) == sizes(large, name)
    for less, more in zip(small.memory, large.memory):
        assert less.parts["activations"] < more.parts["activations"]
        assert less.parts["temporaries"] <= more.parts["temporaries"]


def test_checkpoints_of_layers_cost_stashes_and_save_activations():
    every_layer = plan_of("pod16_phase1")
    none = plan_of("pod16_phase1", "--ipu.recompute_checkpoint_every_layer false")
    for with_them, without in zip(every_layer.memory[1:], none.memory[1:]):
        assert without.parts["stashes"] < 0.3 * with_them.parts["stashes"]
        assert without.parts["activations"] > 2 * with_them.parts["activations"]


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
@pytest.mark.parametrize(
    "options, share_of_weights",
    [
        ("", 3 / 4),  # 2 + 4 bytes a parameter beside the weight's 2, over 4 replicas
        ("--ipu.replicated_tensor_sharding false", 3),
        ("--ipu.replication_factor 1", 3),
        ("--ipu.instances 2", 3 / 2),  # over the 2 replicas of one process
        ("--ipu.instances 4", 3),
        ("--ipu.enable_half_first_order_momentum false", 1),
        ("--ipu.optimizer_state_offchip true", 0),
        ("--training.precision float32", 1 / 2),  # 4 + 4 bytes a parameter beside the weight's 4, over 4 replicas
    ],
)
def test_the_optimizers_state_is_split_over_replicas_halved_or_off_the_chip(options, share_of_weights, optimizer):
    plan = plan_of("pod16_phase1", f"--optimizer.name {optimizer} {options}")
    assert sizes(plan, "optimizer") == [int(size * share_of_weights) for size in sizes(plan, "weights")]


@pytest.mark.parametrize("options, full", [("", 0.911), ("--ipu.instances 1", 0.806)])
def test_large_pod64_is_as_full_as_the_replicas_of_one_process_make_it(options, full):
    assert plan_of("large_pod64_phase2_packed", options).fullest_share == pytest.approx(full, abs=1e-3)


def test_temporaries_stay_within_the_memory_proportion_and_a_factor_makes_them_less():
    for share in (0.1, 0.22):
        plan = plan_of("pod16_phase2", f"--ipu.matmul_proportion {share}")
        assert max(sizes(plan, "temporaries")) == int(share * IPU_BYTES)
    proportions = '--ipu.operation_proportions {"output":0.05,"intermediate":0.05}'
    assert plan_of("pod16_phase2", proportions).memory[1].total < plan_of("pod16_phase2").memory[1].total
    factors = [plan_of("pod16_phase1", f"--ipu.embedding_serialization_factor {factor}") for factor in (1, 2, 6)]
    one, two, six = (plan.memory[0].total for plan in factors)
    assert one > two > six


def test_float32_takes_twice_the_memory_and_a_quarter_of_the_speed():
    half, full = plan_of("pod16_phase1"), plan_of("pod16_phase1", "--training.precision float32")
    assert sizes(full, "weights") == [2 * size for size in sizes(half, "weights")]
    assert full.stages[1].forward == half.stages[1].forward and full.peak_flops == half.peak_flops / 4


def test_the_fullest_of_a_backward_pass_is_what_a_hand_counts():
    rows, hidden, inner, heads = 32 * 128, 768, 3072, 12
    traced = plan_of("pod16_phase1", "--ipu.matmul_proportion 1.0").trace
    mlp = next(o for o in traced.operations if (o.name, o.block) == ("intermediate", "layer0"))
    a, b, c = rows * hidden * 2, hidden * inner * 2, rows * inner * 2
    assert temporaries(traced, mlp, True) == int(3 * (a * b * c * 1472) ** (1 / 3))
    assert temporaries(traced, mlp, False) == int(3 * (a * b * 2 * c * 1472) ** (1 / 3))
    # In the backward pass of a layer, at the gradient of its last product: what the products, softmax, GELU and norms
    # keep, and gradients.
    memory = next(memory for memory in plan_of("pod16_phase1").memory if memory.operation == "output of layer0")
    kept = 2 * (rows * hidden * 6 + rows * inner * 2 + 2 * heads * 32 * 128 * 128)
    assert 0.8 * kept < memory.parts["activations"] < 2.2 * kept
