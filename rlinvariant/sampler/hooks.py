"""The hooks that the sampler uses of vLLM: each by the path of its module, and the parameters that it needs to have.

`tests/sampler/test_contract.py` looks at the vLLM that is installed, and `make contract` at the sources in the CUDA wheels of
the release that a GPU runs and of the newest one, which no machine has to run.
"""

HOOKS: dict[str, tuple[str, ...]] = {
    "vllm.entrypoints.llm:LLM.generate": ("self", "prompts", "sampling_params"),
    "vllm.entrypoints.llm:LLM.reset_prefix_cache": ("self",),
    "vllm.v1.sample.sampler:Sampler.forward": (
        "self",
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
        "logprobs_mode_override",
    ),
    "vllm.v1.sample.sampler:Sampler.compute_logprobs": ("logits",),
    "vllm.v1.sample.sampler:Sampler.gather_logprobs": ("logprobs", "num_logprobs", "token_ids"),
    "vllm.v1.sample.sampler:Sampler.apply_logits_processors": ("self", "logits", "sampling_metadata", "predict_bonus_token"),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.create_weights": (
        "self",
        "layer",
        "input_size_per_partition",
        "output_partition_sizes",
    ),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply": ("self", "layer", "x", "bias"),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading": ("self", "layer"),
    "vllm.model_executor.layers.linear:ColumnParallelLinear.__init__": (
        "self",
        "input_size",
        "output_size",
        "bias",
        "gather_output",
    ),
    "vllm.model_executor.layers.linear:ColumnParallelLinear.forward": ("self", "input_"),
    "vllm.distributed.communication_op:tensor_model_parallel_all_gather": ("input_", "dim"),
    "vllm.distributed.parallel_state:get_tp_group": (),
    "vllm.distributed.parallel_state:get_world_group": (),
    "vllm.distributed.parallel_state:model_parallel_is_initialized": (),
    "vllm.distributed.parallel_state:init_model_parallel_group": ("group_ranks", "local_rank", "backend"),
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward": ("self", "input_"),
    "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply": ("self", "layer", "x", "bias"),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.get_quant_method": ("self", "layer", "prefix"),
    "vllm.model_executor.layers.quantization:register_quantization_config": ("quantization",),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": (
        "self",
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.v1.attention.backend:AttentionImpl.__init__": (
        "self",
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "alibi_slopes",
        "sliding_window",
        "kv_cache_dtype",
        "logits_soft_cap",
        "attn_type",
    ),
    "vllm.v1.attention.backend:AttentionImpl.forward": (
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
    ),
    "vllm.model_executor.models.transformers.base:Base.recursive_replace": ("self",),
    "vllm.model_executor.models.transformers.base:Base._decorate_for_torch_compile": ("self",),
    "vllm.model_executor.models.transformers.base:Base._patch_config": ("self",),
    "vllm.model_executor.models.transformers.base:Base.load_weights": ("self", "weights"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": ("self", "weights_iterator"),
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.validate_params": ("sampling_params",),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("self", "prompt", "sampling_params", "request_id"),
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": ("self", "method", "timeout", "args"),
    "vllm.v1.engine.async_llm:AsyncLLM.reset_prefix_cache": ("self",),
}
"""Path of a hook, "module:name" -> its leading parameters, in every release in use."""
GPU_HOOKS: dict[str, tuple[str, ...]] = {
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.get_impl_cls": (),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.get_builder_cls": (),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update": (
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
    "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func": ("q", "k", "v", "max_seqlen_q", "cu_seqlens_q"),
    "vllm.vllm_flash_attn.flash_attn_interface:get_scheduler_metadata": ("batch_size", "max_seqlen_q", "max_seqlen_k"),
    "vllm.vllm_flash_attn.flash_attn_interface:is_fa_version_supported": ("fa_version",),
}
"""The same of what only a GPU uses."""
EITHER: tuple[tuple[str, ...], ...] = (
    (
        "vllm.model_executor.models.transformers.base:Base._get_attn_cls",
        "vllm.model_executor.models.transformers.base:Base.create_attention_instances",
    ),
)
"""Hooks of which a release has one: vllm_model.py has a method for each."""
FIELDS: dict[str, tuple[str, ...]] = {
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "seq_lens",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
        "org_vocab_start_index",
        "org_vocab_end_index",
    ),
    "vllm.config.compilation:CompilationConfig": ("static_forward_context", "max_cudagraph_capture_size", "mode"),
}
"""Fields that are read off what vLLM hands over, by their class."""
NAMES: tuple[str, ...] = (
    "vllm.v1.attention.backend:AttentionCGSupport",
    "vllm.v1.outputs:LogprobsTensors",
    "vllm.v1.outputs:SamplerOutput",
    "vllm.v1.sample.logits_processor:MinPLogitsProcessor",
    "vllm.model_executor.models.transformers:TransformersForCausalLM",
    "vllm.model_executor.layers.linear:MergedColumnParallelLinear",
    "vllm.model_executor.layers.linear:LinearBase",
    "vllm.model_executor.layers.linear:QKVParallelLinear",
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "vllm.model_executor.layers.quantization:QUANTIZATION_METHODS",
    "vllm.model_executor.layers.attention:Attention",
    "vllm.v1.worker.gpu_worker:Worker",
    "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "vllm.plugins:load_general_plugins",
    "vllm.entrypoints.cli.serve:ServeSubcommand",
    "vllm.config:CompilationMode",
    "vllm.config:get_current_vllm_config_or_none",
    "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper",
    "vllm.compilation.decorators:support_torch_compile",
    "vllm.platforms:current_platform",
    "vllm.sampling_params:RequestOutputKind",
)
"""Names that are imported, or expected in what is handed over."""
