"""Tasks by name, and the model that a task makes. A fork adds its own: `TASKS["name"] = make`."""

from typing import Callable, Dict, Type

from torch import nn

from bert.config import Config
from bert.model.blocks import Embeddings
from bert.model.model import Model
from bert.tasks.pretraining import Pretraining
from bert.tasks.task import Panel, Task
from data.errors import InputError

__all__ = ["TASKS", "Panel", "Task", "make_model", "make_task"]

TASKS: Dict[str, Callable[[Config], Task]] = {"pretraining": lambda config: Pretraining(config.task.nsp)}


def make_task(config: Config) -> Task:
    """The task that `config.task` names. Raises InputError for a name that TASKS lacks."""
    if config.task.name not in TASKS:
        raise InputError(f'task.name is "{config.task.name}", expected one of {", ".join(TASKS)}')
    return TASKS[config.task.name](config)


def make_model(config: Config, task: Task, embeddings: Type[nn.Module] = Embeddings) -> Model:
    """The model of `config` with the heads of `task`; a fork may give embeddings of its own, made of ModelConfig."""
    model = Model(config.model, embeddings)
    task.add_heads(model, config)
    return model
