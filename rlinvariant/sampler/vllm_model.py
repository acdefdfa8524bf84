"""The parts that run inside vLLM in place of its own layers; written for vLLM 0.26 (CUDA) and 0.32 (CPU).

This file, vllm_attention.py, vllm_columns.py, vllm_linear.py and vllm_serve.py hold all that depends on vLLM's internals, for
the day they move.

vLLM's transformers backend builds the Hugging Face model; `make_invariant` patches it exactly as it patches the trainer's;
vLLM then puts its linear layers, cache and attention into it, and these classes make them call `rlinvariant.ops`.
"""

import inspect
import secrets
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import MinPLogitsProcessor
from vllm.v1.sample.sampler import Sampler

from rlinvariant import ops
from rlinvariant.errors import UserError
from rlinvariant.models.lora import without_adapters
from rlinvariant.models.modules import become, logits_scaling
from rlinvariant.models.patch import make_invariant
from rlinvariant.sampler import adapters, vllm_columns
from rlinvariant.sampler.expert_loader import ExpertLoader
from rlinvariant.sampler.names import NOT_ACTIVE
from rlinvariant.sampler.routes import Routes, routes
from rlinvariant.sampler.vllm_attention import InvariantAttentionBackend
from rlinvariant.sampler.vllm_linear import is_ours, pack_weights, products
from rlinvariant.types import Untyped

ROWS_IN_FP64 = 256  # rows whose log-probs over the whole vocabulary are made at once: a prompt may have thousands


class _GateAndUpInOne(nn.Module):
    """Computes an MLP whose gate and up projections vLLM has merged."""

    gate_up_proj: nn.Module

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate_up_proj(x).chunk(2, -1)


