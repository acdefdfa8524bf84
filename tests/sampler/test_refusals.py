"""Refusals of an engine before it starts, and the state that an interrupted one leaves behind."""

from typing import Any
from unittest import mock

import pytest
from transformers import AutoConfig, DistilBertConfig
from trl import GRPOConfig
from vllm.config import CompilationConfig

from rlinvariant.conflicts import INVARIANCE
from rlinvariant.errors import UserError
from rlinvariant.plan import plan_trainer
from rlinvariant.sampler import vllm_columns
from rlinvariant.sampler.engine import Sampler, refuse
from rlinvariant.sampler.refusals import without_fused_sums


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("enable_lora", True),
        ("kv_cache_dtype", "fp8"),
        ("model_impl", "vllm"),
        ("enable_expert_parallel", True),
    ],
)
def test_an_engine_that_could_not_be_exact_is_refused(option, value, arithmetic_dir):
    with pytest.raises(UserError, match=f"sampler option {option}={value}: expected"):
        Sampler(arithmetic_dir, invariant=True, options={option: value})


def test_vllms_own_switch_is_refused(arithmetic_dir, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UserError, match="VLLM_BATCH_INVARIANT=1: expected unset"):
        Sampler(arithmetic_dir, invariant=True)


def test_a_configuration_that_the_caller_has_is_not_loaded_again(arithmetic_dir, monkeypatch):
    config = AutoConfig.from_pretrained(arithmetic_dir)
    loads: list[str] = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda model, **_: loads.append(model) or config)
    assert refuse({}, arithmetic_dir, "bfloat16", config=config) == config.max_position_embeddings == 256
    assert loads == []
    assert refuse({}, arithmetic_dir, "bfloat16") == 256
    assert loads == [arithmetic_dir], "control"


def test_positions_stand_for_a_refusal_that_has_run(arithmetic_dir, monkeypatch):
    """The engine starts with as many positions as `refuse` returned, and nothing is refused, or loaded, a second time."""

    class Started(Exception):
        pass

    def start(model: str, **arguments: Any) -> None:
        raise Started(arguments["max_model_len"])

    monkeypatch.setattr("vllm.LLM", start)
    monkeypatch.setattr("rlinvariant.sampler.engine.refuse", lambda *_: pytest.fail("refused twice"))
    with pytest.raises(Started, match="200"):
        Sampler(arithmetic_dir, invariant=True, positions=200)


def test_what_vllm_says_of_its_options_is_one_line(arithmetic_dir):
    """It checks them by pydantic, whose errors have four lines, and a run ended in a traceback."""
    with pytest.raises(
        UserError, match=r"^vLLM cannot make the engine: .*max_num_batched_tokens.*; change the sampler's options$"
    ):
        Sampler(arithmetic_dir, invariant=False, options={"max_num_batched_tokens": -1})


def test_a_fault_of_our_own_keeps_its_traceback(arithmetic_dir, monkeypatch):
    """Though it is a ValueError, as vLLM's are, while vLLM makes the engine; the control is the test above."""
    monkeypatch.setattr(vllm_columns, "gather_embeddings", lambda model: int("ours"))
    with pytest.raises(ValueError, match="ours"):
        Sampler(arithmetic_dir, invariant=True, max_model_len=64)


def test_a_sum_over_processes_is_not_fused_whatever_else_vllm_is_told():
    off = {"fuse_allreduce_rms": False}
    assert without_fused_sums(None) == {"pass_config": off}
    assert without_fused_sums(3) == {"mode": 3, "pass_config": off}
    given = {"mode": 0, "pass_config": {"fuse_norm_quant": True}}
    assert without_fused_sums(given) == {"mode": 0, "pass_config": {"fuse_norm_quant": True} | off}
    assert given["pass_config"] == {"fuse_norm_quant": True}, "the user's own stays as it is"
    own = CompilationConfig(mode=0)
    assert without_fused_sums(own) is own and own.pass_config.fuse_allreduce_rms is False and own.mode == 0
    for wrong in ({"pass_config": {"fuse_allreduce_rms": True}}, CompilationConfig(pass_config={"fuse_allreduce_rms": True})):
        with pytest.raises(UserError, match="fuse_allreduce_rms=True: expected False"):
            without_fused_sums(wrong)


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a transformers causal language model"):
        Sampler(tmp_path, invariant=True)
    for invariance in INVARIANCE:
        args = GRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(UserError, match="is not a transformers causal language model"):
            plan_trainer(str(tmp_path), args, None, invariance, "bfloat16", str(tmp_path), {})


def test_an_interrupted_batch_does_not_linger(exact_engine):
    """Its requests are aborted: the next batch would otherwise wait for them, or never end."""

    def generate():
        return exact_engine.generate([[5, 6, 7]] * 3, [1, 2, 3], temperature=1.0, max_tokens=6, ignore_eos=True)

    expected, sampler = generate(), exact_engine._runner.sampler
    with mock.patch.object(sampler, "forward", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        generate()
    assert not exact_engine.llm.llm_engine.has_unfinished_requests()
    assert generate() == expected
