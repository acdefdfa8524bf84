"""A vLLM engine in the trainer's process, with log-probs by token id and weights that follow the trainer's."""

import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinvariant import runtime
from rlinvariant.arguments import model_problems
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.models import unsupported
from rlinvariant.rollout import Completion
from rlinvariant.sampler.names import ARCHITECTURE, NOT_ACTIVE, QUANTIZATION
from rlinvariant.support import cuda_problems


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


def _stdout_with_descriptor() -> AbstractContextManager[Any]:
    """vLLM silences NCCL through sys.stdout's file descriptor, and raises where there is none: in a notebook, or redirected."""
    try:
        sys.stdout.fileno()
    except (AttributeError, OSError):  # io.UnsupportedOperation is one
        return redirect_stdout(sys.__stdout__)
    return nullcontext()


HARMLESS = ("ignore_eos", "logprobs", "detokenize")  # the only further sampling settings that leave the distribution as it is
ALONE = {  # engine options that an exact sampler leaves as they are: it runs whole, on one device, the model that is trained
    "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_lora": False,
    "speculative_config": None, "kv_cache_dtype": "auto", "attention_config": None, "model_impl": "auto",
    "cpu_offload_gb": 0, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_dbo": False,
    "attention_backend": None, "logits_processors": None, "kv_transfer_config": None, "kv_offloading_size": None,
}  # fmt: skip
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def refuse(
    options: dict[str, Any],
    model: str,
    dtype: str,
    max_model_len: int | None = None,
    otherwise: str = "use invariance=off",
) -> int:
    """Raise ConfigErrors for what would give an exact engine other kernels or another model. Loads no weights.

    Returns how many positions the model has. `otherwise` tells the user how to run it all the same.
    """
    if problems := model_problems("model", model):
        raise ConfigErrors(problems)
    from transformers import AutoConfig, AutoModelForCausalLM

    runtime.quiet()
    fix = f"remove it, or {otherwise}"
    found = [f"sampler option {k}={v}: expected {ALONE[k]}; {fix}" for k, v in options.items() if k in ALONE and v != ALONE[k]]
    if (value := os.environ.get("VLLM_BATCH_INVARIANT", "0")) != "0":
        found.append(f"VLLM_BATCH_INVARIANT={value}: expected unset: it puts vLLM's own kernels in place of ours; {fix}")
    cuda = torch.cuda.is_available()
    found += cuda_problems(getattr(torch, dtype)) if cuda else []
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"model={model}: cannot be loaded: {one_line(error, 400)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        kind = ", ".join(config.architectures or [type(config).__name__])
        raise UserError(f"model={model}: {kind} is no causal language model of transformers; name a directory or id of one")
    found += [f"model={model}: {reason}; {otherwise}" for reason in unsupported(config, "cuda" if cuda else "cpu")]
    positions = config.get_text_config().max_position_embeddings
    if max_model_len is not None and max_model_len > positions:
        found.append(f"sampler.max_model_len={max_model_len}: expected at most {positions}, the model's positions")
    if found:
        raise ConfigErrors(found)
    return positions


def reported(outputs: Sequence[Any]) -> list[Completion]:
    """The completions of vLLM's `RequestOutput`s, with the log-prob that vLLM reports for each token, by token id."""
    completions = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        table: Any = output.outputs[0].logprobs
        completions.append(Completion(ids, [row[i].logprob for i, row in zip(ids, table, strict=True)]))
    return completions


