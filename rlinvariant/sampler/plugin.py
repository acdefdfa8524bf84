"""The vLLM plugin (entry point `vllm.general_plugins`): what vLLM must know by name, in every process it starts.

It only registers two names, through vLLM's public registries; it replaces no function of vLLM. An engine that does not ask
for them (`quantization="rlinvariant"` and the architecture below) is a stock engine, also in the same process.
"""

ARCHITECTURE = "RLInvariantForCausalLM"
QUANTIZATION = "rlinvariant"
NOT_ACTIVE = (
    "plugin not active in the engine: install rlinvariant in this environment (pip install -e .), so that vLLM finds its "
    "entry point, and unset VLLM_PLUGINS or let it name rlinvariant"
)


def register() -> None:
    """Called by vLLM at start-up, possibly more than once per process."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANTIZATION not in QUANTIZATION_METHODS:
        from rlinvariant.sampler.vllm_model import InvariantConfig

        register_quantization_config(QUANTIZATION)(InvariantConfig)
        ModelRegistry.register_model(ARCHITECTURE, "rlinvariant.sampler.vllm_model:InvariantForCausalLM")
