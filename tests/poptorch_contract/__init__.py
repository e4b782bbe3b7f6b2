"""A stand-in for PopTorch 3.x, which cannot be installed without Graphcore's SDK: strict about calls, and it trains on
the CPU.

    def test_...(monkeypatch):
        poptorch = sdk(monkeypatch)          # `import poptorch, popart, popdist` now give the stand-in
        ...
        executors()[-1].trace                # what the last executor met while it traced: a list of operators.Event
        options.called                       # what was set: {"deviceIterations": 4, "Training.gradientAccumulation": 8,
        ...}

Another process gets it with `python_path()` as its PYTHONPATH. STAND_IN_IPUS says how many IPUs there are (64); under
STAND_IN_POPDIST_INSTANCES, _INDEX, _TOTAL_REPLICAS and _FOLDER a process is one of poprun's, and they add up their
gradients.
"""

import os
import pathlib
import sys

__all__ = ["executors", "python_path", "sdk"]

SITE = pathlib.Path(__file__).parent / "site"
ROOT = SITE.parents[2]


def sdk(monkeypatch):
    """Makes poptorch, popart and popdist importable for one test, and gives poptorch."""
    from tests.poptorch_contract.executor import forget_executors

    for name in ("poptorch", "poptorch.optim", "popart", "popdist", "popdist.poptorch"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is imported below is taken out again
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(SITE))
    forget_executors()
    import poptorch

    return poptorch


def executors():
    """The executors that are alive, in the order in which they were made."""
    from tests.poptorch_contract.executor import executors

    return executors()


def python_path() -> str:
    """PYTHONPATH for a process that is to find the stand-in."""
    return os.pathsep.join([str(SITE), str(ROOT)] + [path for path in [os.environ.get("PYTHONPATH")] if path])
