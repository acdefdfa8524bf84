"""Every field of TRL's GRPOConfig is kept, set or refused; none does nothing in silence."""

import dataclasses
import inspect
import json
import os

import pytest
from trl import GRPOConfig, GRPOTrainer

import rlinvariant
from rlinvariant.conflicts import RULES, conflicts
from rlinvariant.trainer.fields import DEPENDENT, KEPT, REFUSED, SET, script_problems, settled

WRONG = {
    "temperature": 0.001,
    "top_p": 1.9,
    "top_k": -5,
    "min_p": 1.1,
    "beta": -0.1,
    "ref_model_sync_steps": 0,
    "top_entropy_quantile": 1.5,
    "repetition_penalty": 1.1,
    "generation_kwargs": {"top_p": 0.9},
    "trust_remote_code": True,
    "save_only_model": True,
    "ignore_data_skip": True,
    "fp16": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "cast_lm_head_to_fp32": True,
    "torch_compile": True,
    "neftune_noise_alpha": 5.0,
    "vllm_mode": "server",
    "vllm_enable_sleep_mode": True,
    "vllm_tensor_parallel_size": 2,
    "vllm_structured_outputs_regex": "[0-9]",
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "cache_implementation": "static",
    "deepspeed": "zero2.json",
    "fsdp": True,
    "parallelism_config": object(),
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "model_init_kwargs": {"revision": "main"},
}
"""Field that is refused -> a value for which it is."""
OTHERS = {
    "logging_steps": 50,
    "logging_strategy": "epoch",
    "save_total_limit": 1,
    "disable_tqdm": False,  # TRL's default follows how much transformers says
    "use_vllm": True,
    "vllm_max_model_length": 99,
    "vllm_gpu_memory_utilization": 0.7,
    "vllm_model_impl": "transformers",
}
"""Field that is set, and has the value that it gets by default -> another value."""


def unclassified(names: set[str]) -> set[str]:
    return names - KEPT - SET.keys() - REFUSED.keys() - RULES.keys() - DEPENDENT.keys()


def arguments(directory, **settings):
    """GRPOConfig, with a setting put there afterwards that its own checks would not let through on this machine."""
    args = GRPOConfig(str(directory), use_cpu=True)
    for name, value in settings.items():
        setattr(args, name, value)
    return args


def lines(args) -> list[str]:
    new, _ = settled(args, "exact")
    return script_problems(args, "exact") + conflicts(new, "exact", {})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Undo after each test what TRL and `settled` write into the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def test_every_field_is_classified_once():
    names = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    assert not unclassified(names)
    assert unclassified(names | {"a_field_of_the_next_release"}) == {"a_field_of_the_next_release"}
    tables = [KEPT, SET.keys(), REFUSED.keys(), DEPENDENT.keys()]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert not (KEPT | REFUSED.keys() | DEPENDENT.keys()) & RULES.keys()
    assert set(DEPENDENT.values()) <= REFUSED.keys() | RULES.keys()


def test_what_is_refused_is_refused_by_name(tmp_path):
    assert WRONG.keys() == (REFUSED.keys() | RULES.keys()) - SET.keys()
    assert lines(arguments(tmp_path)) == []
    for name, value in WRONG.items():
        (line,) = lines(arguments(tmp_path, use_vllm=True, **{name: value}))
        assert line.startswith(f"{name}=") and "expected" in line, line
    assert len(lines(arguments(tmp_path, use_vllm=True, **WRONG))) == len(WRONG)


def test_what_is_set_is_set_in_a_copy_and_said(tmp_path):
    defaults = arguments(tmp_path)
    for name, (value, _) in SET.items():
        given = arguments(tmp_path, **{"use_vllm": True, name: OTHERS.get(name, getattr(defaults, name))})
        before = getattr(given, name)
        new, said = settled(given, "exact")
        assert before != value and getattr(new, name) == value and getattr(given, name) == before, name
        assert sum(phrase.startswith((f"{name}=", f"{name}:")) for phrase in said) == 1, (name, said)
        assert settled(new, "exact")[1] == []
    assert settled(arguments(tmp_path, bf16=True), "off")[0].bf16


def test_autocast_of_the_launcher_is_taken_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = GRPOConfig(str(tmp_path), use_cpu=True)
    assert (args.bf16, args.mixed_precision) == (True, "bf16")
    new, _ = settled(args, "exact")
    assert (new.bf16, new.mixed_precision, os.environ["ACCELERATE_MIXED_PRECISION"]) == (False, "no", "no")


def test_a_field_that_is_not_known_is_refused_unless_it_has_its_default(tmp_path):
    @dataclasses.dataclass
    class Next(GRPOConfig):
        novelty: int = 3

    assert script_problems(Next(str(tmp_path), use_cpu=True), "exact") == []
    (line,) = script_problems(Next(str(tmp_path), use_cpu=True, novelty=4), "exact")
    assert line.startswith("novelty=4: expected 3") and "does not know" in line


def test_the_trainer_has_trls_arguments_in_trls_order():
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert list(inspect.signature(rlinvariant.GRPOTrainer.__init__).parameters)[: len(theirs)] == theirs


def test_grpo_config_is_trls_and_needs_no_use_cpu(tmp_path):
    args = rlinvariant.GRPOConfig(str(tmp_path))
    assert isinstance(args, GRPOConfig)
    plain = GRPOConfig(str(tmp_path), use_cpu=args.use_cpu)
    assert json.loads(args.to_json_string()) == json.loads(plain.to_json_string())
