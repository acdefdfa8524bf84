"""Mixtures of experts through TRL: exact, with the same experts on both sides; stock kernels choose others now and then."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

import rlinvariant
from rlinvariant import bits
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.models import experts, lora
from rlinvariant.models.random import save_random
from rlinvariant.models.routing import Routing, slots_of
from rlinvariant.recipes import arithmetic_moe
from rlinvariant.rollout import Completion
from rlinvariant.sampler.engine import Sampler
from rlinvariant.sampler.expert_loader import ExpertLoader
from rlinvariant.trainer.packing import Packed
from rlinvariant.trainer.turns import Turns
from tests.parity.device import cpu_only
from tests.parity.harness import assert_same_weights, questions, small_config, variety

pytestmark = cpu_only("mixtures are refused on a GPU so far")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    """The untrained model of `arithmetic_moe`, with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("mixture")
    model, tokenizer = arithmetic_moe.build_model()
    save_random(model.config, path)
    tokenizer.save_pretrained(path)
    return str(path)


def made(directory: str, output: Path, invariance: Any, options: dict[str, Any], reward: Any = variety, **changes: Any) -> Any:
    """A trainer of two steps; `options` are ours, and `changes` those of GRPOConfig."""
    return (rlinvariant.ppo_trainer if "ppo" in options else rlinvariant.grpo_trainer)(
        directory,
        reward,
        small_config(output, **{"per_device_train_batch_size": 16} | changes),
        questions(),
        processing_class=AutoTokenizer.from_pretrained(directory),
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        invariance=invariance,
        **options,
    )


