"""vLLM's attention layer with `ops.paged_attention` in it, over vLLM's own key-value cache, on CPU and on CUDA."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder

from rlinvariant import ops

_Stock: Any
if current_platform.is_cuda():
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    _Stock = FlashAttentionBackend
else:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    _Stock = CPUAttentionBackend


class InvariantAttentionBackend(_Stock):
    """Gives vLLM's own backend, for the layout of its cache [pages, H_kv, page, 2 D], our attention."""

    @staticmethod
    def get_impl_cls() -> type["_AttentionImpl"]:
        return _AttentionImpl

    @staticmethod
    def get_builder_cls() -> type["_AttentionBuilder"]:
        return _AttentionBuilder


@dataclass
class _AttentionMetadata:
    """Holds what a step's attention needs, the same in all layers."""

    tokens: int
    cu_seqlens_q: Tensor  # [sequences + 1] int32
    kv_lens: Tensor  # [sequences] int32
    block_table: Tensor  # [sequences, width] int32
    slot_mapping: Tensor  # [tokens] int64
    max_seqlen_q: int
    max_seqlen_k: int
    schedule: Tensor | None
    form: tuple[int | None, float | None] | None  # window and cap of the layers that the schedule is for
    causal: bool = True


class _AttentionBuilder(AttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.ALWAYS  # every length is read on the device

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._schedule: Tensor | None = None
        self._form: tuple[int | None, float | None] | None = None
        if current_platform.is_cuda():
            from rlinvariant.kernels.attention import schedule_size

            model, parallel = vllm_config.model_config, vllm_config.parallel_config
            self._heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel), model.get_head_size()
            graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
            sequences = max(vllm_config.scheduler_config.max_num_seqs, graphs)
            layers = vllm_config.compilation_config.static_forward_context
            forms = {(layers[name].impl.window, layers[name].impl.softcap) for name in layer_names}
            self._form = min(forms, key=str)  # layers of another form make their own plan
            # A CUDA graph reads the plan where it was when captured
            size = schedule_size(sequences, self._heads[2], *self._form)
            self._schedule = torch.zeros(size, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False) -> _AttentionMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("rlinvariant: only causal attention is supported")
        return _AttentionMetadata(
            m.num_actual_tokens,
            m.query_start_loc,
            m.seq_lens,
            m.block_table_tensor,
            m.slot_mapping,
            m.max_query_len,
            m.max_seq_len,
            self._plan(m),
            self._form,
        )

    def _plan(self, m: Any) -> Tensor | None:
        """Return the plan of this step, made once for all layers of one form; None on a CPU."""
        if self._schedule is None or self._form is None:
            return None
        from rlinvariant.kernels.attention import schedule

        lengths = m.query_start_loc, m.seq_lens, m.max_query_len, m.max_seq_len
        plan = schedule(*lengths, *self._heads, self.kv_cache_spec.block_size, *self._form)
        self._schedule[: len(plan)] = plan
        self._schedule[len(plan) :] = 0
        return self._schedule[: len(plan)]


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
        if alibi_slopes:
            raise NotImplementedError(f"rlinvariant: attention with alibi_slopes={alibi_slopes} is not supported")
        self.window, self.softcap = sliding_window, logits_soft_cap
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.kv_cache_dtype, self.attn_type, self.sliding_window = kv_cache_dtype, attn_type, -1
        self.kv_sharing_target_layer_name = None

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write keys and values [rows, H_kv, D] of this step into the slots of the cache that `slot_mapping` [tokens] names."""
        if kv_cache.is_cuda:
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, -1)
            scales = layer._k_scale, layer._v_scale  # an fp8 cache would use them
            torch.ops._C_cache_ops.reshape_and_cache_flash(key, value, keys, values, slot_mapping, "auto", *scales)
            return
        page, d, count = kv_cache.shape[2], self.head_size, len(slot_mapping)
        block, offset = slot_mapping // page, slot_mapping % page
        kv_cache[block, :, offset, :d] = key[:count]
        kv_cache[block, :, offset, d:] = value[:count]

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
        """Attend for query [rows, H, D], of which `attn_metadata.tokens` rows are real; `output` has the same shape."""
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        m = attn_metadata
        shape = (m.tokens, self.num_heads, self.head_size)
        q, out = query[: m.tokens].view(shape), output[: m.tokens].view(shape)
        lengths = {"max_seqlen_q": m.max_seqlen_q, "max_seqlen_k": m.max_seqlen_k}
        shape_of_scores = {"window": self.window, "softcap": self.softcap}
        cache = kv_cache, m.block_table, m.cu_seqlens_q, m.kv_lens
        schedule = m.schedule if m.form == (self.window, self.softcap) else None
        ops.paged_attention(q, *cache, self.scale, **lengths, **shape_of_scores, schedule=schedule, out=out)
        return output
