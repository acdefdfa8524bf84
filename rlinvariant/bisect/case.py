"""A first difference, and how to compute its value anew from what either side recorded. Sides go by name: sampler, trainer."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bisect import variants
from rlinvariant.bisect.record import GATE_UP_ROLES, LOGPROB_PLACE, QKV_ROLES, ROTATED_ROLES, THRESHOLD_PLACE, Call, Place
from rlinvariant.bisect.search import First, Side, side_at
from rlinvariant.bisect.trials import Trial
from rlinvariant.models.lora import plain
from rlinvariant.ops.threshold import rows_threshold
from rlinvariant.types import JsonObject
from rlinvariant.verification.ladder import ROW_COUNTS

if TYPE_CHECKING:
    from rlinvariant.sampler.engine import Sampler

WEIGHT_MODULES = {  # role -> the trainer's module that holds its weight
    "embedding": "embed_tokens",
    "input norm": "input_layernorm",
    "q projection": "self_attn.q_proj",
    "k projection": "self_attn.k_proj",
    "v projection": "self_attn.v_proj",
    ROTATED_ROLES[0]: "self_attn.q_norm",
    ROTATED_ROLES[1]: "self_attn.k_norm",
    "o projection": "self_attn.o_proj",
    "residual and norm": "post_attention_layernorm",
    "gate projection": "mlp.gate_proj",
    "up projection": "mlp.up_proj",
    "down projection": "mlp.down_proj",
    "final norm": "norm",
    "lm_head": "lm_head",
}
ADAPTED = ("weight", "bias", "a", "b")  # what is given to a product with an adapter inside it
LINEAR_ROLES = (*QKV_ROLES, "o projection", *GATE_UP_ROLES, "down projection", "lm_head")
ROLE_OPS = {  # role -> the op that must give it
    **dict.fromkeys(LINEAR_ROLES, "linear"),
    **dict.fromkeys(ROTATED_ROLES, "qk_norm_rope"),
    "input norm": "rms_norm",
    "final norm": "rms_norm",
    "residual and norm": "add_rms_norm",
    "attention": "attention",
    "swiglu": "swiglu",
    "threshold": "threshold",
}


class Case:
    """Holds a first difference: what each side recorded before it, the op that gives the value, and that op's variants.

    Args:
        first: the difference; something recorded must differ.
        tokens: those of the whole sequence.
        trial: how it was drawn.
        engine: the sampler.
    """

    def __init__(self, first: First, tokens: list[int], trial: Trial, engine: "Sampler") -> None:
        assert first.place is not None and first.sampler is not None and first.trainer is not None
        self.first, self.tokens, self.trial, self.engine = first, tokens, trial, engine
        self.sides: dict[str, Side] = {"sampler": first.sampler, "trainer": first.trainer}
        self.model = first.trainer.recorder.model
        self.device = next(self.model.parameters()).device
        self.layer, self.role = first.place
        calls = [side.block.call for side in self.sides.values() if side.block.call is not None]
        # A module without a role of its own, as a norm that Llama's layer lacks, has the op that it called
        self.op = ROLE_OPS.get(self.role) or next(
            (call.op for call in calls if call.op in ("linear", "rms_norm", "scale_logits")), None
        )
        if any(call.op == "lora_linear" for call in calls):
            self.op = "lora_linear"
        if self.op == "add_rms_norm" and not any(call.op == self.op for call in calls):
            self.op = None  # such a layer adds and normalises in steps of its own
        config: Any = self.model.config
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    # ---- what a side recorded

    def row(self, side: str, role: str, position: int | None = None, layer: int | None = -1) -> Tensor | None:
        """Return a side's recorded value [D] on the device, by default at the difference's position and layer; None if none."""
        place: Place = (self.layer if layer == -1 else layer, role)
        found = side_at(self.sides[side].recorder, place).get(self.first.position if position is None else position)
        return None if found is None else found.value.to(self.device)

    def call(self, side: str) -> Call | None:
        """Return the side's call of the op, None if it called another or none."""
        call = self.sides[side].block.call
        return call if call is not None and call.op == self.op else None

    def weights(self, side: str) -> tuple[Tensor | None, ...]:
        """Return weight and bias as the op was given them, or else the module's; () where there are none, or none readable."""
        if (call := self.call(side)) is not None and call.weights:
            found = tuple(call.weights.values())
            return found if self.role not in ROTATED_ROLES else (found[ROTATED_ROLES.index(self.role)],)
        module = self.sides[side].block.module
        if module is None or not hasattr(module, "weight"):
            suffix = self.parameter().removeprefix("model.")
            if not suffix:
                return ()
            named = self.sides[side].recorder.model.named_modules()
            module = next((m for name, m in named if name == suffix or name.endswith(f".{suffix}")), None)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None or weight.numel() == 0:
            return ()
        part = self.part(len(weight), side)
        if self.role not in LINEAR_ROLES:
            return (weight,)
        return weight[part], bias[part] if isinstance(bias, Tensor) else None

    def parameter(self) -> str:
        """Return the trainer's name of the module whose weight gives this value; "" where there is none."""
        own, known = self.sides["trainer"].block.module, WEIGHT_MODULES.get(self.role, "")
        suffix = f"layers.{self.layer}.{known}" if known and self.layer is not None else known
        named = [(name, m) for name, m in self.model.named_modules() if hasattr(m, "weight")]
        found = [n for n, m in named if m is own] + [n for n, _ in named if known and (n == suffix or n.endswith(f".{suffix}"))]
        return plain(next(iter(found), ""))

    def before(self) -> str:
        """Return the role that the trainer executed before this one."""
        places = list(self.sides["trainer"].recorder.trace)
        return places[max(0, places.index(self.first.place) - 1)][1]  # type: ignore[arg-type]

    def part(self, width: int, side: str) -> slice:
        """Return which columns of an output of that width are this role's: all, or a part of a merged product's."""
        names = next((names for names in (QKV_ROLES, GATE_UP_ROLES) if self.role in names), ())
        own = len(self.sides[side].value)
        if width == own or not names:
            return slice(None)
        start = sum(self.sides[side].recorder.sizes(names, width)[: names.index(self.role)])
        return slice(start, start + own)

    def inputs(self, side: str) -> dict[str, Tensor]:
        """Return the rows that the value was computed from, by name: what the op or module took, else the values before it."""
        call = self.call(side)
        if self.role == "attention":  # it reads all earlier positions too, and those were equal
            return self._before(side, q=ROTATED_ROLES[0], k=ROTATED_ROLES[1], v="v projection")
        if self.first.place in (LOGPROB_PLACE, THRESHOLD_PLACE):
            scaled = self._before(side, logits="scaled logits", layer=None)
            return scaled or self._before(side, logits="lm_head", layer=None)
        if self.role in ROTATED_ROLES:
            name = "qk"[ROTATED_ROLES.index(self.role)]
            found = self._before(side, x=f"{name} projection")
            if (angles := self.row(side, "rope table", layer=None)) is not None:
                found["cos"], found["sin"] = angles.chunk(2)
            if call is not None and {name, "cos", "sin"} <= call.inputs.keys():
                found = {"x": call.inputs[name], "cos": call.inputs["cos"], "sin": call.inputs["sin"]}
        elif call is not None and call.inputs and self.role != "lm_head":
            found = dict(call.inputs)
            if "gate_up" in found:
                found["gate"], found["up"] = found.pop("gate_up").chunk(2, -1)
        elif self.role == "residual and norm":
            found = self._before(side, x="o projection")
            place = ("layer output", self.layer - 1) if self.layer else ("embedding", None)
            before = self.row(side, place[0], layer=place[1])
            found |= {} if before is None else {"residual": before}
        elif self.role == "swiglu":
            found = self._before(side, gate="gate projection", up="up projection")
        else:
            taken = self.sides[side].block.inputs
            found = {} if taken is None else {"x": taken}
        index = self.sides[side].index
        return {name: (x[index] if x.dim() > 1 else x).to(self.device) for name, x in found.items()}

    def _before(self, side: str, layer: int | None = -1, **roles: str) -> dict[str, Tensor]:
        """Return the side's rows at the given roles, by name, without those that were not recorded."""
        rows = {name: self.row(side, role, layer=layer) for name, role in roles.items()}
        return {name: x for name, x in rows.items() if x is not None}

    def settings(self, side: str) -> JsonObject:
        """Return the settings of the side's call of the op, or of the other side's where it called none."""
        calls = [self.call(side), self.call(other_side(side))]
        return next((dict(call.settings) for call in calls if call is not None), {})

    # ---- computed anew

    def ours(self, side: str) -> Tensor | None:
        """Compute the value by `rlinvariant.ops` from the side's own inputs and weights; None where that cannot be done."""
        try:
            return None if (function := self.function(side)) is None else function(1)[0].flatten()
        except (ValueError, TypeError, RuntimeError):  # what the side recorded does not fit the op
            return None

    def function(self, side: str) -> Callable[[int], Tensor] | None:
        """Return the op as a function of n, on n copies of the recorded row: n -> [n, D]; None where the op is not known."""
        x, w, settings = self.inputs(side), self.weights(side), self.settings(side)
        op, weight = self.op, w[0] if w else None

        def rows(n: int) -> dict[str, Tensor]:
            return {name: row.expand(n, *row.shape).contiguous() for name, row in x.items()}

        if op == "linear" and x and weight is not None:
            return lambda n: ops.linear(**rows(n), weight=weight, bias=w[1])
        if op == "lora_linear" and x and len(w) == len(ADAPTED):
            given: dict[str, Any] = dict(zip(ADAPTED, w, strict=True))
            return lambda n: ops.lora_linear(**rows(n), **given)
        if op == "scale_logits" and x:
            return lambda n: ops.scale_logits(rows(n).get("logits", next(iter(rows(n).values()))), **settings)
        if op == "threshold" and x and settings:
            return lambda n: variants.theta(rows(n)["logits"], **settings)
        if op == "rms_norm" and x and weight is not None:
            return lambda n: ops.rms_norm(**rows(n), weight=weight, **settings)
        if op == "add_rms_norm" and len(x) == 2 and weight is not None:
            return lambda n: ops.add_rms_norm(**rows(n), weight=weight, **settings)[0]
        if op == "swiglu" and len(x) == 2:
            return lambda n: ops.swiglu(**rows(n), **settings)
        if op == "qk_norm_rope" and len(x) == 3:

            def turned(n: int) -> Tensor:
                at = rows(n)
                heads = at["x"].view(n, -1, self.dim)
                normed = heads if weight is None else ops.rms_norm(heads, weight, **settings)
                return ops.rope(normed, at["cos"], at["sin"]).flatten(1)

            return turned
        if op == "attention" and (qkv := self.heads(side)) is not None:
            scale = settings.pop("scale", self.dim**-0.5)
            return lambda n: variants.own_attention(*qkv, self.first.position, scale, **settings).flatten()[None]
        if self.role == "rope table" and (table := self.angles()):
            return lambda n: table[self.first.position].expand(n, -1)
        if self.first.place == LOGPROB_PLACE and x:
            token, settings = self.tokens[self.first.position + 1], asdict(self.trial.truncation)

            def log_prob(n: int) -> Tensor:
                logits, t = rows(n)["logits"], torch.full((n,), self.trial.temperature, device=self.device)
                return ops.log_softmax(logits, t, rows_threshold(logits, t, **settings))[:, token : token + 1]

            return log_prob
        return None

    def heads(self, side: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return q, k and v [P, heads, D] of the sequence as far as the side recorded all three; None if that is too short."""
        recorder = self.sides[side].recorder
        parts = [side_at(recorder, (self.layer, role)) for role in (*ROTATED_ROLES, "v projection")]
        count = next((p for p in range(10**9) if not all(p in part for part in parts)), 0)
        if count <= self.first.position:
            return None
        stacked = [torch.stack([part[p].value for p in range(count)]).to(self.device) for part in parts]
        q, k, v = (x.view(count, -1, self.dim) for x in stacked)
        return q, k, v

    def angles(self) -> dict[int, Tensor]:
        """Return cos and sin, [R] together, of this position and its neighbours, from a table that is made anew."""
        if (rotary := self.rotary()) is None:
            return {}
        rotary = copy.deepcopy(rotary).cpu()
        rotary.build_tables()
        near = range(max(0, self.first.position - 2), min(len(rotary.cos_table), self.first.position + 3))
        return {p: torch.cat([rotary.cos_table[p], rotary.sin_table[p]]).to(self.device) for p in near}

    def rotary(self) -> Any:
        """Return the trainer's module that makes the rope table, None if there is none."""
        return next((m for m in self.model.modules() if hasattr(m, "cos_table")), None)

    def variants(self, side: str) -> Iterable[tuple[str, Tensor]]:
        """Yield the known other ways to compute the value from the side's inputs, as (what is done otherwise, value)."""
        x, w, position, settings = self.inputs(side), self.weights(side), self.first.position, self.settings(side)
        op, weight, eps = self.op, w[0] if w else None, settings.get("eps") or 1e-6
        if op == "linear" and x and weight is not None:
            yield from variants.linear(x["x"], weight, w[1], self.sides[side].block.together)
        elif op == "lora_linear" and x:
            given: Any = w if len(w) == len(ADAPTED) else self.weights(other_side(side))  # it may ignore the other's
            yield from variants.lora_linear(x["x"], self.sides[side].block.together, *given)
        elif op == "rms_norm" and x and weight is not None:
            yield from variants.rms_norm(x["x"], weight, eps)
        elif op == "add_rms_norm" and len(x) == 2 and weight is not None:
            yield from variants.add_rms_norm(x["x"], x["residual"], weight, eps)
        elif op == "qk_norm_rope" and x and (table := self.angles()):
            pairs = {p: (row.chunk(2)[0], row.chunk(2)[1]) for p, row in table.items()}
            # Where this side has no weight, the other side's shows that a norm was left out
            weight = weight if weight is not None else next(iter(self.weights(other_side(side))), None)
            yield from variants.rotate(x["x"].view(-1, self.dim), weight, pairs, position, eps)
        elif self.role == "rope table" and (table := self.angles()):
            yield from variants.rope_table(table, position, self.rotary().inv_freq, torch.bfloat16)
        elif op == "attention" and (qkv := self.heads(side)) is not None:
            yield from variants.attention(*qkv, position, settings.get("scale", self.dim**-0.5))
        elif op == "threshold" and x and settings:
            yield from variants.threshold(x["logits"], **settings)
        elif op == "swiglu" and len(x) == 2:
            yield from variants.swiglu(x["gate"], x["up"])
        elif self.first.place == LOGPROB_PLACE and x:
            near = {d: self.row(side, "lm_head", position + d, layer=None) for d in (-1, 1)}
            others = {d: row for d, row in near.items() if row is not None}
            yield from variants.log_prob(x["logits"], self.tokens[position + 1], self.trial, others)

    def by_rows(self, side: str) -> dict[int, Tensor]:
        """Run again what the side runs here, on n equal rows, and return {n: the first row's value}."""
        function, module, x = self.function(side), self.sides[side].block.module, self.inputs(side)
        if self.role == "lm_head" and side == "sampler" and x:
            function = lambda n: self.engine.model.compute_logits(x["x"].expand(n, -1).contiguous())  # noqa: E731
        elif module is not None and self.op is not None and "x" in x:

            def of_module(n: int) -> Tensor:
                output = module(x["x"].expand(n, -1).contiguous())
                output = output[0] if isinstance(output, tuple) else output
                return output[:, self.part(output.shape[-1], side)]

            function = of_module

        if function is None or self.role in ("attention", "rope table"):
            return {}
        return {n: function(n)[0].flatten() for n in ROW_COUNTS}


def other_side(side: str) -> str:
    """Return the name of the other side."""
    return "trainer" if side == "sampler" else "sampler"
