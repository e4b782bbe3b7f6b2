"""A model with the weights of a folder, to compute with and not to train."""

from bert.config import Config, TaskConfig
from bert.model.model import Model
from bert.run.checkpoint import load_weights, transformers_config
from bert.start_from import read_model, sizes_of
from bert.tasks import make_model, make_task
from data.errors import InputError

__all__ = ["load_model"]


def load_model(path: str, task: TaskConfig) -> Model:
    """The model in a checkpoint or a BERT folder of transformers, with the heads of `task`, in float32 on the CPU,
    without dropout.

    Raises InputError that names the file, found and expected, where the folder has no such model.
    """
    config = Config(model=sizes_of(read_model(path)), task=task)
    made = make_task(config)
    model = make_model(config, made)
    expected = dict(model.named_parameters())
    weights = load_weights(path, expected, transformers_config(config.model, model.architecture, made.architecture))
    missing = [name for name in expected if name not in weights]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; expected a {made.architecture} with all of its heads")
    model.load_state_dict(weights)
    return model.eval()
