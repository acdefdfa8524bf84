"""The experts that each token of a forward goes to, watched in sampler and trainer, to count where the two disagree.

Works on any mixture: patched, transformers' own, and vLLM's own, of which the logits of the router are seen.

N: tokens of the forwards watched, L: layers with experts, S: experts of a token, E: experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlinvariant import ops
from rlinvariant.types import Untyped

CHOICE = (
    *("n_group", "topk_group", "scoring_func", "router_jitter_noise", "input_jitter_noise"),
    *("expert_capacity", "capacity_factor"),
)
"""Settings of a router that chooses by more than its logits, as `limits.ROUTERS` describes them."""


class Routing:
    """Watches the routers of a model. What a layer chooses for a token is kept as one number, the same for the same set.

    Args:
        model: has blocks with a `gate` and `experts`. Its forwards must not be compiled or captured.
        slots: S, for a router that gives logits alone.
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        blocks = [m for m in model.modules() if "gate" in m._modules and hasattr(m, "experts")]
        self.layers, self.slots = len(blocks), slots
        self._watching, self._seen = False, [list[Tensor]() for _ in blocks]
        self._table: Tensor | None = None
        for i, block in enumerate(blocks):
            gate: Any = block._modules["gate"]
            gate.register_forward_hook(lambda _, __, out, i=i: self._note(i, out))

    @torch.no_grad()
    def _note(self, layer: int, out: Untyped) -> None:
        if not self._watching:
            return
        logits, *more = out if isinstance(out, tuple) else (out,)
        chosen = more[1] if len(more) == 2 else ops.moe_route(logits.detach().flatten(0, -2), self.slots, True)[1]
        if self._table is None or len(self._table) < logits.shape[-1]:
            numbers = torch.randint(2**62, (logits.shape[-1],), generator=torch.Generator().manual_seed(0))
            self._table = numbers.to(chosen.device)
        self._seen[layer].append(self._table[chosen].sum(-1))

    def begin(self) -> None:
        """Watch the forwards from here on, until `take`."""
        self._watching, self._seen = True, [[] for _ in self._seen]

    def end(self) -> None:
        """Watch no more, and forget what was seen."""
        self._watching, self._seen = False, [[] for _ in self._seen]

    def take(self) -> Tensor | None:
        """Return the numbers [N, L] int64 of all forwards since `begin`, one after the other, and watch no more.

        None: the model ran no forward, or has no such layer.
        """
        found, self._watching = self._seen, False
        self._seen = [[] for _ in found]
        return torch.stack([torch.cat(seen) for seen in found], -1) if found and all(found) else None


def slots_of(config: Untyped) -> int | None:
    """Return how many experts a token of a mixture goes to, by transformers' configuration.

    None for any other model, and where more than a router's logits says which experts these are: groups, biases, noise.
    """
    from rlinvariant.models.limits import PLAIN_ROUTER, mixture_of

    config = config.get_text_config()
    given = ((name, getattr(config, name, None)) for name in CHOICE)
    if not mixture_of(config) or any(value and value != PLAIN_ROUTER.get(name) for name, value in given):
        return None
    return getattr(config, "num_experts_per_tok", None)
