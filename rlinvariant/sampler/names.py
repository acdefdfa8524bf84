"""The names by which vLLM knows our model and our layers, and what is said when it does not."""

from rlinvariant.install import install_hint

ARCHITECTURE = "RLInvariantForCausalLM"
QUANTIZATION = "rlinvariant"
NOT_ACTIVE = (
    f"plugin not active in the engine: install rlinvariant in this environment ({install_hint()}), so that vLLM finds its "
    "entry point, and unset VLLM_PLUGINS or let it name rlinvariant"
)