class InvariantForCausalLM(TransformersForCausalLM):
    """Runs the transformers backend with the model patched before vLLM replaces its layers."""

    def __init__(self, *, vllm_config: Untyped, prefix: str = "") -> None:  # vLLM looks at these names
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vllm_columns.gather_embeddings(self)

    def recursive_replace(self) -> None:
        AutoModel._model_mapping._extra_content.pop(type(self.config), None)  # see _decorate_for_torch_compile
        make_invariant(self.model, self.model_config.dtype)
        self._patch_config()  # the attention is vLLM's here: it owns the cache
        module: Any
        for name, module in self.model.named_modules():
            if hasattr(module, "gate_and_up"):
                self._merge_gate_and_up(f"model.{name}", module)
            elif hasattr(module, "embed_scale") and hasattr(module, "compute_dtype"):
                module.embed_scale.fill_(module.scale)  # vLLM 0.26 takes the layer away and scales by this
        if (count := vllm_columns.processes()) > 1:
            vllm_columns.require_heads_apart(self.model, count, self.model_config.dtype, self.device_config.device)
        vllm_columns.spread(self.model, self.quant_config)
        super().recursive_replace()

    def _merge_gate_and_up(self, name: str, mlp: Any) -> None:
        """Make one product of gate and up, as vLLM's own models have it. vLLM 0.26 merges them only around its own SwiGLU."""
        mlp.gate_up_proj = MergedColumnParallelLinear(
            mlp.gate_proj.in_features,
            [mlp.gate_proj.out_features, mlp.up_proj.out_features],
            bias=mlp.gate_proj.bias is not None,
            quant_config=self.quant_config,
            prefix=f"{name}.gate_up_proj",
            return_bias=False,
        )
        stacked: Any = self.hf_to_vllm_mapper.orig_to_new_stacked
        for shard, part in enumerate(("gate_proj", "up_proj")):
            stacked[f"{name}.{part}"] = (f"{name}.gate_up_proj", shard)
            delattr(mlp, part)
        become(mlp, _GateAndUpInOne)

    def _decorate_for_torch_compile(self, **from_config) -> None:
        """Compile a subclass of the decoder. vLLM would decorate the Hugging Face class, for every other model of it too.

        The mapping makes `AutoModel.from_config`, which vLLM calls next, build the subclass.
        """
        if self.compilation_config.mode == CompilationMode.NONE:
            return
        # Sums and products between ops round one by one, as they do where nothing is compiled
        self.compilation_config.inductor_compile_config["emulate_precision_casts"] = True
        stock: Any = AutoModel._model_mapping[type(self.config)]
        compiled = type(stock.__name__, (stock,), {"__module__": stock.__module__})
        axes: dict[str, Any] = {
            "input_ids": 1,
            "inputs_embeds": 1,
            "position_ids": -1,
        }  # where tokens are, in [1, T] and [1, T, D]
        support_torch_compile(dynamic_arg_dims=axes)(compiled)
        AutoModel._model_mapping._extra_content[type(self.config)] = compiled

    def _get_attn_cls(self):
        """Return the attention class, which vLLM 0.32 asks for."""
        if (cls := super()._get_attn_cls()) is not Attention:
            raise NotImplementedError(f"rlinvariant: {cls.__name__} is not supported, only decoder attention")
        return partial(Attention, attn_backend=InvariantAttentionBackend)

    def create_attention_instances(self) -> dict[int, Attention]:
        """Return the attention layers by the number of their decoder layer, which vLLM 0.26 asks for."""
        shared = {
            "num_heads": self.model_config.get_num_attention_heads(self.parallel_config),
            "num_kv_heads": self.model_config.get_num_kv_heads(self.parallel_config),
            "head_size": self.model_config.get_head_size(),
            "cache_config": self.cache_config,
            "quant_config": self.quant_config,
            "attn_backend": InvariantAttentionBackend,
        }

        def layer(i: int, module: Any) -> Attention:
            own = {"scale": module.scaling, "per_layer_sliding_window": module.window, "logits_soft_cap": module.softcap}
            return Attention(**shared, **own, prefix=f"{i}.attn")

        return {i: layer(i, module) for i, module in _attention_modules(self.model).items()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights by their Hugging Face names, at the start and at every sync, all or some, and pack these anew.

        vLLM's stock layers pack their weights too; a copy that is opaque to the compiler is of use in eager mode alone.
        """
        if not getattr(self, "adapters_attached", False):
            adapters.attach(self)
            self.adapters_attached = True
        of_adapters: list[tuple[str, Tensor]] = []
        of_experts = ExpertLoader(self)
        loaded = super().load_weights(of_experts.others(without_adapters(weights, of_adapters)))
        loaded |= of_experts.loaded()
        adapters.load(self, of_adapters)
        if self.compilation_config.mode == CompilationMode.NONE:
            pack_weights(self, loaded)
        return loaded

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits scaled and bounded as the trainer's: vLLM rounds its bounds elsewhere, and ignores Granite's scale.

        Args:
            hidden_states: [rows, D], bf16 or fp32.
        """
        self.logits_processor.scale, self.logits_processor.soft_cap = 1.0, None
        logits = super().compute_logits(hidden_states)
        return None if logits is None else ops.scale_logits(logits, *logits_scaling(self.text_config))


class _SeedKeeper(Sampler):
    """Samples as vLLM does, with seeds that survive a chunked prefill.

    vLLM samples for a request whose prefill was cut, throws the token away and rewinds its generator, by what its own sampler
    would have drawn; a CPU generator cannot be rewound at all, and raises. So the generators of such requests are taken away
    before vLLM looks, and given back afterwards.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        self.runner, self._kept = runner, {}
        self.routes: Routes | None = routes(runner)

    def give_back(self) -> None:
        batch = self.runner.input_batch
        for request, generator in self._kept.items():
            if request in batch.req_id_to_index:
                batch.generators.setdefault(batch.req_id_to_index[request], generator)
        self._kept = {}

    def take_away(self, rows: int) -> None:
        batch = self.runner.input_batch
        for i in self.runner.discard_request_mask.np[:rows].nonzero()[0].tolist():
            if i in batch.generators:
                self._kept[batch.req_ids[i]] = batch.generators.pop(i)


class InvariantSampler(_SeedKeeper):
    """Samples by `ops.sample`: temperature, log-prob and noise in one op, in which a row depends on that row alone.

    Top-k, top-p and min-p are one number of a row, by `ops.threshold`: below it no token is drawn.

    The noise is a hash of the request's seed and of how many tokens it has drawn: unlike a generator it has no state that a
    preempted request would have to replay.

    What is drawn is also kept here, on the device: vLLM's own way of handing out log-probs takes a tenth of its time.
    """

    def __init__(self, runner: Untyped) -> None:
        super().__init__(runner)
        self._steps: list[tuple[list[str], np.ndarray, Tensor, Tensor]] | None = None

    def keep_drawn(self) -> None:
        """Keep what is drawn from now on, until `take_drawn`."""
        self._steps = []

    def take_drawn(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return tokens and log-probs of every request since `keep_drawn`, by vLLM's internal request id; keep no more."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        self.add_drawn(found)
        self._steps = None
        return found

    def add_drawn(self, found: dict[str, tuple[list[int], list[float]]]) -> None:
        """Add to `found`, as of earlier calls, what was drawn since `keep_drawn` or the last call.

        A position may have been drawn twice, the same each time: in a prefill that was cut, or before a preemption. The last
        counts. A request that vLLM has found to be finished one step late has a token too many.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        tokens = torch.cat([step[2] for step in steps]).tolist()
        logprobs = torch.cat([step[3] for step in steps]).tolist()
        at = 0
        for requests, positions, _, _ in steps:
            for request, position in zip(requests, positions.tolist(), strict=True):
                its_tokens, its_logprobs = found.setdefault(request, ([], []))
                if position > len(its_tokens):
                    raise RuntimeError(f"request {request}: token {position} was drawn after {len(its_tokens)}")
                its_tokens[position:] = [tokens[at]]
                its_logprobs[position:] = [logprobs[at]]
                at += 1

    def forward(
        self, logits: Tensor, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None
    ) -> SamplerOutput:
        """Draw a token for each row of logits [rows, V], and report as many log-probs as the most demanding row wants."""
        md, rows, batch = sampling_metadata, len(logits), self.runner.input_batch
        self.give_back()
        seeds = [batch.generators[i].initial_seed() if i in batch.generators else secrets.randbits(63) for i in range(rows)]
        self.take_away(rows)
        if self.routes is not None:
            self.routes.note(rows)
        positions = batch.num_tokens_no_spec[:rows].astype(np.int64) - batch.num_prompt_tokens[:rows]
        logits = self.apply_logits_processors(logits, md, predict_bonus_token)
        if md.temperature is None:
            temperature = torch.zeros(rows, dtype=torch.float32, device=logits.device)
        else:
            temperature = md.temperature if md.all_random else torch.where(md.temperature < 1e-5, 0.0, md.temperature)
        # unsigned: how a generator gives a negative seed back
        noise = torch.from_numpy(np.stack([np.array(seeds, np.uint64).view(np.int64), positions]))
        if logits.is_cuda:
            noise = noise.pin_memory().to(logits.device, non_blocking=True)
        theta = _threshold(logits, temperature, md)
        tokens, logprobs, ranks = ops.sample(logits, temperature, noise[0], noise[1], theta)
        if self._steps is not None:
            self._steps.append((batch.req_ids[:rows], positions, tokens, logprobs))
        extra = md.max_num_logprobs
        if extra == 0:
            out = LogprobsTensors(tokens.int()[:, None], logprobs[:, None], ranks)
        elif extra is not None:
            table = ops.log_softmax(logits, temperature, theta)
            every = torch.arange(table.shape[1], device=table.device).expand(table.shape)
            top, ids = _top(table, extra) if extra > 0 else (table, every)
            out = LogprobsTensors(torch.cat([tokens[:, None], ids], 1).int(), torch.cat([logprobs[:, None], top], 1), ranks)
        else:
            out = None
        return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=out)

    @staticmethod
    def compute_logprobs(logits: Tensor) -> Tensor:
        """Return the log-probs [rows, V] of a prompt's rows at temperature 1."""
        temperature = torch.ones(len(logits), dtype=torch.float32, device=logits.device)
        blocks = zip(logits.split(ROWS_IN_FP64), temperature.split(ROWS_IN_FP64), strict=True)
        return torch.cat([ops.log_softmax(x, t) for x, t in blocks])

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """Gather log-probs and ranks of a prompt's tokens; vLLM's own compiles a kernel for the ranks (11 s on a CPU)."""
        blocks = [_top(x, num_logprobs) for x in logprobs.split(ROWS_IN_FP64)]
        top, ids = (torch.cat(x) for x in zip(*blocks, strict=True))
        own = logprobs.gather(-1, token_ids[:, None])
        ranks = (logprobs >= own).sum(-1)
        return LogprobsTensors(torch.cat([token_ids[:, None], ids], 1).int(), torch.cat([own, top], 1), ranks)


