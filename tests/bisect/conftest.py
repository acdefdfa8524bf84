"""The pair of sampler and trainer that all tests of bisect share: each test leaves it as it was."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinvariant.models import make_trainable, require_exact
from rlinvariant.models.random import save_random
from tests.bisect.pairs import CONFIG, LONGEST_REQUEST, STEP_TOKENS, Pair
from tests.parity.device import DEVICE
from tests.parity.harness import start_engine


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    path = save_random(CONFIG, tmp_path_factory.mktemp("models") / "qwen3", 1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = make_trainable(loaded.to(DEVICE))
    require_exact(model)
    return Pair(path, start_engine(path, longest=LONGEST_REQUEST, max_num_batched_tokens=STEP_TOKENS), model.eval())