def trained(
    directory: str, output: Path, invariance: Any, steps: int = 2, options: dict[str, Any] | None = None, **changes: Any
) -> tuple[Any, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    kept = {"on_row": lambda row, mismatch: rows.append(row), **(options or {})}
    trainer = made(directory, output, invariance, kept, max_steps=steps, **changes)
    trainer.train()
    return trainer, rows


def test_a_mixture_trains_exactly_and_both_sides_choose_the_same_experts(directory, tmp_path, capsys):
    trainer, rows = trained(directory, tmp_path, "exact", beta=0.01)  # a reference, whose experts nobody compares
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/weights_equal"] == 1 for row in rows)
    flips = [{key: n for key, n in row.items() if key.startswith("onpolicy/router_flips")} for row in rows]
    assert flips == [{"onpolicy/router_flips": 0, "onpolicy/router_flips/0": 0, "onpolicy/router_flips/1": 0}] * 2
    before = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for (name, old), (_, new) in zip(before.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert not bits.same(old, new), f"{name} is trained"

    saved = tmp_path / "saved"  # transformers reads what was trained, one matrix for each expert
    trainer.save_model(str(saved))
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert sum(".experts." in name for name in file.keys()) == 2 * 8 * 3  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert trainer.sampler.differing_weights(again.named_parameters())  # the last step was not drawn from
    trainer.sampler.sync(again.named_parameters())
    assert trainer.sampler.differing_weights(trainer.model.named_parameters()) == []
    with torch.no_grad():
        again.model.layers[1].mlp.experts.down_proj[7, 3, 5] += 0.5
    (wrong,) = trainer.sampler.differing_weights(again.named_parameters())
    assert wrong == "model.layers.1.mlp.experts.down_proj", "control: one weight of one expert"

    assert "router_flips" not in capsys.readouterr().out
    llm = trainer.sampler.llm
    for sampler, groups, why in (
        (SimpleNamespace(llm=llm), 0, "the sampler does not say"),
        (SimpleNamespace(llm=llm, routes=None), 0, "the routers of a compiled sampler"),
        (SimpleNamespace(llm=llm, routes=None), 4, "the model's router chooses by more"),
    ):
        trainer.model.config.n_group = groups
        trainer._attach(sampler)
        assert f"note: onpolicy/router_flips is not counted: {why}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True], ids=["exact", "one expert off"])
def test_experts_of_a_rollout_that_is_scored_in_parts_are_all_compared(directory, tmp_path, monkeypatch, planted):
    """Beside a reference, whose forward comes after. Control: a number of one token of each part."""
    unpacked = Packed.unpack

    def one_off(self: Packed, values: torch.Tensor) -> torch.Tensor:
        values = values + torch.eye(1, len(values), dtype=torch.int64)[0] if values.dtype == torch.int64 else values
        return unpacked(self, values)

    if planted:
        monkeypatch.setattr(Packed, "unpack", one_off)
    _, rows = trained(directory, tmp_path, "exact", beta=0.01, steps_per_generation=2, options={"tokens_per_microbatch": 100})
    first = rows[0]
    assert first["onpolicy/mismatched_tokens"] == 0 < first["onpolicy/compared_tokens"]
    assert (first["onpolicy/router_flips"] >= 2) if planted else (first["onpolicy/router_flips"] == 0)


@pytest.mark.slow
def test_stock_sides_choose_other_experts_now_and_then(directory, tmp_path):
    """Control of the count; and the stock engine gets every weight, which its own reload of experts does not give it."""
    trainer, rows = trained(directory, tmp_path, "off", steps=6)
    assert all(row["onpolicy/weights_equal"] == 1 for row in rows)
    assert sum(row["onpolicy/router_flips"] for row in rows) > 0
    for row in rows:
        layers = [row["onpolicy/router_flips/0"], row["onpolicy/router_flips/1"]]
        assert max(layers) <= row["onpolicy/router_flips"] <= sum(layers)
    assert max(row["onpolicy/kl_k3"] for row in rows) < 0.1, "the same model on both sides"
    trainer.sampler.sync(trainer.model.named_parameters())
    assert trainer.sampler.differing_weights(trainer.model.named_parameters()) == []
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.experts.gate_up_proj[2] *= 2
    (wrong,) = trainer.sampler.differing_weights(trainer.model.named_parameters())
    assert "w13_weight" in wrong


@pytest.mark.parametrize(
    ("own", "given", "said"),
    [
        (0.001, None, "router_aux_loss_coef=0.001, the model's own: expected 0: no op has the auxiliary loss"),
        (0.0, 0.01, "router_aux_loss_coef=0.01: expected 0"),
        (0.001, 0.0, None),
    ],
)
def test_an_auxiliary_loss_is_refused_in_one_line(directory, tmp_path, own, given, said):
    from rlinvariant.trainer.refusals import auxiliary_problems

    config = AutoConfig.from_pretrained(directory)
    config.router_aux_loss_coef = own
    args = GRPOConfig(str(tmp_path), router_aux_loss_coef=given, use_cpu=True, report_to="none")
    found = auxiliary_problems(args, config, "exact")
    assert [line[: len(said or "")] for line in found] == ([] if said is None else [said])
    assert auxiliary_problems(args, config, "off") == []
    config.output_router_logits = True
    assert any(
        line.startswith("output_router_logits=True: expected False") for line in auxiliary_problems(args, config, "exact")
    )


def test_an_auxiliary_loss_is_refused_before_weights_are_loaded(directory, tmp_path):
    with pytest.raises(ConfigErrors, match="router_aux_loss_coef=0.5: expected 0"):
        trained(directory, tmp_path, "exact", router_aux_loss_coef=0.5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_names_of_a_checkpoint_lead_to_places_and_back(family):
    path = "model.layers.3.mlp.experts"
    both = [(f"{path}.gate_up_proj", torch.randn(3, 8, 5)), (f"{path}.down_proj", torch.randn(3, 5, 4))]
    found = dict(experts.in_checkpoint(both, family))
    assert len(found) == 9 and all(weight.dim() == 2 for weight in found.values())
    for name, weight in found.items():
        where = experts.place(name)
        assert where is not None and where[0] == path
        whole = dict(both)[f"{path}.{where[1]}"]
        assert bits.same(experts.rows_of(whole, where[2], where[3], where[1]), weight)
    theirs = "block_sparse_moe.experts.0.w1" if family == "mixtral" else "mlp.experts.0.gate_proj"
    assert bits.same(found[f"model.layers.3.{theirs}.weight"], both[0][1][0, :4])
    assert experts.place("model.layers.0.mlp.gate.weight") is experts.place("model.layers.0.mlp.gate_proj.weight") is None


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.experts = torch.nn.Module()
        self.model.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 5))
        self.model.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 5, 4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.experts.1.up_proj.weight"), "expert 1 is missing from the checkpoint, first of 1 parts"),
        (lambda w: w.update({"model.experts.2.up_proj.weight": torch.zeros(4, 5)}), "not in the model"),
        (lambda w: w.update({"model.experts.1.up_proj.weight": torch.zeros(4, 6)}), r"shape \[4, 6\], expected \[4, 5\]"),
    ],
)
def test_a_checkpoint_without_an_expert_is_refused(change, said):
    whole = [("model.experts.gate_up_proj", torch.randn(2, 8, 5)), ("model.experts.down_proj", torch.randn(2, 5, 4))]
    weights, model = dict(experts.in_checkpoint(whole, "qwen3_moe")), Holder()

    def load(weights: dict[str, torch.Tensor]) -> set[str]:
        loader = ExpertLoader(model)
        assert list(loader.others([*weights.items(), ("other", torch.zeros(1))])) == [("other", torch.zeros(1))]
        return loader.loaded()

    assert load(weights) == {name for name, _ in whole}
    assert all(bits.same(model.get_parameter(name), weight) for name, weight in whole)
    change(weights)
    with pytest.raises(UserError, match=said):
        load(weights)


