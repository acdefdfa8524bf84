"""The names by which vLLM knows our model and our layers, and what is said when it does not."""

ARCHITECTURE = "RLInvariantForCausalLM"
QUANTIZATION = "rlinvariant"
NOT_ACTIVE = (
    "plugin not active in the engine: install rlinvariant in this environment (pip install -e .), so that vLLM finds its "
    "entry point, and unset VLLM_PLUGINS or let it name rlinvariant"
)
