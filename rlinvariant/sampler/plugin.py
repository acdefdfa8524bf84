"""The vLLM plugin (entry point `vllm.general_plugins`): what vLLM must know by name, in every process it starts.

The plugin only registers two names, through vLLM's public registries; it replaces no function of vLLM. An engine that does not
ask for them (`quantization="rlinvariant"` and the architecture in names.py) is a stock engine, also in the same process.
"""

import os

from rlinvariant.errors import UserError
from rlinvariant.sampler.names import ARCHITECTURE, NOT_ACTIVE, QUANTIZATION

_registered_by: int | None = None  # id of the process that registered: a forked child has its parent's


def register() -> None:
    """Register both names. vLLM calls this at start-up, through the entry point, possibly more than once per process."""
    global _registered_by
    from vllm import ModelRegistry

    if not is_registered():
        from vllm.model_executor.layers.quantization import register_quantization_config

        from rlinvariant.sampler.vllm_linear import InvariantConfig

        register_quantization_config(QUANTIZATION)(InvariantConfig)
        ModelRegistry.register_model(ARCHITECTURE, "rlinvariant.sampler.vllm_model:InvariantForCausalLM")
        _registered_by = os.getpid()


def register_class() -> None:
    """Give vLLM the model's class itself: one that it knows by name alone it inspects in another process, which takes 10 s."""
    from vllm import ModelRegistry

    from rlinvariant.sampler.vllm_model import InvariantForCausalLM

    ModelRegistry.register_model(ARCHITECTURE, InvariantForCausalLM)


def is_registered() -> bool:
    """Return whether vLLM knows our names in this process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return QUANTIZATION in QUANTIZATION_METHODS


def load() -> None:
    """Let vLLM load its plugins in this process. Raises UserError if ours is not among them."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if not is_registered():
        raise UserError(NOT_ACTIVE)


def require_own_registration() -> None:
    """Make sure that this very process has registered both names. Raises UserError if none has, or a parent that forked it."""
    if not is_registered():
        raise UserError(NOT_ACTIVE)
    if _registered_by != os.getpid():
        raise UserError(
            "the engine's process was forked: it has the plugin from its parent, which says nothing about the entry point; "
            "unset VLLM_WORKER_MULTIPROC_METHOD"
        )