def test_routing_gives_one_number_to_a_set_whatever_its_order(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    routing = Routing(model, 2)
    routing._table = torch.tensor([1, 10, 100, 1000, 0, 0, 0, 0])
    routing.begin()
    logits = torch.zeros(2, 8)
    for layer in range(routing.layers):
        routing._note(layer, (logits, torch.ones(2, 2), torch.tensor([[0, 2], [2, 0]])))
    routing._note(0, (torch.eye(8)[:1] * 2 + torch.eye(8)[3:4], None))  # vLLM's own: logits alone
    routing._note(1, (torch.eye(8)[:1] * 2 + torch.eye(8)[1:2], None))
    assert routing.take().tolist() == [[101, 101], [101, 101], [1001, 11]]
    routing._note(0, (logits, None))
    assert not any(routing._seen), "nothing is kept that nobody takes"
    routing.begin()
    assert routing.take() is None, "another model ran"
    assert Routing(torch.nn.Linear(2, 2), 2).take() is None


def test_only_routers_that_choose_by_their_logits_are_watched(directory):
    config = AutoConfig.from_pretrained(directory)
    assert slots_of(config) == 2
    config.scoring_func, config.n_group = "softmax", 1
    assert slots_of(config) is None, "groups"
    config.scoring_func, config.n_group = "sigmoid", None
    assert slots_of(config) is None
    config.scoring_func, config.num_experts = "softmax", 0
    assert slots_of(config) is None, "no mixture"


def test_experts_of_samples_that_a_rollout_func_has_cut_are_not_compared():
    turns = Turns([1, 2])
    numbers = np.arange(6).reshape(3, 2)
    drawn = [Completion([5, 6, 7], [0.0] * 3, experts=numbers), Completion([8], [0.0], experts=numbers[:1])]
    turns.add([[1], [2]], [0, 1], drawn)
    turns.add([[1, 5, 6, 7, 9]], [0], [Completion([4], [0.0], experts=numbers[2:])])
    found = turns.experts([[5, 6, 7, 4], [8]])
    assert found is not None and [x.tolist() for x in found] == [[[0, 1], [2, 3], [4, 5], [4, 5]], [[0, 1]]]
    assert turns.experts([[5, 6, 4], [8]]) is None is turns.experts([[5, 6, 7, 3], [8]])


def test_adapters_of_experts_are_refused_with_the_fix(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with pytest.raises(
        UserError, match=r"takes model.layers.0.mlp.experts.*; set lora.target_modules=q_proj,k_proj,v_proj,o_proj"
    ):
        lora.applied(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_stock_engines_of_other_families_take_their_weights(tmp_path, family):
    from rlinvariant.models.families import FAMILIES

    path = save_random(FAMILIES[family](), tmp_path / family)
    engine = Sampler(path, invariant=False, max_model_len=64, kv_cache_gib=0.02)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    drawn = engine.generate([[5, 6, 7]], [1], temperature=0, max_tokens=6)
    assert engine.differing_weights(model.named_parameters()) == []
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert engine.differing_weights(model.named_parameters())
    engine.sync(model.named_parameters())
    assert engine.differing_weights(model.named_parameters()) == []
    again = Sampler(model_saved(model, tmp_path / "moved"), invariant=False, max_model_len=64, kv_cache_gib=0.02)
    how = {"temperature": 0, "max_tokens": 6}
    assert engine.generate([[5, 6, 7]], [1], **how) == again.generate([[5, 6, 7]], [1], **how) and len(drawn[0].token_ids) > 0


def model_saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_mixture_goes_on_and_takes_its_best_weights_from_files_that_have_experts_one_by_one(algorithm, directory, tmp_path):
    """Rewards fall from step to step, so that the first checkpoint is the best."""

    def falling(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return [len(set(text)) / 10 - 10 * trainer_state.global_step for text in completions]

    saved = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = saved | {"load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": True}
    how: dict[str, Any] = {"ppo": rlinvariant.PPOConfig()} if algorithm == "ppo" else {}

    def end_of(output: str, checkpoint: int | None = None, **changes: Any) -> dict[str, torch.Tensor]:
        trainer = made(directory, tmp_path / output, "exact", how | {"eval_dataset": questions(4)}, falling, **changes)
        trainer.train(None if checkpoint is None else str(tmp_path / output / f"checkpoint-{checkpoint}"))
        both = [trainer.model, *([trainer.critic] if algorithm == "ppo" else [])]
        return {f"{at} {name}": w.detach().clone() for at, model in enumerate(both) for name, w in model.named_parameters()}

    whole = end_of("whole", **saved)
    assert_same_weights(end_of("whole", 1, **saved), whole, "resumed")
    if algorithm == "ppo":  # which takes no best weights
        return
    first = end_of("one", **saved | {"max_steps": 1})
    kept = end_of("best", **best)
    assert_same_weights(kept, first, "the best, after the first step")
    name = next(name for name in kept if name.endswith("gate_up_proj"))
    assert bits.compare(kept[name], whole[name]) is not None, "control: those of the last step"
