"""A vLLM engine in the trainer's process, with log-probs by token id and weights that follow the trainer's."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinvariant import runtime
from rlinvariant.errors import UserError
from rlinvariant.rollout import Completion
from rlinvariant.sampler.plugin import ARCHITECTURE, QUANTIZATION

@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the trainer's random state and thread control: vLLM reseeds torch and disables `torch.set_num_threads`."""
    threads, set_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads = set_threads
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


class Sampler:
    """vLLM for rollouts.

    Args:
        model: directory of a Hugging Face checkpoint.
        invariant: run `rlinvariant.ops` in it; else it is a stock engine.
        dtype: "bfloat16" or "float32".
        max_model_len: longest prompt plus completion, in tokens; None takes the model's.
        kv_cache_gib: memory for keys and values, in GiB (CPU).
        options: further keyword arguments of `vllm.LLM`.

    Raises:
        UserError: the plugin is not active in the engine, or a setting would change the bits.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        invariant: bool,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        kv_cache_gib: float = 1.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        runtime.configure()
        self.invariant = invariant
        with _undisturbed():
            from vllm import LLM

            arguments: dict[str, Any] = {
                "dtype": dtype,
                "max_model_len": max_model_len,
                "skip_tokenizer_init": True,
                "disable_log_stats": True,
                "logprobs_mode": "processed_logprobs",
                "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
                "enforce_eager": True,
                "async_scheduling": False,
                "generation_config": "vllm",
            } | (options or {})
            if invariant:
                arguments |= {"quantization": QUANTIZATION, "hf_overrides": {"architectures": [ARCHITECTURE]}}
            if torch.distributed.is_initialized():  # one engine per rank, each a world of its own to vLLM's tensor parallelism
                arguments["distributed_executor_backend"] = "external_launcher"
            self.llm = LLM(str(model), **arguments)
            if invariant:
                self._install()

    @property
    def _runner(self):
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> torch.nn.Module:
        """The module that vLLM runs."""
        return self._runner.model

    def _install(self) -> None:
        from rlinvariant.sampler.vllm_model import InvariantAttentionBackend, InvariantForCausalLM, InvariantSampler

        if not isinstance(self.model, InvariantForCausalLM):
            raise UserError(
                f"plugin not active: vLLM runs {type(self.model).__name__}, not {InvariantForCausalLM.__name__}; install "
                "rlinvariant in this environment (pip install -e .) so that vLLM finds its entry point"
            )
        for name, layer in self._runner.compilation_config.static_forward_context.items():
            if (backend := getattr(layer, "attn_backend", None)) is not InvariantAttentionBackend:
                raise UserError(f"plugin not active in {name}: its attention is {getattr(backend, '__name__', backend)}")
        self._runner.sampler = InvariantSampler(self._runner)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
        stop_token_ids: Sequence[int] = (),
        **sampling: Any,
    ) -> list[Completion]:
        """One completion for each prompt of token ids, in order.

        Args:
            prompts: token ids; must not be empty.
            seeds: one per prompt, in [0, 2**63); equal seeds of equal prompts give equal completions.
            temperature: 0 for greedy.
            max_tokens: longest completion.
            stop_token_ids: end a completion, and belong to it.
            sampling: further `vllm.SamplingParams`.
        """
        from vllm import SamplingParams

        shared: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "logprobs": 0, "detokenize": False}
        shared |= {"stop_token_ids": list(stop_token_ids), **sampling}
        params = [SamplingParams(seed=None if temperature == 0 else s, **shared) for s in seeds]
        with _undisturbed():
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False
            )  # fmt: skip
        completions = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            table = output.outputs[0].logprobs
            completions.append(Completion(ids, [row[i].logprob for i, row in zip(ids, table, strict=True)]))
        return completions

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the trainer's parameters, by their Hugging Face names, and forget what was computed with the old ones."""
        with _undisturbed(), torch.no_grad():
            self.model.load_weights((name, w.detach()) for name, w in weights)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the parameters whose bytes differ from `weights`, cast to the sampler's dtype. Empty when in sync.

        Every parameter of the vLLM model must be accounted for by the trainer's: one that no weight maps to is named too.
        """
        own = dict(self.model.named_parameters())
        parts: dict[str, dict[Any, Tensor]] = {}
        for name, weight in weights:
            target, shard = _target(self.model, name)
            parts.setdefault(target, {})[shard] = weight.detach()
        bad = sorted(own.keys() - parts.keys())
        for name, pieces in parts.items():
            if name not in own:
                if name == "lm_head.weight":  # tied: the embedding is the head
                    continue
                bad.append(name)
                continue
            order = {"q": 0, "k": 1, "v": 2}
            expected = torch.cat([pieces[s] for s in sorted(pieces, key=lambda s: order.get(s, s) or 0)])
            have = own[name].detach()
            have = have[: len(expected)] if have.dim() and len(have) > len(expected) else have  # vocabulary padding
            if not _same_bytes(have, expected.to(have.dtype)):
                bad.append(name)
        return bad


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _target(model, name: str) -> tuple[str, Any]:
    """Where vLLM keeps a Hugging Face parameter: the name of its own parameter, and which part of it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    stacked = dict(mapper.orig_to_new_stacked) if mapper is not None else {}
    stem, _, leaf = name.rpartition(".")
    for original, (merged, shard) in stacked.items():
        if stem == original:
            return f"{merged}.{leaf}", shard
    return name, None
