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
    return PoplarExecutor(model.model if isinstance(model, PoplarExecutor) else model, options, False, VERSION, None, None)


def _is_available(num_ipus):
    return num_ipus <= ipus_available()


def _ignore(**_):
    pass


_MODELS = {"trainingModel": _training_model, "inferenceModel": _inference_model, "ipuHardwareIsAvailable": _is_available,
           "ipuHardwareVersion": lambda: 2, "setLogLevel": _ignore, "poptorchAtExit": _ignore}


def become(name: str, contents) -> None:
    """Makes the module of this name, which is being imported, one that has these contents and no others."""
    module = sys.modules[name]
    for key in [key for key in vars(module) if not key.startswith("__")]:
        delattr(module, key)
    module.__class__ = Module
    vars(module).update(contents)


def poptorch():
    """What is in the facts, modelled or raising NotImplementedError."""
    contents = {"__version__": VERSION}
    for section in ("classes", "options"):
        for name, methods in FACTS[section].items():
            if not name.startswith("_"):
                contents[name] = function("poptorch", name, methods.get("__init__", []))
    for name, parameters in FACTS["functions"].items():
        contents[name] = FUNCTIONS.get(name) or function("poptorch", name, parameters, _MODELS.get(name))
    optim = sys.modules["poptorch.optim"] = Module("poptorch.optim")
    vars(optim).update(OPTIM)
    contents.update({**ENUMS, **OPTIONS, "Attribute": Attribute, "Block": Block, "PoplarExecutor": PoplarExecutor, "optim": optim})
    return contents


def popart():
    """The enums."""
    return dict(POPART_ENUMS, __version__=VERSION)


def popdist():
    """Who takes part, from STAND_IN_POPDIST_INSTANCES, _INDEX, _TOTAL_REPLICAS and _FOLDER."""
    models = {"isPopdistEnvSet": processes.is_poprun, "init": processes.start, "getNumInstances": processes.instances,
              "getInstanceIndex": processes.instance_index, "getNumTotalReplicas": processes.total_replicas,
              "getNumLocalReplicas": processes.local_replicas}
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

    __init__ = function("popdist.poptorch.Options", "__init__", FACTS["popdist_options"]["__init__"], _start, is_method=True)
