from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Make on the GPU each tensor for which a test names no device."""
    with torch.device("cuda"):
        yield
