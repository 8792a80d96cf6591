"""Every test runs with one thread, and with uninitialised memory filled with NaN."""

import pytest
import torch

torch.set_num_threads(1)  # the machines of tests are busy ones; tests of threading set their own


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: the largest value), so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
