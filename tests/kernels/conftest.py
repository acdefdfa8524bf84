from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """What a test makes without naming a device is made on the GPU."""
    with torch.device("cuda"):
        yield
