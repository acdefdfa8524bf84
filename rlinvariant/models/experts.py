"""The forms of a mixture of experts: its router, and its experts as two parameters of three dimensions.

Both are found by what they have, as every other form is (models/patch.py), and compared with what they replace. The block
around them only changes shapes, and stays transformers' own. Checkpoints have a matrix for each expert: `place` says where
each one goes.

R: rows (tokens), S: slots of a row, E: experts, D: width of a row, I: width inside an expert.
"""

import copy
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rlinvariant import ops
from rlinvariant.models.compared import difference, random_copy
from rlinvariant.models.modules import become
from rlinvariant.types import Untyped

OF_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
PLACES = {"gate_proj": (0, 0), "w1": (0, 0), "up_proj": (0, 1), "w3": (0, 1), "down_proj": (1, 0), "w2": (1, 0)}
"""A matrix's name in a checkpoint (Mixtral's is w1, ...) -> which parameter has it, and which part along its rows."""
PARAMETERS = "gate_up_proj", "down_proj"
MATRICES = [
    {(PARAMETERS[p], part): name for name, (p, part) in PLACES.items() if (name[0] == "w") == old} for old in (False, True)
]
"""The names of matrices, by parameter and part: those of most checkpoints, and Mixtral's."""


class Router(nn.Module):
    """Gives each row's logits [R, E], and the weights and ids [R, S] of its experts."""

    weight: Tensor
    top_k: int
    renormalise: bool
    rounded: bool  # whether weights have the dtype of activations, as in Qwen3 and OLMoE, or stay fp32, as in Mixtral

    def forward(self, hidden_states):
        logits = ops.linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight)
        weights, ids = ops.moe_route(logits, self.top_k, self.renormalise)
        return logits, weights.to(logits.dtype) if self.rounded else weights, ids


class Experts(nn.Module):
    """Sends rows [R, D] through their experts."""

    gate_up_proj: Tensor
    down_proj: Tensor
    activation_name: str

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return ops.moe_experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, self.activation_name
        )


ROUTERS = tuple({"renormalise": renormalise, "rounded": rounded} for renormalise in (True, False) for rounded in (True, False))
"""The variants of a router, of which the comparison finds the one that a module is."""


def form_of(module: nn.Module) -> type | None:
    """Return the form of a router or of experts, None if the module is neither: by its own parameters, which must be these."""
    own = {name: p.dim() for name, p in module.named_parameters(recurse=False)}
    if own == {"weight": 2} and hasattr(module, "top_k") and hasattr(module, "num_experts") and not module._modules:
        return Router
    return Experts if own == dict.fromkeys(PARAMETERS, 3) else None


def compare_router(module: Untyped, form: type, attributes: dict[str, Untyped], known: dict[Untyped, Untyped]) -> float:
    """Compare the weights of all experts, 0 where one is not chosen, and the dtype that they have in a model in bf16.

    Values do not tell the dtype: two logits that bf16 makes equal choose another expert.
    """
    original = random_copy(module)
    x_RD = torch.randn(40, original.weight.shape[1], dtype=torch.float32)
    expected, dtype = _weights(original, x_RD), _dtype(original, x_RD)
    become(original, form, **attributes)
    error = difference(_weights(original, x_RD), expected)
    return error if _dtype(original, x_RD) == dtype else max(error, 1.0)


def _weights(router: nn.Module, x_RD: Tensor) -> Tensor:
    logits_RE, weights_RS, ids_RS = router(x_RD)
    return torch.zeros_like(logits_RE, dtype=torch.float32).scatter_(-1, ids_RS, weights_RS.float())


def _dtype(router: nn.Module, x_RD: Tensor) -> torch.dtype:
    return copy.deepcopy(router).bfloat16()(x_RD.bfloat16())[1].dtype


def compare_experts(module: Untyped, form: type, attributes: dict[str, Untyped], known: dict[Untyped, Untyped]) -> float:
    """Compare the class's own forward, a loop over experts, on rows that go to two experts each, or to one if there is one."""
    original = random_copy(module)
    original.config = copy.deepcopy(module.config)
    original.config._experts_implementation = "eager"
    experts, width = original.gate_up_proj.shape[0], original.gate_up_proj.shape[2]
    x_RD = torch.randn(7, width, dtype=torch.float32)
    ids_RS = torch.stack([torch.randperm(experts)[:2] for _ in x_RD])
    weights_RS = torch.rand(ids_RS.shape, dtype=torch.float32)
    expected = original(x_RD, ids_RS, weights_RS)
    become(original, form, **attributes)
    return difference(original(x_RD, ids_RS, weights_RS), expected)


def mixtures(model: nn.Module) -> Iterator[tuple[str, Untyped]]:
    """Yield names and modules of all routers of a patched model, in order of layers."""
    return ((name, module) for name, module in model.named_modules() if getattr(type(module), "form", None) is Router)


def place(name: str) -> tuple[str, str, int, int] | None:
    """Say where a checkpoint's matrix of one expert is, by its name; None for any other weight.

    Returns:
        (path of the experts in transformers' model, name of their parameter, number of the expert, part along its rows)
    """
    found = OF_ONE_EXPERT.fullmatch(name)
    if found is None or found[3] not in PLACES:
        return None
    parameter, part = PLACES[found[3]]
    return found[1].replace(".block_sparse_moe.", ".mlp."), PARAMETERS[parameter], int(found[2]), part


def places(parameter: Tensor, name: str) -> set[tuple[int, int]]:
    """Return every (expert, part) of a parameter that is all experts' in one, [E, ...]; its name ends as in `PARAMETERS`."""
    return {(expert, part) for expert in range(len(parameter)) for part in range(2 if name.endswith(PARAMETERS[0]) else 1)}


def stored(name: str, weight: Tensor, model_type: str) -> dict[tuple[int, int] | None, str]:
    """Return the names that a checkpoint has for a parameter: one, by None; of all experts in one, for each (expert, part)."""
    mixtral, (path, _, parameter) = model_type == "mixtral", name.rpartition(".")
    if mixtral:
        path = path.replace(".mlp", ".block_sparse_moe")
    if parameter not in PARAMETERS or weight.dim() != 3:
        return {None: f"{path}.{parameter}"}
    matrices = MATRICES[mixtral]
    return {at: f"{path}.{at[0]}.{matrices[parameter, at[1]]}.weight" for at in sorted(places(weight, name))}


def are_apart_in_files(model: Untyped) -> bool:
    """Return whether a checkpoint of the model has a matrix for each expert, where the model has one parameter for all."""
    return any(None not in stored(name, p, model.config.model_type) for name, p in model.named_parameters())


def in_checkpoint(weights: Iterable[tuple[str, Tensor]], model_type: str) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as a checkpoint has them: each expert's matrices, in place of those of all experts in one."""
    for name, weight in weights:
        for at, own in stored(name, weight, model_type).items():
            yield own, weight if at is None else rows_of(weight, *at, name)


def rows_of(parameter: Tensor, expert: int, part: int, name: str) -> Tensor:
    """Return the rows of one expert's matrix, which share the memory of `gate_up_proj` [E, 2 I, D] or `down_proj` [E, D, I]."""
    whole = parameter.data[expert]
    return whole.chunk(2)[part] if name.endswith(PARAMETERS[0]) else whole
