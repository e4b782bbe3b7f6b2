import itertools

import pytest

from bert.model.stages import make_stages, pipeline_stages, placement
from data.errors import InputError


def test_the_recipes_split_gives_five_stages_on_four_ipus():
    stages = make_stages([0, 4, 4, 4], 0.22)
    assert [(stage.name, stage.ipu) for stage in stages] == [
        ("embeddings", 0),
        ("layers0-3", 1),
        ("layers4-7", 2),
        ("layers8-11", 3),
        ("heads", 0),
    ]
    assert stages[0].blocks == ("embeddings",) and stages[2].blocks == ("layer4", "layer5", "layer6", "layer7")
    assert all(stage.matmul_proportion == 0.22 for stage in stages)


def test_ipu_0_may_hold_layers_and_each_ipu_its_own_proportion():
    stages = make_stages([3, 7, 7, 7], [0.14, 0.19, 0.2, 0.21])
    assert stages[0].blocks == ("embeddings", "layer0", "layer1", "layer2")
    assert [stage.matmul_proportion for stage in stages] == [0.14, 0.19, 0.2, 0.21, 0.14]


def test_one_ipu_has_one_stage():
    (stage,) = make_stages([2], 0.3)
    assert stage.ipu == 0 and stage.blocks == ("embeddings", "layer0", "layer1", "heads")


@pytest.mark.parametrize("layers_per_ipu", [[12], [0, 12], [0, 1, 0, 2], [1, 1, 1, 1]])
def test_every_block_has_one_place(layers_per_ipu):
    stages = make_stages(layers_per_ipu, 0.5)
    blocks = [block for stage in stages for block in stage.blocks]
    assert blocks == ["embeddings"] + [f"layer{i}" for i in range(sum(layers_per_ipu))] + ["heads"]
    assert len({stage.name for stage in stages}) == len(stages)
    places = placement(stages)
    for ipu, count in enumerate(layers_per_ipu):
        assert sum(place == ipu for block, place in places.items() if block.startswith("layer")) == count


def names(layers):
    return ["embeddings", *(f"layer{i}" for i in range(layers)), "heads"]


def test_a_pipeline_of_processes_goes_round_them_in_the_order_of_the_blocks():
    stages = pipeline_stages(names(6), processes=2, stages_per_process=2)
    assert [(stage.ipu, stage.blocks) for stage in stages] == [
        (0, ("embeddings", "layer0")),
        (1, ("layer1", "layer2")),
        (0, ("layer3", "layer4")),
        (1, ("layer5", "heads")),
    ]
    (whole,) = pipeline_stages(names(3), 1, 1)
    assert list(whole.blocks) == names(3)


@pytest.mark.parametrize("layers, processes, each", [(12, 4, 1), (12, 5, 1), (7, 3, 2), (9, 2, 2), (5, 4, 1)])
def test_no_other_split_gives_the_slowest_process_less_where_heads_are_half_a_layer(layers, processes, each):
    count = processes * each

    def slowest(sizes):
        times = list(sizes[:-1]) + [sizes[-1] + 0.5]
        return max(sum(times[process::processes]) for process in range(processes))

    stages = pipeline_stages(names(layers), processes, each)
    assert [block for stage in stages for block in stage.blocks] == names(layers)
    sizes = [sum(block.startswith("layer") for block in stage.blocks) for stage in stages]
    cuts = itertools.combinations(range(1, layers), count - 1)
    splits = ([end - first for first, end in zip((0, *cut), (*cut, layers))] for cut in cuts)
    assert slowest(sizes) == min(map(slowest, splits))
    assert sizes[0] == min(sizes)


def test_a_stage_without_a_layer_is_an_error_that_names_both_keys():
    with pytest.raises(InputError, match=r"parallel.pipeline 4 x parallel.stages_per_process 2 .* at most 7"):
        pipeline_stages(names(7), 4, 2)
