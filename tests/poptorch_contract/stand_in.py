"""The modules poptorch, popart and popdist, made from the facts and their models. The packages in site/ become them."""

import sys

from tests.poptorch_contract import processes
from tests.poptorch_contract.executor import PoplarExecutor, ipus_available
from tests.poptorch_contract.facts import ENUMS, FACTS, POPART_ENUMS, Module, function
from tests.poptorch_contract.operators import FUNCTIONS, Attribute, Block
from tests.poptorch_contract.optimizer import OPTIM
from tests.poptorch_contract.options import OPTIONS, Options

__all__ = ["become", "popart", "popdist", "popdist_poptorch", "poptorch"]

VERSION = "3.3.0"


def _training_model(model, options, optimizer):
    return PoplarExecutor(model, options, True, VERSION, optimizer, None)


def _inference_model(model, options):
    return PoplarExecutor(
        model.model if isinstance(model, PoplarExecutor) else model, options, False, VERSION, None, None
    )


def _is_available(num_ipus):
    return num_ipus <= ipus_available()


_MODELS = {
    "trainingModel": _training_model,
    "inferenceModel": _inference_model,
    "ipuHardwareIsAvailable": _is_available,
    "ipuHardwareVersion": lambda: 2,
}


def become(name: str, contents) -> None:
    """Makes the module of this name, which is being imported, one that has these contents and no others."""
    module = sys.modules[name]
    for key in [key for key in vars(module) if not key.startswith("__")]:
        delattr(module, key)
    module.__class__ = Module
    vars(module).update(contents)


def poptorch():
    """What is modelled of the facts; the names of the rest as `__unused__`."""
    optim = sys.modules["poptorch.optim"] = Module("poptorch.optim")
    vars(optim).update(OPTIM, __unused__=sorted(set(FACTS["optim"]) - set(OPTIM)))
    models = {name: function("poptorch", name, FACTS["functions"][name], model) for name, model in _MODELS.items()}
    contents = {
        **ENUMS,
        **OPTIONS,
        **FUNCTIONS,
        **models,
        "Attribute": Attribute,
        "Block": Block,
        "PoplarExecutor": PoplarExecutor,
        "optim": optim,
        "__version__": VERSION,
    }
    known = {
        name for section in ("classes", "options", "functions") for name in FACTS[section] if not name.startswith("_")
    }
    return {**contents, "__unused__": sorted(known - set(contents))}


def popart():
    """The enums."""
    return dict(POPART_ENUMS, __version__=VERSION)


def popdist():
    """Who takes part, from STAND_IN_POPDIST_INSTANCES, _INDEX, _TOTAL_REPLICAS and _FOLDER."""
    models = {
        "isPopdistEnvSet": processes.is_poprun,
        "init": processes.start,
        "getNumInstances": processes.instances,
        "getInstanceIndex": processes.instance_index,
        "getNumTotalReplicas": processes.total_replicas,
        "getNumLocalReplicas": processes.local_replicas,
    }
    return {name: function("popdist", name, parameters, models[name]) for name, parameters in FACTS["popdist"].items()}


def popdist_poptorch():
    """Options that know of the other processes."""
    return {"Options": PopdistOptions}


class PopdistOptions(Options):
    """poptorch.Options of one process of poprun: what poprun decides cannot be set."""

    def _start(self, ipus_per_replica):
        Options.__init__(self)
        self.replicationFactor(processes.local_replicas())
        self.Distributed.configureProcessId(processes.instance_index(), processes.instances())
        object.__setattr__(self, "_refused", tuple(FACTS["popdist_refused"]))
        object.__setattr__(self, "_ipus_per_replica", ipus_per_replica)

    __init__ = function(
        "popdist.poptorch.Options", "__init__", FACTS["popdist_options"]["__init__"], _start, is_method=True
    )
