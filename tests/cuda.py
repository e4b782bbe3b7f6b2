"""What a test needs that runs on a GPU; `pytest -m cuda tests` runs these tests alone."""

import pytest
import torch

__all__ = ["on_cuda"]

on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
