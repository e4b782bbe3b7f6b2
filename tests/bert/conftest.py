"""What all tests of `bert` share."""

import pytest
import torch

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Models of tests are tiny: several threads only wait for each other, for seconds where the machine is busy."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes that a test starts
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
