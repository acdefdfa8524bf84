"""What runs inside vLLM in place of its own layers: all that depends on vLLM's internals, for the day they move.

vLLM's transformers backend builds the Hugging Face model; `make_invariant` patches it exactly as it patches the trainer's;
vLLM then puts its linear layers, cache and attention into it, and these classes make them call `rlinvariant.ops`.
"""

import secrets
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from rlinvariant import ops
from rlinvariant.models.patch import make_invariant
from rlinvariant.sampler.plugin import QUANTIZATION


class InvariantForCausalLM(TransformersForCausalLM):
    """The transformers backend with the model patched before vLLM replaces its layers."""

    def recursive_replace(self) -> None:
        make_invariant(self.model, self.model_config.dtype)
        self._patch_config()  # the attention is vLLM's here: it owns the cache
        super().recursive_replace()

    def _decorate_for_torch_compile(self) -> None:
        """Only when compiling: vLLM decorates the Hugging Face class itself, and no other model of it could then be built."""
        if self.compilation_config.mode != CompilationMode.NONE:
            super()._decorate_for_torch_compile()

    def _get_attn_cls(self):
        if (cls := super()._get_attn_cls()) is not Attention:
            raise NotImplementedError(f"rlinvariant: {cls.__name__} is not supported, only decoder attention")
        return partial(Attention, attn_backend=InvariantAttentionBackend)


class InvariantConfig(QuantizationConfig):
    """A "quantisation" that quantises nothing: vLLM's way to own every linear layer and the lm_head."""

    def get_name(self) -> str:
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "InvariantConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str):
        if isinstance(layer, (ParallelLMHead, VocabParallelEmbedding)):
            return _Head()
        return _Linear() if isinstance(layer, LinearBase) else None


class _Linear(UnquantizedLinearMethod):
    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *args, **kwargs):
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)
        layer.parts = output_partition_sizes

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight as it is: vLLM would repack and free it, and weight sync could not reach it."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One product for each projection that vLLM merged (q, k, v; gate, up): the trainer's shapes, hence its bits."""
        if len(layer.parts) == 1:
            return ops.linear(x, layer.weight, bias)
        weights = layer.weight.split(layer.parts)
        biases = [None] * len(weights) if bias is None else bias.split(layer.parts)
        return torch.cat([ops.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


class _Head(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight as it is, as above."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits over the model's own vocabulary: vLLM pads the weight to a multiple of 64 rows."""
        return ops.linear(x, layer.weight[: layer.org_vocab_size], bias)


class InvariantAttentionBackend(CPUAttentionBackend):
    """`ops.paged_attention` over vLLM's own CPU key-value cache."""

    @staticmethod
    def get_impl_cls() -> type["_AttentionImpl"]:
        return _AttentionImpl

    @staticmethod
    def get_builder_cls() -> type["_AttentionBuilder"]:
        return _AttentionBuilder


@dataclass
class _AttentionMetadata:
    tokens: int
    cu_seqlens_q: Tensor  # [sequences + 1] int32
    kv_lens: Tensor  # [sequences] int32
    block_table: Tensor  # [sequences, width] int32
    slot_mapping: Tensor  # [tokens] int64
    causal: bool = True


class _AttentionBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:  # abstract in vLLM, though it has a body
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False) -> _AttentionMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("rlinvariant: only causal attention is supported")
        return _AttentionMetadata(m.num_actual_tokens, m.query_start_loc, m.seq_lens, m.block_table_tensor, m.slot_mapping)


class _AttentionImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        *args,
        **kwargs,
    ) -> None:
        unsupported = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
        if refused := [f"{k}={v}" for k, v in unsupported.items() if v]:
            raise NotImplementedError(f"rlinvariant: attention with {', '.join(refused)} is not supported")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.kv_cache_dtype, self.attn_type, self.sliding_window = kv_cache_dtype, attn_type, -1
        self.kv_sharing_target_layer_name = None

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        slots = slot_mapping
        page, d = kv_cache.shape[2], self.head_size
        block, offset = slots // page, slots % page
        kv_cache[block, :, offset, :d] = key[: len(slots)]
        kv_cache[block, :, offset, d:] = value[: len(slots)]

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: _AttentionMetadata | None,
        output: Tensor,
        output_scale=None,
        output_block_scale=None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM's profiling run
            return output
        m = attn_metadata
        q = query[: m.tokens].view(m.tokens, self.num_heads, self.head_size)
        out = ops.paged_attention(q, kv_cache, m.block_table, m.cu_seqlens_q, m.kv_lens, self.scale)
        output[: m.tokens] = out.view(output[: m.tokens].shape)
        return output


class _SeedKeeper(Sampler):
    """Seeds that survive a chunked prefill on a CPU.

    vLLM samples for a request whose prefill was cut, throws the token away and rewinds its generator; a CPU generator cannot
    be rewound and raises. So the generators of such requests are taken away before vLLM looks, and given back afterwards.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        self.runner, self._kept = runner, {}

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
    """`ops.sample`: temperature, log-prob and noise in one op that reads its own row alone.

    The noise is a hash of the request's seed and of how many tokens it has drawn: unlike a generator it has no state that a
    preempted request would have to replay.
    """

    def forward(
        self, logits: Tensor, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None
    ) -> SamplerOutput:
        md, rows, batch = sampling_metadata, len(logits), self.runner.input_batch
        self.give_back()
        seeds = [batch.generators[i].initial_seed() if i in batch.generators else secrets.randbits(63) for i in range(rows)]
        self.take_away(rows)
        drawn = [len(batch.req_output_token_ids[i] or ()) for i in range(rows)]
        logits = self.apply_logits_processors(logits, md, predict_bonus_token)
        if md.temperature is None:
            temperature = torch.zeros(rows)
        else:
            temperature = torch.where(md.temperature < 1e-5, 0.0, md.temperature).float()
        tokens, logprobs, ranks = ops.sample(logits, temperature, torch.tensor(seeds), torch.tensor(drawn))
        extra = md.max_num_logprobs
        if extra == 0:
            out = LogprobsTensors(tokens.int()[:, None], logprobs[:, None], ranks)
        elif extra is not None:
            table = ops.log_softmax(logits, temperature)
            top, ids = table.topk(extra) if extra > 0 else (table, torch.arange(table.shape[1]).expand(table.shape))
            out = LogprobsTensors(torch.cat([tokens[:, None], ids], 1).int(), torch.cat([logprobs[:, None], top], 1), ranks)
        else:
            out = None
        return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=out)


class StockSampler(_SeedKeeper):
    """vLLM's own, less the rank of a token, which vLLM compiles a kernel for at the first request (11 s on a CPU)."""

    def forward(self, logits: Tensor, *args, **kwargs) -> SamplerOutput:
        self.give_back()
        self.take_away(len(logits))
        return super().forward(logits, *args, **kwargs)

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        top, ids = logprobs.topk(num_logprobs, -1)
        own = token_ids[:, None]
        ranks = torch.zeros_like(token_ids)
        return LogprobsTensors(torch.cat([own, ids], 1).int(), torch.cat([logprobs.gather(-1, own), top], 1), ranks)
