"""Tasks by name, and the model that a task makes. A fork adds its own: `TASKS["name"] = make`."""

import dataclasses
from typing import Callable, Dict, List, Type

from torch import nn

from bert.config import Config
from bert.model.blocks import Embeddings
from bert.model.model import Model
from bert.tasks.classification import Classification
from bert.tasks.multiple_choice import MultipleChoice
from bert.tasks.pretraining import Pretraining
from bert.tasks.question_answering import QuestionAnswering
from bert.tasks.task import ExampleTask, Panel, ShardTask, Task
from bert.tasks.token_classification import TokenClassification
from data.errors import InputError
from data.examples.records import existing

__all__ = ["TASKS", "ExampleTask", "Panel", "ShardTask", "Task", "make_model", "make_task", "with_labels"]

TASKS: Dict[str, Callable[[Config], Task]] = {
    "pretraining": lambda config: Pretraining(config.task.nsp),
    "mlm": lambda config: Pretraining(nsp=False),
    "classification": lambda config: Classification(config.task),
    "token_classification": lambda config: TokenClassification(config.task),
    "question_answering": lambda config: QuestionAnswering(config.task),
    "multiple_choice": lambda config: MultipleChoice(config.task),
}
# How a task finds the labels that its config does not say.
FIND_LABELS: Dict[str, Callable[[Config], List[str]]] = {
    "classification": Classification.find_labels,
    "token_classification": TokenClassification.find_labels,
}


def make_task(config: Config) -> Task:
    """The task that `config.task` names. Raises InputError for a name that TASKS lacks."""
    if config.task.name not in TASKS:
        raise InputError(f'task.name is "{config.task.name}", expected one of {", ".join(TASKS)}')
    return TASKS[config.task.name](config)


def with_labels(config: Config) -> Config:
    """The config with task.labels, from the training files where it has none. Raises InputError for files that cannot
    be read."""
    find = FIND_LABELS.get(config.task.name)
    if find is None or config.task.labels or not config.data.files:
        return config
    files = dataclasses.replace(config.data, files=existing(config.data.files))
    labels = find(dataclasses.replace(config, data=files))
    return dataclasses.replace(config, task=dataclasses.replace(config.task, labels=labels))


def make_model(config: Config, task: Task, embeddings: Type[nn.Module] = Embeddings) -> Model:
    """The model of `config` with the heads of `task`; a fork may give embeddings of its own, made of ModelConfig."""
    model = Model(config.model, embeddings)
    task.add_heads(model, config)
    outside = [name for name, module in model.blocks if module not in set(model.modules())]
    assert not outside, f"{outside} are no modules of the model, so train() and eval() do not reach them"
    return model
