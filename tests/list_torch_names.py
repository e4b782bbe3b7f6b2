"""Prints the names that a torch has, as JSON: module, or Tensor -> lines of names. tests/torch_2_0_names.json is what
torch 2.0.1 gives.

python3.8 tests/list_torch_names.py > tests/torch_2_0_names.json
"""

import importlib
import json
import textwrap

import torch

MODULES = (
    "torch",
    "torch.autograd",
    "torch.autograd.function",
    "torch.autograd.graph",
    "torch.backends",
    "torch.backends.mkldnn",
    "torch.backends.mps",
    "torch.cuda",
    "torch.linalg",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.init",
    "torch.nn.parameter",
    "torch.nn.utils",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.overrides",
    "torch.random",
    "torch.utils",
    "torch.utils._python_dispatch",
    "torch.utils.tensorboard",
)


def listing():
    places = dict({name: importlib.import_module(name) for name in MODULES}, **{"torch.Tensor": torch.Tensor})
    # Modules of torch.backends are wrapped in an object that has them as `m`.
    names = {name: sorted({*dir(place), *dir(getattr(place, "m", place))}) for name, place in places.items()}
    public = {place: " ".join(name for name in there if not name.startswith("__")) for place, there in names.items()}
    return {place: textwrap.wrap(line, 120) for place, line in public.items()}


if __name__ == "__main__":
    print(json.dumps(listing(), indent=1))
