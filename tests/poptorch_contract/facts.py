"""The facts about PopTorch 3.x (facts.json), and functions and classes that are held to them.

A signature in facts.json is a list of parameters as Python writes them. What is not in there does not exist: an
attribute that is asked for raises AttributeError, an argument TypeError.
"""

import enum
import functools
import inspect
import json
import pathlib
import types

import torch

__all__ = ["ENUMS", "FACTS", "Module", "POPART_ENUMS", "from_facts", "function", "refuse", "register", "types_of"]

FACTS = json.loads((pathlib.Path(__file__).parent / "facts.json").read_text())
ENUMS = {name: enum.Enum(name, members) for name, members in FACTS["enums"].items()}
# As pybind11's enums: a value of its own type, and an int only where one asks.
POPART_ENUMS = {
    name: enum.Enum(name, members, type=type(name, (), {"__int__": lambda self: self.value}))
    for name, members in FACTS["popart_enums"].items()
}

_types = dict(ENUMS)
_simple = {
    "int": int,
    "bool": bool,
    "str": str,
    "float": (int, float),
    "torch.Tensor": torch.Tensor,
    "torch.dtype": torch.dtype,
    "torch.nn.Module": torch.nn.Module,
    "torch.optim.Optimizer": torch.optim.Optimizer,
}


def types_of():
    """The enums and the classes made so far, by name."""
    return _types


def register(cls):
    """Makes a class known as the type of arguments."""
    _types[cls.__name__] = cls
    return cls


class Module(types.ModuleType):
    """A module that has what the project uses of the SDK's, and says why it has no other name."""

    def __getattr__(self, name):
        refuse(self.__name__, name, self.__dict__.get("__unused__", ()))


def function(owner: str, name: str, parameters, implementation, is_method: bool = False):
    """A function that binds its arguments to the facts' parameters and checks their types before `implementation` gets
    them by name."""
    place = f"{owner}.{name}"
    signature = _signature(tuple(parameters), is_method)
    variadic = any(
        parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in signature.parameters.values()
    )

    def call(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{place}({', '.join(parameters)}): {error}") from None
        bound.apply_defaults()
        for key, value in bound.arguments.items():
            parameter = signature.parameters[key]
            if value is not parameter.default and not _fits(value, parameter.annotation):
                expected = str(parameter).replace("'", "")
                raise TypeError(f"{place} takes {expected}, not {value!r} for it")
        return implementation(*bound.args, **bound.kwargs) if variadic else implementation(**bound.arguments)

    functools.update_wrapper(call, implementation)
    del call.__wrapped__
    call.__name__ = name
    return call


def from_facts(section: str, name: str = None, fallback=None):
    """Decorates the class that models `name` of a section of the facts: every method becomes a `function`, and no other
    name is there.

    A method without a model goes to `fallback(self, method, arguments)`, or where there is none it is left out: the
    project has no use for it.
    """

    def decorate(cls):
        known, methods = (
            name or cls.__name__,
            FACTS[section] if name == "PoplarExecutor" else FACTS[section][name or cls.__name__],
        )
        for method, parameters in methods.items():
            model = cls.__dict__.get(method)
            if model is None and fallback is not None and method != "__init__":
                model = _falling_back(fallback, method)
            if model is not None:
                setattr(cls, method, function(known, method, parameters, model, is_method=True))
        cls.__getattr__ = lambda self, attribute: refuse(known, attribute, methods)
        cls.__name__ = cls.__qualname__ = known
        return register(cls)

    return decorate


def _falling_back(fallback, method):
    def model(self, **arguments):
        return fallback(self, method, arguments)

    return model


def refuse(owner: str, attribute: str, unused) -> None:
    """Raises AttributeError for a name that is not PopTorch's, or is one of the `unused` ones, which a first user has
    to model."""
    why = (
        "PopTorch's, but nothing here has used it yet: give it a model first"
        if attribute in unused
        else "not PopTorch's"
    )
    raise AttributeError(f"{owner}.{attribute} is {why}")


@functools.lru_cache(maxsize=None)
def _signature(parameters, is_method):
    source = f"from __future__ import annotations\ndef described({', '.join(('self',) * is_method + parameters)}): pass"
    namespace = dict(_types)
    exec(source, namespace)
    return inspect.signature(namespace["described"])


def _fits(value, annotation) -> bool:
    if annotation is inspect.Parameter.empty:
        return True
    if annotation.startswith("Optional["):
        return value is None or _fits(value, annotation[9:-1])
    if annotation.startswith("List["):
        return isinstance(value, (list, tuple)) and all(_fits(item, annotation[5:-1]) for item in value)
    if annotation.startswith("Dict["):
        key, item = annotation[5:-1].split(", ", 1)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if annotation in ("int", "float") and isinstance(value, bool):
        return False
    expected = _simple.get(annotation, _types.get(annotation))
    return expected is None or isinstance(value, expected)
