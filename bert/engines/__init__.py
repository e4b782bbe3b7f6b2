"""Engines run optimizer steps on one kind of device; the training loop does not know which one it drives.

An engine has

    step(batch, learning_rate, step, progress) -> {name: scalar}   one global batch of rows, one optimizer step
    evaluate(batch) -> {name: scalar}                             the same metrics, no dropout, no update
    weights() / load_weights(tensors)                             {parameter name: tensor}
    optimizer_state() / load_optimizer_state(tensors, skipped)    {"<parameter name>.exp_avg", "....exp_avg_sq": tensor}
    skipped_updates()                                             how many updates were left out: a gradient was not finite
    asynchronous, wait_for(step)                                  whether `step` returns before the device is done; its metrics can
                                                                  be read after wait_for
    steps_done, graph, micro_batch_size, describe()               the last step in the weights; what it trains, how, in a line

and takes any graph whose forward turns a batch of rows into (weighted loss, metrics).
"""

import importlib.util
from typing import Tuple

from data.errors import InputError

__all__ = ["choose_device"]


def choose_device(wanted: str) -> Tuple[str, str]:
    """`auto`, `ipu`, `cuda` or `cpu` -> (the device, one line that says why).

    Raises InputError with the way out where a device is asked for that is not there.
    """
    import torch

    has_poptorch = importlib.util.find_spec("poptorch") is not None
    if wanted == "ipu":
        if not has_poptorch:
            raise InputError("device is \"ipu\", but PopTorch is not installed. Its wheel comes with Graphcore's Poplar SDK, from no "
                             "package index (the package named popart on PyPI is something else): install it from the SDK, under "
                             "Python 3.8 with torch 2.0.1, or use --device auto")
        raise InputError("device is \"ipu\", and PopTorch is there, but this version trains on CUDA and CPU only: use --device auto")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device is \"cuda\", but torch %s finds no CUDA device. Install a CUDA build of torch and a driver, or use "
                         "--device auto" % torch.__version__)
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return "cuda", "cuda (%s)" % torch.cuda.get_device_name()
    why = "" if wanted == "cpu" else ": no CUDA device, %s" % ("PopTorch is not used yet" if has_poptorch else "no PopTorch")
    return "cpu", "cpu (%d threads%s)" % (torch.get_num_threads(), why)
