"""What an engine refuses before it starts, and what an interrupted one leaves behind."""

from unittest import mock

import pytest

from rlinvariant.errors import UserError
from rlinvariant.sampler.engine import Sampler


@pytest.mark.parametrize(
    ("option", "value"), [("tensor_parallel_size", 2), ("enable_lora", True), ("kv_cache_dtype", "fp8"), ("model_impl", "vllm")]
)
def test_an_engine_that_could_not_be_exact_is_refused(option, value, arithmetic_dir):
    with pytest.raises(UserError, match=f"sampler option {option}={value}: expected"):
        Sampler(arithmetic_dir, invariant=True, options={option: value})


def test_vllms_own_switch_is_refused(arithmetic_dir, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UserError, match="VLLM_BATCH_INVARIANT=1: expected unset"):
        Sampler(arithmetic_dir, invariant=True)


def test_an_interrupted_batch_does_not_linger(exact_engine):
    """Its requests are aborted: the next batch would otherwise wait for them, or never end."""

    def generate():
        return exact_engine.generate([[5, 6, 7]] * 3, [1, 2, 3], temperature=1.0, max_tokens=6, ignore_eos=True)

    expected, sampler = generate(), exact_engine._runner.sampler
    with mock.patch.object(sampler, "forward", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        generate()
    assert not exact_engine.llm.llm_engine.has_unfinished_requests()
    assert generate() == expected
