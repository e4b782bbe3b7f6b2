"""A model as a file for ONNX Runtime, with any number and length of sequences.

Shape letters: R rows (sequences), L tokens of a row, H hidden, V vocabulary; of multiple choice B questions of C
choices, R = B C.
"""

import importlib.util
import logging
import math
import warnings
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import nn

from bert.errors import OnnxDiffers
from bert.model.batch import Batch
from bert.model.model import Model
from data.errors import InputError

__all__ = ["INPUTS", "OUTPUTS", "check_can_write", "write_onnx"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TOLERANCE = 1e-4  # of logits, and of their size where they are larger than 1


def mlm_logits(model: Any, hidden, positions):
    """[R, L, V]"""
    return model.cls.mlm_logits(hidden, positions).unflatten(0, positions.shape)


def nsp_logits(model: Any, hidden, positions):
    """[R, 2]"""
    return model.cls.nsp_logits(hidden, positions[:, :1])[:, 0]


def label_logits(model: Any, hidden, positions):
    """[R, labels]"""
    return model.classifier(model.bert["pooler"](hidden[:, 0]))


OUTPUTS: Dict[str, Dict[str, Callable[..., torch.Tensor]]] = {
    "BertForPreTraining": {"prediction_logits": mlm_logits, "seq_relationship_logits": nsp_logits},
    "BertForMaskedLM": {"logits": mlm_logits},
    "BertForSequenceClassification": {"logits": label_logits},
    "BertForTokenClassification": {"logits": lambda model, hidden, positions: model.classifier(hidden)},
    "BertForQuestionAnswering": {
        "start_logits": lambda model, hidden, positions: model.qa_outputs(hidden)[..., 0],
        "end_logits": lambda model, hidden, positions: model.qa_outputs(hidden)[..., 1],
    },
    "BertForMultipleChoice": {"logits": label_logits},
}
"""Class of transformers -> its outputs, by the names that it has for them, each of the model, the hidden states [R, L,
H] and the tokens' positions [R, L]."""
AXES = {"BertForMultipleChoice": ("batch_size", "num_choices", "sequence_length")}
"""Class of transformers -> the axes of its inputs, where they are not ("batch_size", "sequence_length")."""


class Graph(nn.Module):
    """What the file computes: INPUTS, int64 [R, L] or, of multiple choice, [B, C, L] -> the outputs."""

    def __init__(self, model: Model, architecture: str):
        super().__init__()
        self.model, self.outputs = model, OUTPUTS[architecture]

    def forward(self, input_ids, attention_mask, token_type_ids) -> Tuple[torch.Tensor, ...]:
        choices = input_ids.shape[:-1] if input_ids.dim() > 2 else None
        inputs = input_ids, attention_mask, token_type_ids
        input_ids, attention_mask, token_type_ids = (tensor.flatten(0, -2) for tensor in inputs)
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        fields = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": positions}
        hidden = self.model.encode(Batch.of_rows({**fields, "sample_ids": attention_mask}))
        outputs = tuple(output(self.model, hidden, positions) for output in self.outputs.values())
        return tuple(output.view(choices) for output in outputs) if choices else outputs


def check_can_write(architecture: str) -> None:
    """Raises InputError where a package is missing, or this class has no outputs here."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if architecture not in OUTPUTS:
        raise InputError(f"--onnx: the model is a {architecture}, expected one of {', '.join(OUTPUTS)}")


def write_onnx(model: Model, architecture: str, sizes: Dict[str, int], path: str) -> float:
    """Writes the file, and returns the largest difference between its outputs and the model's, on sequences of other
    numbers and lengths than it was traced with. `sizes` are vocab_size and max_position_embeddings.

    Raises OnnxDiffers where that is more than rounding.
    """
    import onnx

    names, axes = list(OUTPUTS[architecture]), AXES.get(architecture, ("batch_size", "sequence_length"))
    graph, longest, choices = Graph(model, architecture).eval(), sizes["max_position_embeddings"], len(axes) - 2
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not installed, it says
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own use of what it deprecates
        program = torch.onnx.export(
            graph,
            make_inputs((2, *[3] * choices, min(7, longest)), sizes["vocab_size"]),
            input_names=list(INPUTS),
            output_names=names,
            dynamic_shapes=dict.fromkeys(INPUTS, dict(enumerate(axes))),
            dynamo=True,
            verbose=False,
        )
    content: Any = program.model_proto  # type: ignore[union-attr]
    forget_origin(content.graph)
    onnx.save(content, path)
    shapes = [(1, *[2] * choices, longest), (3, *[4] * choices, max(1, longest // 3))]
    return check_file(path, graph, names, [make_inputs(shape, sizes["vocab_size"]) for shape in shapes])


def forget_origin(graph: Any) -> None:
    """Removes what tells from which line of which file of this machine each node comes."""
    graph.ClearField("metadata_props")
    graph.ClearField("value_info")
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def check_file(path: str, graph: nn.Module, names: List[str], samples: List[Tuple[torch.Tensor, ...]]) -> float:
    """The largest difference of any output, padding's too."""
    import onnxruntime

    session, largest = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), 0.0
    for inputs in samples:
        found = session.run(names, {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs)})
        with torch.no_grad():
            expected = graph(*inputs)
        for name, one, other in zip(names, found, expected):
            difference = float((torch.from_numpy(one) - other).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(other.abs().max())):
                where = f"{name} of inputs {list(inputs[0].shape)}"
                raise OnnxDiffers(f"ONNX Runtime's {where} differ by {difference:.2g} from the model's, expected 0")
            largest = max(largest, difference)
    return largest


def make_inputs(shape: Tuple[int, ...], vocab_size: int) -> Tuple[torch.Tensor, ...]:
    """Random tokens of two segments, in each row one fewer than in the row before."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, length = math.prod(shape[:-1]), shape[-1]
    ids = torch.randint(vocab_size, shape, generator=generator)
    places = torch.arange(length).expand(rows, -1)
    mask = (places < (length - torch.arange(rows)).clamp(min=1)[:, None]).long()
    types = (places >= length // 2).long() * mask
    return ids, mask.view(shape), types.view(shape)