def _threshold(logits: Tensor, temperature: Tensor, md: Any) -> Tensor | None:
    """Return the smallest logit that each row may draw, [rows] fp32; None where no request of the batch asks for one."""
    in_use = (p for p in md.logitsprocs.argmax_invariant if isinstance(p, MinPLogitsProcessor) and p.min_p_count)
    min_p = next((p.min_p[:, 0] for p in in_use), None)
    if md.top_k is None and md.top_p is None and min_p is None:
        return None
    top_k = torch.zeros_like(temperature, dtype=torch.int64) if md.top_k is None else md.top_k.long()
    top_p = torch.ones_like(temperature) if md.top_p is None else md.top_p
    return ops.threshold(logits, temperature, top_k, top_p, torch.zeros_like(temperature) if min_p is None else min_p)


def _top(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values of each row and where they are; of equal ones the first come first.

    `topk` alone takes any of equal ones: which, depends on how many are asked for, and vLLM asks for as many as the most
    demanding request of the batch.
    """
    words = logprobs.view(torch.int32).long()
    order = torch.where(words < 0, -(2**31) - words, words)  # increases with the float; -0 is as large as 0
    place = torch.arange(logprobs.shape[1], device=logprobs.device)
    ids = (order * 2**32 - place).topk(count).indices
    return logprobs.gather(-1, ids), ids


def _attention_modules(model: Any) -> dict[int, Any]:
    """Return the patched attention modules by the number of their decoder layer."""
    return {module.layer_idx: module for module in model.modules() if hasattr(module, "softcap")}


def require_installed(runner: Untyped) -> tuple[int, int]:
    """Return how many attention layers and matrix products the engine's model has, all of which are ours.

    Raises:
        UserError: one of them is not ours, or vLLM read a window, cap or scale off the configuration that the model's own
            forward does not have.
    """
    model: Any = runner.get_model()
    if not isinstance(model, InvariantForCausalLM):
        raise UserError(f"vLLM runs {type(model).__name__}, not {InvariantForCausalLM.__name__}; {NOT_ACTIVE}")
    layers = runner.compilation_config.static_forward_context
    for name, layer in layers.items():
        if (backend := getattr(layer, "attn_backend", None)) is not InvariantAttentionBackend:
            raise UserError(f"plugin not active in {name}: its attention is {getattr(backend, '__name__', backend)}")
    for i, module in _attention_modules(model.model).items():
        layer: Any = getattr(module, "attn", None) or cast(Any, model).attention_instances[i]  # in vLLM 0.32, in 0.26
        found = {name: getattr(layer.impl, name) for name in ("scale", "window", "softcap")}
        if found != (own := {"scale": module.scaling, "window": module.window, "softcap": module.softcap}):
            raise UserError(f"layer {i}: vLLM gives its attention {found}, the model's own forward {own}; use invariance=off")
    multiplying = products(model)
    for name, layer in multiplying.items():
        if not is_ours(layer):
            raise UserError(f"plugin not active in {name}: its product is {type(layer.quant_method).__name__}")
    return len(layers), len(multiplying)


def install(runner: Untyped) -> None:
    """Put our sampler into an engine. Raises UserError if its model is not ours."""
    require_installed(runner)
    runner.sampler = InvariantSampler(runner)


class StockSampler(_SeedKeeper):
    """Samples as vLLM does, without a token's rank, for which vLLM compiles a kernel at the first request (11 s on a CPU)."""

    def forward(self, logits: Tensor, *args, **kwargs) -> SamplerOutput:
        self.give_back()
        self.take_away(len(logits))
        if self.routes is not None:
            self.routes.note(len(logits))
        return super().forward(logits, *args, **kwargs)

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        top, ids = logprobs.topk(num_logprobs, -1)
        own = token_ids[:, None]
        ranks = torch.zeros_like(token_ids)
        return LogprobsTensors(torch.cat([own, ids], 1).int(), torch.cat([logprobs.gather(-1, own), top], 1), ranks)


def spare_others(model: nn.Module) -> None:
    """Let the process's other Hugging Face models be built and run after a stock engine has decorated their class.

    Where vLLM has no model of its own, it takes the Hugging Face one and replaces `__init__` and `__call__` in its class, for
    every instance: outside of vLLM the one asks for a vLLM configuration, and the other compiles.
    """
    for cls in {c for module in model.modules() for c in type(module).__mro__ if c.__module__.startswith("transformers.")}:
        if TorchCompileWithNoGuardsWrapper in cls.__bases__ and "spares_others" not in vars(cls):
            _spare_others_of(cls)


def _spare_others_of(cls: Any) -> None:
    """Make one decorated class behave as decorated only where vLLM builds and runs it."""
    vllm_init, vllm_call = vars(cls)["__init__"], vars(cls)["__call__"]
    own_init = inspect.getclosurevars(vllm_init).nonlocals["old_init"]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        (own_init if get_current_vllm_config_or_none() is None else vllm_init)(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        built_by_vllm = "do_not_compile" in vars(self)
        return vllm_call(self, *args, **kwargs) if built_by_vllm else nn.Module.__call__(self, *args, **kwargs)

    cls.__init__, cls.__call__, cls.spares_others = init, call, True
