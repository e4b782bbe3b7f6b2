"""The model against transformers' BertForPreTraining, and against itself on packed rows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from bert.config import Config, IpuConfig, ModelConfig
from bert.model.batch import Batch
from bert.model.model import initialize
from bert.model.stages import make_stages
from bert.tasks import make_model, make_task
from data.rows import unpad
from ops.attention import SampleIds
from ops.ipu import lowering

VOCAB, MASKS = 211, 9


def small_config(eps=1e-12, dropout=0.0, layers=3):
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=512,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        layer_norm_eps=eps,
        initializer_range=0.1,
    )


def make_perturbed_model(config, parts=1, seed=0, **task):
    """The model of a ModelConfig; `parts` of its MLM decoder; `task` is the task's settings."""
    whole = Config(model=config, ipu=IpuConfig(embedding_serialization_factor=parts))
    for key, value in task.items():
        setattr(whole.task, key, value)
    model = make_model(whole, make_task(whole))
    initialize(model, config.initializer_range, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:  # so that no term is trivially 0 or 1
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def make_transformers_model(config, graph, kind=BertForPreTraining):
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )
    model = kind(BertConfig(**{name: getattr(config, name) for name in names}, attn_implementation="eager"))
    missing, unexpected = model.load_state_dict(graph.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    model.tie_weights()
    return model.eval()


def random_batch(rows, length, seed, padded=True):
    """A batch of unpacked rows and the same as transformers takes it."""
    g = torch.Generator().manual_seed(seed)
    lengths = (
        torch.randint(max(MASKS + 2, length // 3), length + 1, (rows,), generator=g)
        if padded
        else torch.full((rows,), length)
    )
    position = torch.arange(length).expand(rows, -1)
    inside = position < lengths[:, None]
    ids = torch.randint(5, VOCAB, (rows, length), generator=g) * inside
    positions = torch.stack([torch.randperm(int(n), generator=g)[:MASKS].sort().values for n in lengths])
    labels = torch.randint(5, VOCAB, (rows, MASKS), generator=g)
    used = torch.arange(MASKS) < torch.randint(1, MASKS + 1, (rows, 1), generator=g)
    nsp = torch.randint(0, 2, (rows,), generator=g)
    batch = {
        "input_ids": ids,
        "token_type_ids": ((position >= lengths[:, None] // 2) & inside).int(),
        "position_ids": position,
        "sample_ids": inside.int(),
        "mlm_positions": positions * used,
        "mlm_labels": labels * used,
        "mlm_weights": used / used.sum(),
        "cls_positions": torch.zeros(rows, 1, dtype=torch.int),
        "nsp_labels": nsp[:, None],
        "nsp_weights": torch.full((rows, 1), 1 / rows),
    }
    dense = torch.full((rows, length), -100)
    for row in range(rows):
        dense[row, positions[row][used[row]]] = labels[row][used[row]]
    theirs = {
        "input_ids": ids,
        "attention_mask": inside.long(),
        "token_type_ids": batch["token_type_ids"],
        "labels": dense,
        "next_sentence_label": nsp,
    }
    return batch, theirs


def assert_same_gradients(graph, reference: dict, tolerance=1e-5):
    for name, parameter in graph.named_parameters():
        if name.endswith(
            "attention.self.key.bias"
        ):  # zero but for rounding: softmax does not see a shift of all scores
            continue
        error = (parameter.grad - reference[name]).norm() / reference[name].norm()
        assert error < tolerance, (name, error)


def assert_same_step(graph, batch, other, rtol=1e-5):
    """That the graph gives the same losses and gradients for two forms of a batch."""
    loss, metrics = graph(batch)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in graph.named_parameters()}
    graph.zero_grad()
    other_loss, other_metrics = graph(other)
    other_loss.backward()
    for name in metrics:
        assert torch.isclose(other_metrics[name], metrics[name], rtol=rtol), name
    assert_same_gradients(graph, expected)


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
@pytest.mark.parametrize("length, padded", [(128, True), (512, True), (128, False)])
def test_graph_gives_what_transformers_gives(eps, length, padded):
    config = small_config(eps)
    graph = make_perturbed_model(config)
    model = make_transformers_model(config, graph)
    batch, theirs = random_batch(4, length, seed=length, padded=padded)
    loss, metrics = graph(Batch.of_rows(batch))
    expected = model(**theirs)

    hidden = graph.encode(Batch.of_rows(batch))
    everywhere = torch.arange(length).expand(4, -1)
    logits = graph.cls.mlm_logits(hidden, everywhere).view(4, length, VOCAB)
    inside = batch["sample_ids"].bool()
    assert (logits - expected.prediction_logits)[inside].abs().max() < 1e-5
    assert (
        graph.cls.nsp_logits(hidden, batch["cls_positions"])[:, 0] - expected.seq_relationship_logits
    ).abs().max() < 1e-5

    mlm = F.cross_entropy(expected.prediction_logits.flatten(0, 1), theirs["labels"].flatten())
    nsp = F.cross_entropy(expected.seq_relationship_logits, theirs["next_sentence_label"])
    assert abs(metrics["mlm_loss"] - mlm) < 1e-6 and abs(metrics["nsp_loss"] - nsp) < 1e-6
    assert abs(loss - expected.loss) < 2e-6

    loss.backward()
    expected.loss.backward()
    assert_same_gradients(graph, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_without_nsp_the_model_is_transformers_for_mlm():
    config = small_config()
    graph = make_perturbed_model(config, nsp=False)
    model = make_transformers_model(config, graph, BertForMaskedLM)
    batch, theirs = random_batch(4, 64, seed=23)
    loss, metrics = graph(Batch.of_rows({name: x for name, x in batch.items() if not name.startswith(("nsp", "cls"))}))
    expected = model(**{name: x for name, x in theirs.items() if name != "next_sentence_label"})
    assert list(metrics) == ["mlm_loss", "mlm_accuracy"]
    assert abs(loss - expected.loss) < 1e-6 and metrics["mlm_loss"] == loss
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(graph, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_accuracy_is_the_share_of_right_predictions():
    graph = make_perturbed_model(small_config())
    batch, _ = random_batch(6, 64, seed=3)
    hidden = graph.encode(Batch.of_rows(batch))
    predicted = graph.cls.mlm_logits(hidden, batch["mlm_positions"]).argmax(-1)
    batch["mlm_labels"] = torch.where(torch.arange(6 * MASKS) % 3 == 0, predicted, predicted + 1).view(6, MASKS) % VOCAB
    weight = batch["mlm_weights"].flatten()
    assert torch.isclose(graph(Batch.of_rows(batch))[1]["mlm_accuracy"], weight[torch.arange(6 * MASKS) % 3 == 0].sum())
    predicted = graph.cls.nsp_logits(hidden, batch["cls_positions"]).argmax(-1)
    batch["nsp_labels"] = torch.cat([predicted[:2], 1 - predicted[2:]])
    assert torch.isclose(graph(Batch.of_rows(batch))[1]["nsp_accuracy"], torch.tensor(2 / 6))


def pack(batch, groups):
    """Lays the samples of unpacked rows end to end in the rows that `groups` (lists of sample numbers) say."""
    lengths = batch["sample_ids"].sum(1)
    rows, per_row = len(groups), max(len(group) for group in groups)
    length = max(int(sum(lengths[i] for i in group)) for group in groups) + 3
    tokens = {
        name: torch.zeros(rows, length, dtype=torch.long)
        for name in ("input_ids", "token_type_ids", "position_ids", "sample_ids")
    }
    slots = {"mlm_positions": 0, "mlm_labels": 0, "mlm_weights": 0.0}
    slots = {name: torch.full((rows, per_row * MASKS), zero) for name, zero in slots.items()}
    heads = {"cls_positions": 0, "nsp_labels": 0, "nsp_weights": 0.0}
    heads = {name: torch.full((rows, per_row), zero) for name, zero in heads.items()}
    for row, group in enumerate(groups):
        start = 0
        for s, i in enumerate(group):
            n = int(lengths[i])
            for name in tokens:
                tokens[name][row, start : start + n] = batch[name][i, :n] if name != "sample_ids" else s + 1
            part = slice(s * MASKS, (s + 1) * MASKS)
            slots["mlm_positions"][row, part] = batch["mlm_positions"][i] + start
            slots["mlm_labels"][row, part], slots["mlm_weights"][row, part] = (
                batch["mlm_labels"][i],
                batch["mlm_weights"][i],
            )
            heads["cls_positions"][row, s] = start
            heads["nsp_labels"][row, s], heads["nsp_weights"][row, s] = (
                batch["nsp_labels"][i, 0],
                batch["nsp_weights"][i, 0],
            )
            start += n
    return {**tokens, **slots, **heads}


def test_packed_rows_give_the_same_losses_and_gradients():
    graph = make_perturbed_model(small_config())
    batch, _ = random_batch(7, 64, seed=11)
    assert_same_step(graph, Batch.of_rows(batch), Batch.of_rows(pack(batch, [[3, 0, 5], [1], [6, 2], [4]])))


def unpadded(rows, static, device="cpu"):
    fields = unpad({name: tensor.numpy() for name, tensor in rows.items()}, static)
    return Batch.of_unpadded(
        {name: x if name == "max_seqlen" else torch.from_numpy(x).to(device) for name, x in fields.items()}
    )


@pytest.mark.parametrize("static", [False, True])
def test_tokens_laid_end_to_end_give_the_same_losses_and_gradients(static):
    graph = make_perturbed_model(small_config())
    rows, _ = random_batch(7, 64, seed=17)
    rows = pack(rows, [[3, 0, 5], [1], [6, 2], [4]])
    assert_same_step(graph, Batch.of_rows(rows), unpadded(rows, static))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("triton", [False, True])
def test_the_forms_that_cuda_takes_trace_in_bfloat16_forward_and_backward(monkeypatch, compiled, triton):
    """On the meta device, which knows the shapes and types of CUDA's operations, flash attention's among them, but has
    no data."""
    if triton:
        pytest.importorskip("triton", reason="Triton is not installed")
        for file in ("ops.linear", "ops.attention"):
            monkeypatch.setattr(f"{file}.takes_triton", lambda tensor: True)
    graph = make_perturbed_model(small_config(dropout=0.1), parts=2).to("meta", torch.bfloat16).train()
    if compiled:
        for layer in graph.layers.values():
            layer.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    rows, _ = random_batch(4, 64, seed=19)
    loss, _ = graph(unpadded(rows, static=True, device="meta"))
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in graph.named_parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == torch.bfloat16, name


def test_one_layer_is_compiled_not_all():
    graph, compiled = make_perturbed_model(small_config(layers=6)).train(), []

    def backend(traced, inputs):
        compiled.append(traced)
        return traced

    for layer in graph.layers.values():
        layer.compile(dynamic=False, backend=backend, fullgraph=True)
    for seed in (1, 2):
        batch, _ = random_batch(3, 64, seed)
        graph(Batch.of_rows(batch))[0].backward()
    assert len(compiled) == 1


def test_leaving_out_empty_mask_slots_changes_nothing():
    graph = make_perturbed_model(small_config())
    batch, _ = random_batch(5, 64, seed=13)
    used = batch["mlm_weights"].flatten().nonzero().flatten()
    assert 0 < len(used) < batch["mlm_weights"].numel()
    assert_same_step(graph, Batch.of_rows(batch), Batch.of_rows(dict(batch, mlm_used=used)), rtol=1e-6)


def test_one_sample_does_not_see_another_in_its_row():
    graph = make_perturbed_model(small_config())
    batch, _ = random_batch(2, 32, seed=5)
    packed = pack(batch, [[0, 1]])
    before = graph.encode(Batch.of_rows(packed))
    second = packed["sample_ids"] == 2
    packed["input_ids"][second] = (packed["input_ids"][second] + 1) % VOCAB
    after = graph.encode(Batch.of_rows(packed))
    first = packed["sample_ids"] == 1
    assert torch.equal(before[first], after[first]) and not torch.equal(before[second], after[second])


def test_forms_that_the_ipu_takes_give_the_same_losses_and_gradients():
    graph = make_perturbed_model(small_config(), parts=2)
    batch, _ = random_batch(5, 64, seed=7)
    loss, _ = graph(Batch.of_rows(batch))
    loss.backward()
    reference = {name: parameter.grad.clone() for name, parameter in graph.named_parameters()}
    graph.zero_grad()
    with lowering():
        lowered, _ = graph(Batch.of_rows(batch))
    lowered.backward()
    assert torch.isclose(loss, lowered, rtol=1e-6)
    assert_same_gradients(graph, reference)


def test_initial_weights_follow_the_recipe_and_the_seed():
    config = ModelConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    graphs = [make_perturbed_model(config) for _ in range(3)]
    for graph, seed in zip(graphs, (1, 1, 2)):
        initialize(graph, 0.02, seed)
    first, same, other = [dict(graph.named_parameters()) for graph in graphs]
    word = first["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(word, same["bert.embeddings.word_embeddings.weight"])
    assert not torch.equal(word, other["bert.embeddings.word_embeddings.weight"])
    assert (
        word.abs().max() <= 0.04 and 0.016 < word.std() < 0.019
    )  # the standard deviation of a normal cut off at 2 is 0.88 of its own
    for name, parameter in first.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
