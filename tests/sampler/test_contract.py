"""The parts of vLLM that the sampler relies on: an upgrade that moves one fails here, by name.

Two releases are in use, 0.32 on a CPU and 0.26 on a GPU: what they have in common, and what each has of its own.
"""

import contextlib
import functools
import importlib
import inspect
import io
import sys
from typing import Any

import pytest
import vllm
from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from rlinvariant import runtime
from rlinvariant.sampler import engine, plugin, vllm_model, vllm_serve
from rlinvariant.sampler.hooks import FIELDS, GPU_HOOKS, HOOKS, NAMES
from tests.parity.device import BLOCK, CUDA

VERSION = "0.26." if CUDA else "0.32."
Backend: Any
if CUDA:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend as Backend
else:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as Backend


def parameters(function) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def resolved(hook: str) -> Any:
    module, name = hook.split(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


IN_USE = HOOKS | (GPU_HOOKS if CUDA else {})
# what more we override or call -> its leading parameters
SIGNATURES = {
    Backend.get_impl_cls().do_kv_cache_update: ["self", "layer", "key", "value", "kv_cache", "slot_mapping"],
    UnquantizedEmbeddingMethod.process_weights_after_loading: ["self", "layer"],
    Backend.get_impl_cls: [],
    Backend.get_builder_cls: [],
    vllm_serve._Worker.load_model: ["self"],
    vllm_serve._Worker.compile_or_warm_up_model: ["self"],
}
ATTENTION_HOOKS = {
    "_get_attn_cls": "0.32.",
    "create_attention_instances": "0.26.",
}  # our class has both; each release asks for one


def test_vllm_is_the_version_that_was_read():
    assert vllm.__version__.startswith(VERSION), f"vLLM {vllm.__version__}: read sampler/vllm_model.py beside it again"


@pytest.mark.parametrize("hook", IN_USE)
def test_hooks_are_as_listed(hook):
    assert tuple(parameters(resolved(hook))[: len(IN_USE[hook])]) == IN_USE[hook], f"vLLM's {hook} has changed"


@pytest.mark.parametrize("name", NAMES)
def test_names_are_there(name):
    assert resolved(name) is not None


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_there(name):
    assert set(FIELDS[name]) <= set(vars(resolved(name))["__annotations__"])


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_hooks_have_the_signature_expected(function):
    expected = SIGNATURES[function]
    assert parameters(function)[: len(expected)] == expected, f"vLLM's {function.__qualname__} has changed"


@pytest.mark.parametrize("name", ATTENTION_HOOKS)
def test_each_release_asks_for_attention_by_its_own_hook(name):
    """`InvariantForCausalLM` has both; the one that this release does not have is never called."""
    found = getattr(TransformersForCausalLM, name, None)
    assert (found is not None) == (ATTENTION_HOOKS[name] == VERSION), f"vLLM {vllm.__version__}: {name} is {found}"
    assert found is None or parameters(found) == ["self"] == parameters(getattr(vllm_model.InvariantForCausalLM, name))


@pytest.mark.parametrize(
    "ours", [c for c in vars(vllm_model).values() if inspect.isclass(c) and c.__module__ == vllm_model.__name__]
)
def test_every_method_of_ours_overrides_one_of_vllm(ours):
    """A method that vLLM renamed would be left behind, never called."""
    known = {
        "__init__",
        "give_back",
        "take_away",
        "keep_drawn",
        "take_drawn",
        "add_drawn",
        "_merge_gate_and_up",
        *ATTENTION_HOOKS,
    }
    bases = [base for base in ours.__mro__[1:] if base.__module__.startswith("vllm")]
    for name, value in vars(ours).items():
        if bases and inspect.isfunction(inspect.unwrap(getattr(value, "__func__", value))) and name not in known:
            assert any(hasattr(base, name) for base in bases), f"{ours.__name__}.{name} overrides nothing"


def test_the_cache_is_written_apart_from_the_attention():
    """vLLM's layer then calls `impl.do_kv_cache_update`, which no base class declares."""
    assert Backend.forward_includes_kv_cache_update is False
    assert "impl.do_kv_cache_update(" in inspect.getsource(inspect.getmodule(Attention))


def test_layers_are_what_the_quantisation_hook_tells_apart():
    assert issubclass(vllm.model_executor.layers.linear.QKVParallelLinear, LinearBase)
    head = vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead
    assert issubclass(head, VocabParallelEmbedding)
    assert "attn_backend" in parameters(Attention.__init__), "Attention no longer takes a backend"


def test_the_plugin_is_installed_and_registers_once():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "rlinvariant"]
    assert entry.load() is plugin.register
    plugin.register()
    plugin.register()
    assert QUANTIZATION_METHODS.count(plugin.QUANTIZATION) == 1
    assert plugin.ARCHITECTURE in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize("name", runtime.VLLM)
def test_vllm_still_knows_its_environment_variables(name):
    assert name in vllm.envs.environment_variables, f"vLLM no longer reads {name}: what does it do instead?"


@pytest.mark.parametrize(
    "name", ["temperature", "seed", "max_tokens", "logprobs", "detokenize", "stop_token_ids", "top_p", "top_k", "min_p"]
)
def test_sampling_parameters_exist(name):
    assert name in SamplingParams.__struct_fields__, f"SamplingParams has no {name}"


def test_the_engine_is_reached_by_the_path_expected(exact_engine):
    """`Sampler._runner`, what it holds, and what a request's place in the batch is known by."""
    runner = exact_engine._runner
    assert isinstance(runner, GPUModelRunner)
    for name in ("model", "sampler", "input_batch", "compilation_config", "kv_cache_config", "discard_request_mask"):
        assert hasattr(runner, name), f"the model runner has no {name}"
    for name in ("num_tokens_no_spec", "num_prompt_tokens", "generators", "req_ids", "req_id_to_index"):
        assert hasattr(runner.input_batch, name), f"the input batch has no {name}"
    assert type(runner.sampler).__name__ == "InvariantSampler"
    layers = runner.compilation_config.static_forward_context
    assert len(layers) == 2, "one attention layer per decoder layer"
    assert {layer.attn_backend.__name__ for layer in layers.values()} == {"InvariantAttentionBackend"}
    for cache in runner.kv_caches:  # the arithmetic recipe has one head of keys and values, 64 wide
        blocks, heads, page, width = cache.shape  # [pages, H_kv, page, keys and values]
        assert (heads, page, width) == (1, BLOCK, 2 * 64) and cache.stride(-1) == 1


def test_an_engine_starts_where_stdout_has_no_descriptor(arithmetic_dir, monkeypatch):
    """vLLM's start-up asks for it on CUDA; a notebook's stdout has none. What the user prints goes where it did."""

    class Started(Exception):
        pass

    def start(*_: Any, **__: Any) -> None:
        raise Started(sys.stdout.fileno())

    monkeypatch.setattr("vllm.LLM", start)
    with contextlib.redirect_stdout(io.StringIO()) as redirected:
        with pytest.raises(io.UnsupportedOperation):
            sys.stdout.fileno()  # control
        with pytest.raises(Started):
            engine.Sampler(arithmetic_dir, invariant=False)
        print("mine")
    assert redirected.getvalue() == "mine\n"
