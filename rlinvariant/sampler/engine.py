"""A vLLM engine in the trainer's process, with log-probs by token id and weights that follow the trainer's.

sampler = Sampler("Qwen/Qwen3-0.6B", invariant=True)
[completion] = sampler.generate([[9707, 11]], seeds=[7], temperature=1.0, max_tokens=16)
completion.token_ids, completion.sampler_logprobs    # one fp32 log-prob for each token
sampler.sync(model.named_parameters())               # after an optimizer step
assert not sampler.differing_weights(model.named_parameters())
"""

import gc
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlinvariant import runtime
from rlinvariant.checksums import Checksum
from rlinvariant.errors import UserError, one_line, raised_here
from rlinvariant.model_source import base_and_adapter
from rlinvariant.models import adapter_files
from rlinvariant.models.experts import in_checkpoint
from rlinvariant.models.lora import split
from rlinvariant.rollout import Completion
from rlinvariant.sampler import adapters, packed, plugin
from rlinvariant.sampler import weights as synced
from rlinvariant.sampler.names import ARCHITECTURE, QUANTIZATION
from rlinvariant.sampler.refusals import refuse, without_fused_sums
from rlinvariant.sampler.settings import require_room, sampling_params
from rlinvariant.sampler.undisturbed import stdout_with_descriptor, undisturbed
from rlinvariant.types import JsonObject, Untyped

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


def _arguments(dtype: str, max_model_len: int | None, kv_cache_gib: float | None) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that are set here, for either kind of engine; each says what vLLM reads it for."""
    cuda = torch.cuda.is_available()
    if kv_cache_gib is None:
        kv_cache_gib = torch.cuda.get_device_properties().total_memory / 2**33 if cuda else 1.0
    arguments: dict[str, Any] = {
        "dtype": dtype,  # what parameters and activations are computed in; the default is the checkpoint's dtype
        "max_model_len": max_model_len,  # longest request; sizes the block table and, on some models, the rotary table
        "skip_tokenizer_init": True,  # load no tokenizer: prompts come and completions go as token ids
        "disable_log_stats": True,  # count no statistics of its own
        "logprobs_mode": "processed_logprobs",  # which log-probs a stock engine reports: after the temperature, not before
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),  # size of the cache, in place of a share of the device's memory
        "enforce_eager": not cuda,  # neither compile nor capture graphs: on a CPU compilation takes a minute and gains little
        "generation_config": "vllm",  # where defaults of sampling come from: from vLLM, not from the checkpoint's directory
        "use_tqdm_on_load": False,  # draw no progress bar
    }
    if cuda:
        arguments["gpu_memory_utilization"] = 0.01  # the share that must be free at start, which the trainer may have taken
    else:
        arguments["async_scheduling"] = False  # schedule a step while the last one computes: on a CPU they share the cores
    if torch.distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # who starts the workers: nobody, since each rank of the trainer has an engine of its own, a world of one to vLLM
        arguments["distributed_executor_backend"] = "external_launcher"
    return arguments


def _group_of_experts() -> None:
    """Make vLLM's group of expert parallelism where a process has the others, because its first engine was of a dense model.

    vLLM makes all groups with the first engine only, and a mixture's stock engine that comes later finds this one missing.
    """
    from vllm.distributed import parallel_state as groups

    if not groups.model_parallel_is_initialized() or groups._EP is not None:
        return
    together = torch.arange(torch.distributed.get_world_size()).view(-1, groups.get_tp_group().world_size).tolist()
    world = groups.get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    groups._EP = groups.init_model_parallel_group(together, world.local_rank, backend, group_name="ep")


def _release(core: Any) -> None:
    """Give back what an engine holds, as vLLM does, but for the process groups, which all engines of a process share.

    vLLM destroys them with the first engine that is collected, PyTorch's default group among them: every other engine, and
    accelerate, would be without.
    """
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # vLLM has hidden from the collector whatever was there when the engine had started


def reported(outputs: Sequence[Untyped]) -> list[Completion]:
    """Return the completions of vLLM's `RequestOutput`s, with the log-prob that vLLM reports for each token, by token id."""
    completions = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        table: Any = output.outputs[0].logprobs
        logprobs = [row[i].logprob for i, row in zip(ids, table, strict=True)]
        completions.append(Completion(ids, logprobs, output.num_cached_tokens or 0))
    return completions


