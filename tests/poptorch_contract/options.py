"""poptorch.Options, its parts, and the pipeline's stages: every call is checked, recorded in `called`, and refused once
frozen."""

import copy
import re

from tests.poptorch_contract.facts import ENUMS, FACTS, POPART_ENUMS, from_facts, register

__all__ = ["Options", "OPTIONS"]

_KIND_OF = {key: kind for kind, keys in FACTS["session_options"].items() for key in keys}


def _record(self, method, arguments):
    self._record(method, next(iter(arguments.values())) if len(arguments) == 1 else arguments)
    return self


def _positive(name, value):
    if value < 1:
        raise ValueError(f"{name} is {value!r}; it has to be at least 1")
    return value


class _Group:
    # One set of options; those of poptorch.Options and its parts are kept together, under `part.method`.
    def __init__(self, root=None, prefix=""):
        object.__setattr__(self, "_root", self if root is None else root)
        object.__setattr__(self, "_prefix", prefix)
        if root is None:
            object.__setattr__(self, "called", {})
            object.__setattr__(self, "_frozen", False)
            object.__setattr__(self, "_refused", ())

    def _record(self, method, value):
        if self._root._frozen:
            raise AttributeError(f"{self._prefix}{method}: the options are frozen, an executor has been made from them")
        if self._prefix + method in self._root._refused:
            raise RuntimeError(f"{self._prefix}{method}: poprun decides it")
        self._root.called[self._prefix + method] = value

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__}.{name} cannot be set: PopTorch's options are set by methods")


@from_facts("options", fallback=_record)
class _JitOptions(_Group):
    pass


@from_facts("options", fallback=_record)
class _PrecisionOptions(_Group):
    def setPartialsType(self, dtype):
        if str(dtype) not in ("torch.float16", "torch.float32"):
            raise ValueError(f"Precision.setPartialsType takes torch.float16 or torch.float32, not {dtype}")
        return _record(self, "setPartialsType", {"dtype": dtype})


@from_facts("options", fallback=_record)
class _TrainingOptions(_Group):
    def gradientAccumulation(self, gradient_accumulation):
        return _record(self, "gradientAccumulation", {"": _positive("gradientAccumulation", gradient_accumulation)})


@from_facts("options", fallback=_record)
class _TensorLocationOptions(_Group):
    pass


@from_facts("options", fallback=_record)
class TensorLocationSettings(_Group):
    pass


@from_facts("options", fallback=_record)
class _DistributedOptions(_Group):
    def configureProcessId(self, process_id, num_processes):
        if not 0 <= process_id < num_processes:
            raise ValueError(f"Distributed.configureProcessId: process {process_id} of {num_processes}")
        return _record(self, "configureProcessId", {"process_id": process_id, "num_processes": num_processes})

    @property
    def processId(self):
        return self._root.called.get("Distributed.configureProcessId", {"process_id": 0})["process_id"]

    @property
    def numProcesses(self):
        return self._root.called.get("Distributed.configureProcessId", {"num_processes": 1})["num_processes"]


@from_facts("options")
class _PopartOptions(_Group):
    def checkIsFrozen(self, option):
        if self._root._frozen:
            raise AttributeError(f"_Popart.{option}: the options are frozen")

    def set(self, key, value):
        if key not in _KIND_OF:
            raise ValueError(f"_Popart.set: PopART has no session option {key!r}")
        if not _is_kind(value, _KIND_OF[key]):
            raise TypeError(f"_Popart.set({key!r}, {value!r}): the value has to be a {_KIND_OF[key]}")
        members = POPART_ENUMS.get(key.split(".")[-1][:1].upper() + key.split(".")[-1][1:])
        if _KIND_OF[key] == "enum" and members is not None and value not in [member.value for member in members]:
            raise ValueError(
                f"_Popart.set({key!r}, {value!r}): {members.__name__} has {[member.value for member in members]}"
            )
        return _record(self, key, {"value": copy.deepcopy(value)})

    def setEngineOptions(self, engine_options):
        return _record(self, "setEngineOptions", {"": dict(engine_options)})

    def setPatterns(self, patterns, level):
        unknown = sorted(set(patterns) - set(FACTS["popart_patterns"]))
        if unknown:
            raise ValueError(f"_Popart.setPatterns: PopART has no pattern {', '.join(unknown)}")
        return _record(self, "setPatterns", {"": dict(patterns)})


