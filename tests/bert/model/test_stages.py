import pytest

from bert.model.stages import make_stages, placement


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
