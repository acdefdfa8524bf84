"""vLLM's linear layers and lm_head with `ops.linear` in them, on CPU and on CUDA."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rlinvariant import ops
from rlinvariant.ops.linear import linear_columns, pack_weight
from rlinvariant.sampler.names import QUANTIZATION
from rlinvariant.sampler.vllm_columns import cuts
from rlinvariant.types import JsonObject, Untyped


class InvariantConfig(QuantizationConfig):
    """Stands for a "quantisation" that quantises nothing: it is vLLM's way to own every linear layer and the lm_head."""

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
    def from_config(cls, config: JsonObject) -> "InvariantConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str):
        if isinstance(layer, (ParallelLMHead, VocabParallelEmbedding)):
            return _Head()
        return _Linear() if isinstance(layer, LinearBase) else None


class _Linear(UnquantizedLinearMethod):
    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *args, **kwargs):
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)
        layer.parts, layer.packed, layer.adapters = output_partition_sizes, {}, None
        layer.cuts = cuts(layer, output_partition_sizes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight as it is: vLLM would repack and free it, and weight sync could not reach it."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply; on a CPU by the packed copy, or else once for each projection that vLLM merged: with the trainer's bits.

        On CUDA an output column does not depend on how many columns there are. An engine over several processes has some of
        the columns here: those have the bits that they have in a product by the whole weight.
        """
        if layer.adapters is not None:
            return layer.adapters(x, bias)
        packed = _packed(layer)
        if packed is not None or x.is_cuda:
            return ops.linear(x, layer.weight, bias, packed)
        weights = layer.weight.split(layer.parts)
        biases = [None] * len(weights) if bias is None else bias.split(layer.parts)
        parts = [_columns(x, w, b, cut.whole) for w, b, cut in zip(weights, biases, layer.cuts, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class _Head(UnquantizedEmbeddingMethod):
    def create_weights(self, layer: Any, *args, **kwargs) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.packed, layer.cuts = {}, cuts(layer, [])

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight as it is, for the reason given in `_Linear`."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits over the model's own vocabulary, or of this process's share of the padded one, which vLLM gathers.

        vLLM pads the weight to a multiple of 64 rows, with zeros.
        """
        return _columns(x, multiplied(layer), bias, layer.org_vocab_size, _packed(layer))


def products(model: nn.Module) -> dict[str, Untyped]:
    """Return the layers that multiply by a weight, the lm_head among them, by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (LinearBase, ParallelLMHead))}


def is_ours(layer: Untyped) -> bool:
    """Return whether one of `products` calls `ops.linear`."""
    return type(layer.quant_method) in (_Linear, _Head)


def multiplied(layer: Untyped) -> Tensor:
    """Return the rows [N, K] of a layer's weight that it multiplies by: not those that pad the vocabulary of one process."""
    return layer.weight if getattr(layer, "tp_size", 1) > 1 else layer.weight[: getattr(layer, "org_vocab_size", None)]


def pack_weights(model: nn.Module, loaded: Collection[str] | None = None) -> None:
    """Pack anew what layers multiply by, as vLLM's stock layers do on a CPU, for the number of threads set now.

    Args:
        model: vLLM's.
        loaded: the names of its parameters that may have changed, beside adapters; None: all may have.
    """
    named = model.named_parameters(remove_duplicate=False)  # a tied head is a name of the embedding's weight
    changed = {id(weight) for name, weight in named if loaded is None or name in loaded}
    for layer in filter(is_ours, products(model).values()):
        if getattr(layer, "adapters", None) is not None:
            layer.adapters.pack(layer.bias is not None)
            continue
        if id(layer.weight) not in changed:
            continue
        weight = multiplied(layer)
        wholes = [cut.whole for cut in layer.cuts]
        packed = pack_weight(weight, getattr(layer, "parts", [len(weight)]), layer.bias is not None, wholes)
        layer.packed = {} if packed is None else {torch.get_num_threads(): packed}


def _columns(x: Tensor, weight: Tensor, bias: Tensor | None, whole: int, packed: Tensor | None = None) -> Tensor:
    """Return the product by a weight, or by what this process has of one with `whole` rows."""
    if packed is not None or x.is_cuda or len(weight) == whole:
        return ops.linear(x, weight, bias, packed)
    return linear_columns(x, weight, bias, whole)


def _packed(layer: Any) -> Tensor | None:
    """Return the packed copy if it was checked for the number of threads that multiply now."""
    return layer.packed.get(torch.get_num_threads()) if layer.packed else None