def _is_kind(value, kind) -> bool:
    # An enum is passed as its number: pybind11 takes no enum for an int.
    if kind in ("enum", "uint64"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind == "container":
        items = list(value.items()) if isinstance(value, dict) else value
        return isinstance(items, (list, set, tuple)) and all(
            isinstance(text, str) for item in items for text in (item if isinstance(item, tuple) else (item,))
        )
    return isinstance(value, {"bool": bool, "string": str, "double": float}[kind])


@from_facts("options")
class Stage:
    def __init__(self, *block_ids):
        if not block_ids or not all(isinstance(block, str) for block in block_ids):
            raise TypeError(f"poptorch.Stage takes the names of its blocks, not {block_ids!r}")
        self._blocks, self._ipu = list(block_ids), None

    def ipu(self, ipu):
        self._ipu = ipu
        return self

    @property
    def blocks(self):
        return self._blocks


@register
class _IExecutionStrategy:
    pass


@from_facts("options")
class PipelinedExecution(_IExecutionStrategy):
    """`_stage(block, ipu)` gives the number of a block's stage and its IPU; `_count` is the number of explicit stages,
    or None."""

    def __init__(self, *args):
        self._auto, self._stages, self._numbers = None, [], {}
        if not args or isinstance(args[0], ENUMS["AutoStage"]):
            self._auto = args[0] if args else ENUMS["AutoStage"].SameAsIpu
            if len(args) > 1:
                raise TypeError("PipelinedExecution takes an AutoStage alone, or stages")
            return
        for number, arg in enumerate(args):
            stage = arg if isinstance(arg, Stage) else Stage(arg) if isinstance(arg, str) else Stage(*arg)
            for block in stage.blocks:
                if block in self._numbers:
                    raise ValueError(f"block {block!r} is in more than one stage")
                self._numbers[block] = number
            self._stages.append(stage)

    @property
    def _count(self):
        return None if self._auto is not None else len(self._stages)

    def _stage(self, block, ipu):
        if self._auto is None:
            if block not in self._numbers:
                raise ValueError(f"block {block!r} is in no stage; the stages have {list(self._numbers)}")
            number = self._numbers[block]
            own = self._stages[number]._ipu
            if own is not None and ipu is not None and own != ipu:
                raise ValueError(f"block {block!r} says IPU {ipu}, its stage IPU {own}")
            ipu = own if own is not None else ipu
            return number, number if ipu is None else ipu
        if self._auto is ENUMS["AutoStage"].SameAsIpu:
            if ipu is None:
                raise ValueError(f"block {block!r} has no ipu_id, which AutoStage.SameAsIpu needs")
            return ipu, ipu
        number = self._numbers.setdefault(block, len(self._numbers))
        return number, number if ipu is None else ipu


@from_facts("options")
class ShardedExecution(PipelinedExecution):
    pass


@from_facts("options", fallback=_record)
class Options(_Group):
    """`called` has what was set, under the methods' names: "deviceIterations", "Training.gradientAccumulation",
    "_Popart.<option>"."""

    def __init__(self):
        _Group.__init__(self)
        for name, part in (
            ("Jit", _JitOptions),
            ("Precision", _PrecisionOptions),
            ("Training", _TrainingOptions),
            ("TensorLocations", _TensorLocationOptions),
            ("Distributed", _DistributedOptions),
            ("_Popart", _PopartOptions),
        ):
            group = part.__new__(part)
            _Group.__init__(group, self, name + ".")
            object.__setattr__(self, name, group)

    def deviceIterations(self, device_iterations):
        return _record(self, "deviceIterations", {"": _positive("deviceIterations", device_iterations)})

    def replicationFactor(self, replication_factor):
        return _record(self, "replicationFactor", {"": _positive("replicationFactor", replication_factor)})

    def outputMode(self, output_mode, output_return_period):
        if (output_mode is ENUMS["OutputMode"].EveryN) != (output_return_period is not None):
            raise ValueError("outputMode: EveryN, and no other, takes an output_return_period")
        if output_return_period is not None:
            _record(self, "outputReturnPeriod", {"": output_return_period})
        return _record(self, "outputMode", {"": output_mode})

    def setExecutionStrategy(self, strategy):
        if not isinstance(strategy, _IExecutionStrategy):
            raise TypeError(f"setExecutionStrategy takes an execution strategy, not {strategy!r}")
        return _record(self, "setExecutionStrategy", {"": strategy})

    def setAvailableMemoryProportion(self, available_memory_proportion):
        for ipu in available_memory_proportion:  # PopTorch passes on any number
            if not re.fullmatch(r"IPU\d+", ipu):
                raise ValueError(f'setAvailableMemoryProportion takes {{"IPU0": 0.2, ...}}, not {ipu!r}')
        return _record(self, "setAvailableMemoryProportion", {"": dict(available_memory_proportion)})

    def useOfflineIpuTarget(self, ipu_version):
        if ipu_version not in (1, 2, 21):
            raise ValueError(f"useOfflineIpuTarget: there is no IPU version {ipu_version}")
        _record(self, "connectionType", {"": ENUMS["ConnectionType"].Never})
        return _record(self, "useOfflineIpuTarget", {"": ipu_version})

    def defaultOutputMode(self):
        return self.called.get("outputMode", ENUMS["OutputMode"].Default) is ENUMS["OutputMode"].Default

    def toDict(self):
        return dict(self.called)

    def clone(self):
        other = type(self).__new__(type(self))
        Options.__init__(other)
        other.called.update(self.called)
        return other

    def _freeze(self):
        object.__setattr__(self, "_frozen", True)


OPTIONS = {cls.__name__: cls for cls in (Options, Stage, PipelinedExecution, ShardedExecution, TensorLocationSettings)}