class Sampler:
    """vLLM for rollouts. Engines of one process share vLLM's process groups: keep each alive as long as any other is used.

    Args:
        model: directory of a Hugging Face checkpoint.
        invariant: run `rlinvariant.ops` in it; else it is a stock engine.
        dtype: "bfloat16" or "float32".
        max_model_len: longest prompt plus completion, in tokens; None takes the model's.
        kv_cache_gib: memory for keys and values, in GiB; None: 1 on a CPU, an eighth of a GPU's.
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
        kv_cache_gib: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        runtime.configure()
        self.invariant = invariant
        with _undisturbed():
            from vllm import LLM, ModelRegistry
            from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
            from vllm.plugins import load_general_plugins

            cuda = torch.cuda.is_available()
            if kv_cache_gib is None:
                kv_cache_gib = torch.cuda.get_device_properties().total_memory / 2**33 if cuda else 1.0
            arguments: dict[str, Any] = {
                "dtype": dtype,
                "max_model_len": max_model_len,
                "skip_tokenizer_init": True,
                "disable_log_stats": True,
                "logprobs_mode": "processed_logprobs",
                "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
                "enforce_eager": not cuda,  # on a CPU compilation takes a minute and gains little
                "generation_config": "vllm",
                "use_tqdm_on_load": False,
            }
            if cuda:  # what is asked for is kv_cache_gib; this share is only compared with what the trainer has left free
                arguments |= {"gpu_memory_utilization": 0.01}
            else:
                arguments |= {"async_scheduling": False}
            fixed = (arguments.keys() - {"enforce_eager"}) | {"quantization", "hf_overrides"}
            if clash := sorted(fixed & (options or {}).keys()):
                raise UserError(f"sampler options {', '.join(clash)}: rlinvariant sets them itself; remove them")
            arguments |= options or {}
            if invariant:
                positions = refuse(options or {}, str(model), dtype, max_model_len)
                arguments["max_model_len"] = max_model_len or positions  # vLLM's own default may be beyond the rotary table
                load_general_plugins()
                if QUANTIZATION not in QUANTIZATION_METHODS:
                    raise UserError(NOT_ACTIVE)
                from rlinvariant.sampler.vllm_model import InvariantForCausalLM

                # The class itself: one that vLLM knows by name alone it inspects in another process, which takes 10 s
                ModelRegistry.register_model(ARCHITECTURE, InvariantForCausalLM)
                arguments |= {"quantization": QUANTIZATION, "hf_overrides": {"architectures": [ARCHITECTURE]}}
            if (
                torch.distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
            ):  # one engine per rank, each a world of its own to vLLM's tensor parallelism
                arguments["distributed_executor_backend"] = "external_launcher"
            with _stdout_with_descriptor():
                self.llm = LLM(str(model), **arguments)
            self._install()

    @property
    def _runner(self) -> Any:
        core: Any = self.llm.llm_engine.engine_core
        return core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        """The module that vLLM runs, without the wrapper that captures CUDA graphs."""
        return self._runner.get_model()

    def _install(self) -> None:
        from rlinvariant.sampler.vllm_model import StockSampler, install, spare_others

        if self.invariant:
            install(self._runner)
        else:
            self._runner.sampler = StockSampler(self._runner)
            spare_others(self.model)

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

        Raises:
            UserError: a prompt with its completion would not fit, or `sampling` would change the distribution of an
                invariant engine, whose log-probs are of the whole softmax.
        """
        if empty := [i for i, p in enumerate(prompts) if not p]:
            raise UserError(f"prompt {empty[0]} of this batch has no tokens: is it blank, or has model= no tokenizer?")
        longest = max(map(len, prompts), default=0)
        if longest + max_tokens > (limit := self.llm.llm_engine.model_config.max_model_len):
            raise UserError(
                f"a prompt of {longest} tokens and a completion of {max_tokens} do not fit sampler.max_model_len={limit}; "
                "raise it, or lower trainer.max_completion_length"
            )
        params = [
            self.params(s, temperature=temperature, max_tokens=max_tokens, stop_token_ids=stop_token_ids, **sampling)
            for s in seeds
        ]
        inputs: list[Any] = [{"prompt_token_ids": list(p)} for p in prompts]
        if self.invariant:
            self._runner.sampler.keep_drawn()
        try:
            with _undisturbed():
                outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except BaseException:  # an interrupted batch must not linger: the next one would wait for it forever
            engine: Any = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        if self.invariant:
            return self._drawn(outputs, self._runner.sampler.take_drawn())
        return reported(outputs)

    def params(
        self, seed: int, *, temperature: float, max_tokens: int, stop_token_ids: Sequence[int] = (), **sampling: Any
    ) -> Any:
        """vLLM's `SamplingParams` of one request of `generate`, which says what raises UserError."""
        refused = [f"{k}={v}" for k, v in sampling.items() if k not in HARMLESS and v not in (NEUTRAL.get(k), None)]
        if self.invariant and 0 < temperature < 0.01:
            refused.append(f"temperature={temperature}, which vLLM would raise to 0.01")
        if self.invariant and refused:
            raise UserError(f"{', '.join(refused)}: an exact sampler draws from the whole distribution; remove it")
        from vllm import SamplingParams

        shared: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "detokenize": False}
        shared |= {} if self.invariant else {"logprobs": 0}
        shared |= {"stop_token_ids": list(stop_token_ids), **sampling}
        return SamplingParams(seed=None if temperature == 0 else seed, **shared)

    @staticmethod
    def _drawn(outputs: Sequence[Any], drawn: dict[str, tuple[list[int], list[float]]]) -> list[Completion]:
        """The log-probs that our sampler kept, joined with vLLM's tokens, which must be the ones it drew."""
        drawn = {_external(request): row for request, row in drawn.items()}
        completions = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            tokens, logprobs = drawn.get(output.request_id, ([], []))
            if tokens[: len(ids)] != ids:
                raise RuntimeError(f"request {output.request_id}: vLLM's tokens are not those that were drawn for it")
            completions.append(Completion(ids, logprobs[: len(ids)]))
        return completions

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the trainer's parameters, by their Hugging Face names, and forget what was computed with the old ones."""
        pairs = [(name, w.detach()) for name, w in weights]
        with _undisturbed(), torch.no_grad():
            if self.invariant:
                self.model.load_weights(iter(pairs))
            else:
                self._runner.reload_weights(weights_iterator=iter(pairs))
                # A stock CPU engine multiplies by packed copies, and does not pack a tied head anew
                head: Any = getattr(self.model, "lm_head", None)
                if hasattr(head, "cpu_linear"):
                    head.quant_method.process_weights_after_loading(head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the sampler's parameters whose bytes differ from `weights` cast to its dtype. Empty when in sync.

        Every parameter of the vLLM model must be accounted for: one that no weight maps to is named too. A stock CPU engine
        has packed its matrices and freed the originals: there, up to 64 columns of each are read back by multiplying.
        """
        parts: dict[str, dict[Any, Tensor]] = {}
        for name, weight in weights:
            target, shard = _target(self.model, name)
            parts.setdefault(target, {})[shard] = weight.detach()
        own = dict(self.model.named_parameters())
        tied = "lm_head.weight" not in own
        bad = [name for name in parts if name not in own and not (tied and name == "lm_head.weight")]
        for name, have in own.items():
            if name not in parts or not _same_bytes(*self._readable(name, have.detach(), _whole(parts[name]))):
                bad.append(name)
        head = getattr(self.model, "lm_head", None)
        embedding = next((_whole(x) for n, x in parts.items() if n.endswith("embed_tokens.weight")), None)
        packed_apart = tied and hasattr(head, "cpu_linear") and not self.invariant
        if packed_apart and embedding is not None and not _same_bytes(*_columns(head, embedding)):
            bad.append("lm_head.weight")
        return bad

    def _readable(self, name: str, have: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """The parameter as vLLM computes with it, and what it should be, in one dtype."""
        if have.numel() == 0 and expected.numel():
            return _columns(self.model.get_submodule(name.rpartition(".")[0]), expected)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            have = have[: len(expected)]  # vLLM pads the vocabulary
        return have, expected.to(have.dtype)


_ORDER: list[Any] = [None, "q", "k", "v", *range(16)]  # how vLLM stacks the parts of a merged projection


def _whole(pieces: dict[Any, Tensor]) -> Tensor:
    return next(iter(pieces.values())) if len(pieces) == 1 else torch.cat([pieces[s] for s in sorted(pieces, key=_ORDER.index)])


def _columns(layer: Any, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Some columns of a packed weight, by multiplying unit vectors, and of the expected one."""
    n, k = expected.shape
    at = torch.arange(0, k, max(1, k // 64))
    dtype = next((p.dtype for p in layer.parameters()), torch.bfloat16)
    units = torch.zeros(len(at), k, dtype=dtype)
    units[torch.arange(len(at)), at] = 1
    product = layer.cpu_linear(units, layer.weight, None)
    product = product[:, :n] if hasattr(layer, "org_vocab_size") else product  # vLLM pads the vocabulary
    return product.to(dtype), expected.to(dtype)[:, at].t()


def _external(request: str) -> str:
    """A request's id as `LLM.generate` reports it: vLLM adds eight characters to it inside."""
    return request[:-9] if len(request) > 9 and request[-9] == "-" else request


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _target(model: Any, name: str) -> tuple[str, Any]:
    """Where vLLM keeps a Hugging Face parameter: the name of its own parameter, and which part of it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for original, (merged, shard) in getattr(mapper, "orig_to_new_stacked", {}).items():
        if f"{original}." in name:
            return name.replace(original, merged), shard
    return name, None
