"""What processes hold and wait for, by formula: beside what the engine holds, and what torch's schedules do."""

import types

import pytest
import torch

from bert.engines import make_engine
from bert.engines.micro_batch import full_rows
from bert.geometry import row_shape
from bert.model.batch import State
from bert.plan.parallel import (
    Held,
    Workload,
    bubble,
    bytes_sent,
    held_by,
    layer_bytes,
    memory_of_ranks,
    micro_batches_kept,
    state_memory,
    value_bytes,
)
from run_pretraining import main
from tests.bert.plan.plans import SMALL, config_of

LARGER = f"{SMALL} --model.hidden_size 128 --training.micro_batch_size 8 --data.packing off --device cpu"


def nbytes(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request):
    config = config_of("pod16_phase1", f"{LARGER} --training.precision {request.param}")
    engine = make_engine(config, "cpu")
    engine.model.train()
    return engine


def test_activations_are_what_autograd_keeps(engine):
    config = config_of("pod16_phase1", LARGER)
    rows, masks, size = 8, config.data.mask_tokens, value_bytes(engine.precision)
    ((_, batch),) = engine.micro_batches(full_rows(rows, row_shape(config, static=False), engine.task.targets))
    kept = {}

    def pack(tensor):
        kept.update(nbytes([tensor]))
        return tensor

    state, sizes = State(batch, batch.segments), {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for name, module in engine.model.blocks:
            before = sum(kept.values())
            state = module(state)
            sizes[name] = sum(kept.values()) - before
    tokens, hidden = rows * config.data.sequence_length, config.model.hidden_size
    assert sizes["layer1"] == layer_bytes(config.model, engine.precision) * tokens
    assert sizes["embeddings"] == pytest.approx(size * hidden * tokens, rel=0.1)
    logits = size * rows * masks * config.model.vocab_size
    assert sizes["heads"] == pytest.approx(size * 5 * hidden * rows * masks + logits, rel=0.2)


def test_the_state_is_what_the_engine_holds(engine):
    config = config_of("pod16_phase1", LARGER)
    engine.measure(full_rows(8, row_shape(config, static=False), engine.task.targets))
    masters, model = engine.master_weights.values(), list(engine.model.parameters())
    blocks, layers = [module for _, module in engine.model.blocks], list(engine.model.layers.values())
    state = state_memory(held_by(blocks, layers), "none", 4, engine.precision)
    assert state["weights"] == sum(nbytes([*model, *masters]).values())
    assert state["gradients"] == sum(nbytes(p.grad for p in masters).values())
    assert state["optimizer"] == pytest.approx(engine.optimizer.state_bytes(), rel=1e-3)


HELD = Held(1000, 400, 200)


def test_shards_divide_what_they_say_and_no_more():
    whole = state_memory(HELD, "none", 4, "bfloat16")
    assert whole == {"weights": 6000, "gradients": 4000, "optimizer": 8000, "gathered": 0}
    optimizer = state_memory(HELD, "optimizer", 4, "bfloat16")
    assert optimizer == {"weights": 3000, "gradients": 4000, "optimizer": 2000, "gathered": 0}
    full = state_memory(HELD, "full", 4, "bfloat16")
    assert full == {"weights": 1000, "gradients": 1000, "optimizer": 2000, "gathered": 2 * 800 + 6 * 200}
    assert state_memory(HELD, "optimizer", 4, "float32")["weights"] == 5000
    for shard in ("optimizer", "full"):
        assert state_memory(HELD, shard, 1, "float32") == state_memory(HELD, "none", 1, "float32")


def test_a_pipeline_holds_each_parameter_once_but_the_tied_embedding():
    work = Workload("float32", 1, 16, 1024, 160, 2**25, False)
    (whole,) = memory_of_ranks(config_of("pod16_phase1"), work)
    ranks = memory_of_ranks(config_of("pod16_phase1", "--parallel.pipeline 4"), work)
    model = config_of("pod16_phase1").model
    tied = model.vocab_size * model.hidden_size
    assert sum(rank.held.together for rank in ranks) == whole.held.together + tied
    assert [rank.blocks for rank in ranks][::3] == ["embeddings to layer2", "layer9 to heads"]
    layer = layer_bytes(model, "float32") * 1024
    assert ranks[1].activations - ranks[2].activations == 3 * layer  # one micro-batch more of three layers
    assert whole.activations > 12 * layer and whole.received == 0
    hidden = 16 * 1024 * model.hidden_size * 4  # of all 16 micro-batches
    assert [rank.received for rank in ranks] == [hidden, 2 * hidden, 2 * hidden, hidden]


def test_what_is_sent_is_what_rings_send():
    assert bytes_sent(HELD, "none", 1, "bfloat16", 8) == 0
    assert bytes_sent(HELD, "none", 4, "bfloat16", 8) == 2 * 3 / 4 * 4000
    assert bytes_sent(HELD, "optimizer", 4, "bfloat16", 8) == 3 / 4 * (4000 + 2000)
    assert bytes_sent(HELD, "full", 4, "bfloat16", 8) == 3 / 4 * 8 * (2000 + 4000 + 1200)


def order_of_1f1b(processes, micro_batches):
    """As Schedule1F1B does: P - rank forward passes, then a backward and a forward pass in turns."""
    order = {}
    for rank in range(processes):
        ahead = min(processes - rank, micro_batches)
        passes = [(rank, "FORWARD", number) for number in range(ahead)]
        for number in range(micro_batches):
            later = [(rank, "FORWARD", number + ahead)] if number + ahead < micro_batches else []
            passes += [(rank, "BACKWARD", number), *later]
        order[rank] = passes
    return order


def order_of_interleaved(processes, each, micro_batches):
    """Torch's own."""
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    class Stage(types.SimpleNamespace):
        def __getattr__(self, name):
            return None

    stages = [
        Stage(stage_index=i * processes, num_stages=processes * each, group_size=processes, group_rank=0, device="cpu")
        for i in range(each)
    ]
    order = ScheduleInterleaved1F1B(stages, micro_batches).pipeline_order
    return {
        rank: [(a.stage_index, a.computation_type.name, a.microbatch_index) for a in actions if a]
        for rank, actions in order.items()
    }


@pytest.mark.parametrize("processes, each, micro_batches", [(2, 1, 4), (4, 1, 8), (4, 1, 2), (2, 2, 8), (4, 3, 8)])
def test_bubble_and_kept_micro_batches_are_those_of_the_schedules(processes, each, micro_batches):
    order = order_of_1f1b(processes, micro_batches)
    if each > 1:
        order = order_of_interleaved(processes, each, micro_batches)
    for rank, passes in order.items():
        under_way, most = 0, 0
        for _, kind, _ in passes:
            under_way += 1 if kind == "FORWARD" else -1
            most = max(most, under_way)
        assert most / each == micro_batches_kept(rank, processes, each, micro_batches)
    busy = 3 * each * micro_batches  # a backward pass takes as long as two forward ones
    assert 1 - busy / duration_of(order, processes * each) == pytest.approx(bubble(processes, each, micro_batches))


def duration_of(order, stages):
    """Of a schedule in which each process does its passes in turn, each as soon as those are done that it waits for."""
    waiting, done, free = {rank: list(passes) for rank, passes in order.items()}, {}, dict.fromkeys(order, 0)
    for _ in range(sum(map(len, order.values()))):
        for rank, (stage, kind, number) in [(rank, passes[0]) for rank, passes in waiting.items() if passes]:
            needs = [(stage - 1, kind, number)] if stage else []
            if kind != "FORWARD":
                needs = [(stage + 1, kind, number)] if stage < stages - 1 else [(stage, "FORWARD", number)]
            if all(need in done for need in needs):
                begin = max([free[rank], *(done[need] for need in needs)])
                free[rank] = done[stage, kind, number] = begin + (1 if kind == "FORWARD" else 2)
                waiting[rank].pop(0)
    assert not any(waiting.values())
    return max(free.values())


@pytest.mark.parametrize("name, parameters", [("gpu24_base", 109.5), ("gpu24_small", 28.8)])
def test_the_plan_of_one_card_says_by_formula_what_it_holds(name, parameters, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--config", name, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "One process: 256 rows, 1 micro-batch of 256, in bfloat16"
    numbers = lines[3].split(" M ")
    assert numbers[0].split()[-1] == str(parameters) and float(numbers[1].split()[-1]) < 20  # of 24 GB
    assert lines[5].startswith('Not measured: device is "cuda"')


def test_the_plan_of_several_processes_needs_no_device(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["--config", "pod16_phase1", "--plan", "--device", "cuda", "--parallel.pipeline", "4"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "4 processes: 1 copy of the model, each a pipeline of 4 processes",
        "the fewest that the config asks for",
        "512 micro-batches of 128, in bfloat16",
        "layer9 to heads 45.9 M",
        "bubble (1F1B, 64 micro-batches a round): a process waits 3 / (1 x 64 + 3) = 4.5 %",
        "sent from stage to stage in each pass of a micro-batch: 25.2 MB",
        'Not measured: device is "cuda"',
    ):
        assert words in printed, words
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert main([*command, "--parallel.shard", "full"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "16 processes: 4 copies of the model" in printed and "gathered" in printed
    assert "the fewest" not in printed and "sent to other copies in a step" in printed
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main(command) == 2
    assert "WORLD_SIZE is 6 processes, and parallel.pipeline 4" in capsys.readouterr().err
