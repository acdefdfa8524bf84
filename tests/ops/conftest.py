from collections.abc import Iterator

import pytest
import torch

from tests.ladders import DEVICES


@pytest.fixture(autouse=True, params=DEVICES)
def device(request) -> Iterator[str]:
    """Every op test runs on both devices, on tensors made there; `ladders.per_device` and its like say otherwise."""
    with torch.device(request.param):
        yield request.param