class Sampler:
    """Draws rollouts by a vLLM engine in this process, with the weights that `sync` gave it last.

    A process may have several, one after the other or at once. One that nothing refers to gives its memory back when the next
    one starts; `close` does so now.

    With `options={"tensor_parallel_size": N}` the processes of a launch share an engine, N by N, each with some columns of each
    product. Those of one engine make the same calls, with the same arguments, and get the same; `GroupSampler` is for others.

    Args:
        model: directory or hub id of a Hugging Face checkpoint; or directory of a PEFT adapter, of an invariant engine.
        invariant: whether the engine computes through `rlinvariant.ops`; else it is a stock engine.
        dtype: of activations and of the engine's weights, "bfloat16" or "float32".
        max_model_len: longest prompt plus completion, in tokens; None: the model's number of positions.
        kv_cache_gib: memory for keys and values, in GiB; None: 1 on a CPU, an eighth of a GPU's.
        options: further keyword arguments of `vllm.LLM`.
        positions: what `refuse` returned for the same arguments, where it has run already; None: it runs here.
        ranks: LoRA adapters that `sync` will bring: the rank of each, by the name of the projection. Of an invariant engine;
            None: those of `model`, if it is an adapter's directory.

    Raises:
        UserError: the plugin is not active in the engine, or an option is one that is set here; an adapter that cannot be read.
        ConfigErrors: what `refuse` finds.
    """

    llm: "LLM"  # for what this class does not wrap
    invariant: bool

    def __init__(
        self,
        model: str | Path,
        *,
        invariant: bool,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        kv_cache_gib: float | None = None,
        options: JsonObject | None = None,
        positions: int | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        runtime.quiet()
        runtime.configure()
        self.invariant, (model, directory) = invariant, base_and_adapter(str(model))
        adapter = None if directory is None else adapter_files.read(directory)
        if adapter is not None and not invariant:
            raise UserError(f"{directory}: a stock engine takes whole weights; {adapter_files.MERGE} {directory}")
        ranks = ranks if adapter is None else adapter.ranks
        processes = (options or {}).get("tensor_parallel_size", 1)
        gc.unfreeze()
        gc.collect()  # an earlier engine, of a notebook's cell that runs again, holds gigabytes until it is collected
        with undisturbed():
            from vllm import LLM

            arguments = _arguments(dtype, max_model_len, kv_cache_gib)
            fixed = (arguments.keys() - {"enforce_eager"}) | {"quantization", "hf_overrides"}
            if clash := sorted(fixed & (options or {}).keys()):
                raise UserError(f"sampler options {', '.join(clash)}: rlinvariant sets them itself; remove them")
            arguments |= options or {}
            if processes > 1 and not torch.cuda.is_available():
                arguments["worker_cls"] = "rlinvariant.sampler.vllm_columns.Worker"
            if invariant:
                if positions is None:
                    positions = refuse(options or {}, str(model), dtype, max_model_len)
                if adapter is not None:
                    adapter.require_fit_to(str(model))
                arguments["max_model_len"] = max_model_len or positions  # vLLM's own default may be beyond the rotary table
                plugin.load()
                plugin.register_class()
                if processes > 1:
                    arguments["disable_custom_all_reduce"] = True  # nothing is added over processes
                    if torch.cuda.is_available():
                        arguments["compilation_config"] = without_fused_sums(arguments.get("compilation_config"))
                arguments |= {"quantization": QUANTIZATION, "hf_overrides": {"architectures": [ARCHITECTURE]}}
            with stdout_with_descriptor(), adapters.expecting(ranks or {}):
                _group_of_experts()
                try:
                    self.llm = LLM(str(model), **arguments)
                except ValueError as error:  # of its options, or of memory that is not there
                    if raised_here(error):
                        raise
                    raise UserError(f"vLLM cannot make the engine: {one_line(error)}; change the sampler's options") from error
            core: Any = self.llm.llm_engine.engine_core
            if hasattr(core, "_finalizer"):  # vLLM 0.26 has none
                core._finalizer.detach()
            if processes > 1:
                from rlinvariant.sampler.vllm_columns import drop_queue

                drop_queue()
            self._end = weakref.finalize(core, _release, core.engine_core)
            self._install()
            if adapter is not None:
                self.sync(adapter.weights)
            if not torch.cuda.is_available():
                # The kernel gives a page when it is first written to, and requests reach further pages for hundreds of steps:
                # now, a machine that has too little memory says so at the start, and what grows later is a leak.
                for cache in self._runner.kv_caches:
                    cache.zero_()

    def close(self) -> None:
        """Give the engine's memory back; the sampler cannot be used any more. Closing twice does nothing."""
        self._end()
        self.__dict__.pop("llm", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __getattr__(self, name: str) -> Any:
        """Raise UserError for the engine of a closed sampler, and AttributeError for any other name that is not there."""
        if name == "llm" and "_end" in self.__dict__:
            raise UserError("the sampler is closed, by its close() or the trainer's: make another to draw or to train with")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def max_model_len(self) -> int:
        """Return the most tokens of a prompt and its completion."""
        return self.llm.llm_engine.model_config.max_model_len

    @property
    def _runner(self) -> Any:
        core: Any = self.llm.llm_engine.engine_core
        return core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Untyped:
        """Return the module that vLLM runs, without the wrapper that captures CUDA graphs."""
        return self._runner.get_model()

    @property
    def routes(self) -> Untyped:
        """Return what notes the experts of each token; None where the model is no mixture, or is compiled."""
        return self._runner.sampler.routes

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
        max_tokens: int | Sequence[int],
        stop_token_ids: Sequence[int] = (),
        **sampling: Untyped,
    ) -> list[Completion]:
        """Draw one completion for each prompt, in the order of the prompts.

        Args:
            prompts: token ids of each; none may be empty.
            seeds: one per prompt, in [0, 2**63); equal seeds of equal prompts give equal completions.
            temperature: 0 draws greedily; an invariant engine takes 0 or at least 0.01.
            max_tokens: most tokens of a completion, 1 or more: one number for all, or one for each prompt.
            stop_token_ids: tokens that end a completion and belong to it, beside the model's own end token.
            sampling: further fields of `vllm.SamplingParams`; `top_k`, `top_p`, `min_p` mean what they mean to `ops.threshold`.

        Returns:
            A `Completion` for each prompt: its tokens and, for each, the log-prob at `temperature` as an fp32 value.

        Raises:
            UserError: a prompt is empty or does not fit with its completion, or `sampling` would change the distribution of an
                invariant engine in a way that the trainer's model does not know, as a penalty does.
        """
        most = require_room(prompts, max_tokens, self.max_model_len)
        params = [
            self.params(s, temperature=temperature, max_tokens=n, stop_token_ids=stop_token_ids, **sampling)
            for s, n in zip(seeds, most, strict=True)
        ]
        inputs: list[Any] = [{"prompt_token_ids": list(p)} for p in prompts]
        if self.invariant:
            self._runner.sampler.keep_drawn()
        if self.routes is not None:
            self.routes.start()
        try:
            with undisturbed():
                outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except BaseException:  # an interrupted batch must not linger: the next one would wait for it forever
            engine: Any = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        drawn = self._drawn(outputs, self._runner.sampler.take_drawn()) if self.invariant else reported(outputs)
        return drawn if self.routes is None else self.routes.given(drawn, [output.request_id for output in outputs])

    def finish(self) -> None:
        """Say that this process asks for no more of a rollout; of use in `GroupSampler`, whose processes draw together."""

    def params(
        self, seed: int, *, temperature: float, max_tokens: int, stop_token_ids: Sequence[int] = (), **sampling: Untyped
    ) -> "SamplingParams":
        """Return vLLM's settings of one request; arguments and errors are those of `generate`."""
        shared = {"temperature": temperature, "max_tokens": max_tokens, "stop_token_ids": stop_token_ids}
        return sampling_params(seed, invariant=self.invariant, **shared, **sampling)

    @staticmethod
    def _drawn(outputs: Sequence[Any], drawn: dict[str, tuple[list[int], list[float]]]) -> list[Completion]:
        """Join the log-probs that our sampler kept with vLLM's tokens, which must be the ones that were drawn."""
        drawn = {external(request): row for request, row in drawn.items()}
        completions = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            tokens, logprobs = drawn.get(output.request_id, ([], []))
            if tokens[: len(ids)] != ids:
                raise RuntimeError(f"request {output.request_id}: vLLM's tokens are not those that were drawn for it")
            completions.append(Completion(ids, logprobs[: len(ids)], output.num_cached_tokens or 0))
        return completions

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the trainer's parameters and forget the prefix cache, which was computed with the old ones.

        Args:
            weights: Hugging Face names and tensors of the checkpoint's shapes, of any float dtype and device; they are rounded
                to the engine's dtype.

        Raises:
            RuntimeError: a request is still running.
        """
        pairs = ((name, w.detach()) for name, w in weights)  # one after the other, as shards are gathered
        with undisturbed(), torch.no_grad():
            if self.invariant:
                self.model.load_weights(pairs)
            else:
                kind = self.llm.llm_engine.model_config.hf_text_config.model_type
                self._runner.reload_weights(weights_iterator=in_checkpoint(pairs, kind))
                packed.pack_anew(self.model)
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """Forget what is cached of prompts. Raises RuntimeError while a request is running."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Name the sampler's parameters whose bytes differ from `weights` cast to its dtype. Empty when in sync.

        Every parameter of the vLLM model must be accounted for: one that no weight maps to is named too. A stock CPU engine
        has packed its matrices and freed the originals: there, up to 64 columns of each are read back by multiplying.

        Args:
            weights: as for `sync`.
        """
        own, of_adapters = split(weights)
        return synced.differing(self.model, own, self.invariant) + adapters.differing(self.model, of_adapters)

    def memory_of(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return the engine's own memory of weights, by their names, as views that are written to by the next `sync`.

        Args:
            weights: Hugging Face names and tensors. Those that the engine has in another shape, dtype or device are left out.
        """
        return synced.views(self.model, weights) if self.invariant else {}

    @property
    def dtype(self) -> torch.dtype:
        """Return what weights are rounded to."""
        return self.llm.llm_engine.model_config.dtype

    def differing_checksums(self, weights: Mapping[str, Checksum]) -> list[str]:
        """Do what `differing_weights` does for weights that are elsewhere, or in shards: by sums over all their words.

        Args:
            weights: the checksum of each, cast to `dtype`, by its Hugging Face name.

        Raises:
            RuntimeError: the engine is a stock one, whose packed matrices cannot be read whole.
        """
        if not self.invariant:
            raise RuntimeError("a stock engine's packed weights have no checksum")
        return adapters.differing_checksums(self.model, weights)


def external(request: str) -> str:
    """Return a request's id as `LLM.generate` reports it: inside, vLLM adds a dash and eight characters to it."""
    return request[:-9] if len(request) > 9 and request[-9] == "-" else request
