"""The vLLM plugin (entry point `vllm.general_plugins`): what vLLM must know by name, in every process it starts.

It only registers two names, through vLLM's public registries; it replaces no function of vLLM. An engine that does not ask
for them (`quantization="rlinvariant"` and the architecture below) is a stock engine, also in the same process.
"""

from rlinvariant.sampler.names import ARCHITECTURE, QUANTIZATION


def register() -> None:
    """Called by vLLM at start-up, possibly more than once per process."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANTIZATION not in QUANTIZATION_METHODS:
        from rlinvariant.sampler.vllm_model import InvariantConfig

        register_quantization_config(QUANTIZATION)(InvariantConfig)
        ModelRegistry.register_model(ARCHITECTURE, "rlinvariant.sampler.vllm_model:InvariantForCausalLM")
