"""A key-value cache reaches attention by whichever name this release of transformers has for it."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from rlinvariant.models import make_invariant
from rlinvariant.models.families import FAMILIES

seen_keys: list[int] = []


def _record(module, q, k, v, attention_mask, **kwargs):
    seen_keys.append(k.shape[2])
    return torch.zeros_like(q.transpose(1, 2)), None


AttentionInterface.register("recorded_keys", _record)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_decode_step_sees_the_keys_of_the_steps_before(family):
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]()
    model = make_invariant(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    model.set_attn_implementation("recorded_keys")
    cache = DynamicCache(config=model.config)
    seen_keys.clear()
    with torch.no_grad():
        for tokens in (5, 1, 1):
            model(input_ids=torch.ones(2, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    layers = config.num_hidden_layers
    assert seen_keys == [5] * layers + [6] * layers + [7] * layers
