"""gradients=invariant: weights do not depend on how many processes and micro-batches a step had."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlinvariant import bits
from rlinvariant.config.parse import parse
from rlinvariant.errors import ConfigErrors
from rlinvariant.gradients import gradients_problems
from rlinvariant.models.leaves import Leaves, additions
from rlinvariant.models.ordered import tree_sum
from rlinvariant.models.random import save_random
from rlinvariant.recipes import arithmetic_moe
from rlinvariant.report.rundir import read_metrics
from rlinvariant.trainer.leaves import without_padding
from tests import forks
from tests.parity.device import cpu_only
from tests.parity.harness import assert_exact, assert_same_weights, new_trainer, train, weights
from tests.trainer.gradients import Gradients, distance, halves
from tests.trainer.test_memory import out_of_memory
from tests.trainer.test_sharding import ENV, FSDP
from tests.trainer.test_training import LOSSES, STEP, numbers
from tests.trainer.tool_model import tool_trainer

ROOT = Path(__file__).parents[2]


def through_leaves(x: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The sum as a parameter gets it, and how many gradients were held between two backwards."""
    p, most = nn.Parameter(torch.zeros_like(x[0])), 0
    leaves = Leaves([("p", p)])
    leaves.begin(len(x))
    for leaf in x:
        (p * leaf).sum().backward()
        assert p.grad is None
        most = max(most, len(leaves._branches[p].sums))
    leaves.finish()
    assert p.grad is not None
    return p.grad, most


def test_leaves_are_added_in_one_tree_however_it_is_cut_over_processes():
    for count in (1, 2, 3, 5, 6, 8, 12, 16, 20, 24):
        x, w = bits.cancelling(1, 64, count, torch.float32, seed=count)
        terms = [*(x * w).T]  # whose sum is 0: what is left of it is rounding, by the order
        (found, most), expected = through_leaves(terms), halves(terms)
        assert bits.compare(found, expected) is None and most <= max(1, (count - 1).bit_length())
        for ranks in (2, 4):
            if count % ranks == 0:
                each = count // ranks
                branches = [through_leaves(terms[rank * each :][:each])[0] for rank in range(ranks)]
                assert bits.compare(tree_sum(branches), expected) is None, f"{count} samples on {ranks}"
        if count > 3:
            assert bits.compare(sum(terms[1:], terms[0]), expected) is not None, "control: one after the other"
    assert additions(6) == [0, 0, 2, 0, 0, 3], "(a + (b + c)) + (d + (e + f))"


def test_a_gradient_that_is_missing_or_one_too_many_ends_the_step():
    one, two = (nn.Parameter(torch.ones(2)) for _ in range(2))
    leaves = Leaves([("one", one), ("two", two)])
    leaves.begin(2)
    (one.sum() + two.sum()).backward()
    one.sum().backward()
    with pytest.raises(RuntimeError, match="two has gradients of 1 of 2 samples"):
        leaves.finish()
    with pytest.raises(RuntimeError, match="one: a backward more than the 2 samples"):
        one.sum().backward()
    leaves.begin(1)
    (one.sum() + two.sum()).backward()
    leaves.finish()
    one.sum().backward()
    assert one.grad is not None and one.grad.tolist() == [2, 2], "after a step gradients are PyTorch's"


def test_a_leaf_has_no_column_of_another_sample():
    """Sums over columns have another order where a longer completion stands beside: of a sequence's ratio, or its mean."""
    mask = torch.tensor([[1, 1, 0, 0]])
    padded = {"completion_mask": mask, "old_per_token_logps": torch.ones(1, 4), "experts": torch.ones(1, 4, 2)}
    whole = {"prompt_ids": torch.ones(1, 4), "prompt_mask": mask, "advantages": torch.ones(1), "ratio": torch.ones(1, 1)}
    cut = without_padding(padded | whole | {"num_items_in_batch": torch.tensor(9), "completion_tokens": [2]})
    assert {key: cut[key].shape[1] for key in padded} == dict.fromkeys(padded, 2)
    assert all(cut[key] is x for key, x in whole.items())
    assert without_padding({"completion_mask": 0 * mask, "completion_tokens": [0]})["completion_mask"].shape == (1, 1)


GOOD = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "loss_type": "dapo",
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
}
LAYOUT = {"processes": 2, "invariance": "exact"}


@pytest.mark.parametrize(
    ("settings", "layout", "line"),
    [
        ({}, {"processes": 3}, "num_processes=3: expected a power of two"),
        ({}, {"invariance": "trainer"}, "invariance=trainer: expected exact"),
        ({}, {"staleness": 1}, "staleness=1: expected 0"),
        ({}, {"tokens": 900}, "trainer.tokens_per_microbatch=900: expected None"),
        ({"generation_batch_size": 32}, {}, "trainer.generation_batch_size=32: expected 16, a rollout for each step"),
        ({"steps_per_generation": 4}, {}, "trainer.steps_per_generation=4: expected trainer.gradient_accumulation_steps=2"),
        ({"loss_type": "bnpo"}, {}, "trainer.loss_type=bnpo: expected dapo"),
        ({"entropy_coef": 0.1}, {}, "trainer.entropy_coef=0.1: expected 0"),
        ({"use_adaptive_entropy": True}, {}, "trainer.use_adaptive_entropy=True: expected False"),
        ({"top_entropy_quantile": 0.5}, {}, "trainer.top_entropy_quantile=0.5: expected 1.0"),
    ],
)
def test_what_would_not_be_invariant_is_refused_by_name(settings, layout, line):
    def problems(gradients, settings, layout):
        trainer: Any = SimpleNamespace(**(GOOD | settings))
        return gradients_problems(trainer, gradients, **(LAYOUT | layout), prefix="trainer.")

    (found,) = problems("invariant", settings, layout)
    assert found.startswith(line) and found.endswith("set it, or use gradients=ordered")
    assert problems("ordered", settings, layout) == [] == problems("invariant", {}, {})
    assert (
        problems("invariant", {"generation_batch_size": 16}, {}) == [] == problems("invariant", {"steps_per_generation": 2}, {})
    )


def test_runs_and_scripts_are_refused_alike_before_weights_are_loaded(arithmetic_dir, tmp_path):
    asked = [f"recipe={ROOT / 'recipes/arithmetic.py'}", "gradients=invariant", "trainer.loss_type=bnpo", "staleness=1"]
    with pytest.raises(ConfigErrors) as error:
        parse(asked, {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "0"})
    for said in ("num_processes=3: ", "trainer.loss_type=bnpo: ", "staleness=1: "):
        assert sum(line.startswith(said) for line in str(error.value).splitlines()) == 1, str(error.value)
    with pytest.raises(ConfigErrors, match=r"^loss_type=bnpo: expected dapo with gradients=invariant"):
        new_trainer(arithmetic_dir, None, tmp_path, gradients="invariant", loss_type="bnpo")


OTHERS = [pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES if loss not in ("bnpo", "dapo")]


@pytest.mark.parametrize("loss", ["dapo", *OTHERS])
def test_a_step_has_the_gradient_and_the_numbers_of_a_packed_one(loss, divided):
    settings = {"loss_type": loss, "importance_sampling_level": "sequence" if loss == "luspo" else "token"}
    packed, expected = divided(None, **settings)
    leaves, found = divided(None, gradients="invariant", **settings)
    assert_exact(leaves, STEP)
    rounded = [key for key in packed.rows[0] if key in ("loss", "grad_norm") or key.startswith("vespo/")]
    assert numbers(leaves, *rounded) == numbers(packed, *rounded)
    for key in rounded:
        assert leaves.rows[0][key] == pytest.approx(packed.rows[0][key], rel=2e-3, abs=1e-6), key
    assert 0 < distance(found, expected) < 2**-8, "more than a rounding to bf16"
    by_two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    assert bits.compare(divided(None, gradients="invariant", **by_two, **settings)[1], found) is None


@pytest.mark.slow
def test_a_step_s_gradient_is_as_near_to_float64_s_as_a_packed_one_s(divided, arithmetic_dir):
    """Every ratio is 1, so TRL's loss is advantage times log-prob, a mean over the step's tokens."""
    samples: list[Any] = []
    packed = divided(None, loss_type="dapo")[1]
    found = divided(None, gradients="invariant", loss_type="dapo", on_samples=samples.extend)[1]
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float64, attn_implementation="eager")
    for row in samples:
        prompt, ids = (torch.from_numpy(row[name]).long() for name in ("prompt_token_ids", "token_ids"))
        logits = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        (-row["advantage"] * logits.log_softmax(-1).gather(1, ids[:, None])).sum().backward()
    tokens = sum(len(row["token_ids"]) for row in samples)
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / tokens
    assert len(samples) == 16 and distance(packed, expected) < 2**-5, "activations are bf16"
    assert distance(found, expected) < 1.1 * distance(packed, expected)


@pytest.mark.slow
def test_a_step_that_starts_again_and_a_run_that_is_resumed_have_the_same_weights(
    arithmetic_dir, exact_engine, tmp_path, monkeypatch, capsys
):
    settings = {"gradients": "invariant", "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "num_iterations": 2}
    with monkeypatch.context() as patch:
        out_of_memory(patch, backward=5)  # with sums in progress
        again = train(arithmetic_dir, exact_engine, tmp_path / "again", **settings)
    assert "the step starts again with" in capsys.readouterr().out
    whole = train(arithmetic_dir, exact_engine, tmp_path / "whole", **settings)
    assert_same_weights(weights(again), weights(whole), "out of memory")
    rest = new_trainer(arithmetic_dir, exact_engine, tmp_path / "whole", **settings)
    rest.trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert_same_weights(weights(rest), weights(whole), "resumed, in the middle of a rollout's use")


@pytest.mark.slow
def test_tools_are_trained_with_the_gradient_of_a_packed_step(arithmetic_dir, exact_engine, tmp_path):
    """Completions of several turns, with tokens that nobody trains on between those that are."""
    found = []
    for gradients in ("stock", "invariant"):
        kept = Gradients()
        settings = {"max_steps": 1, "max_grad_norm": 1e9, "callbacks": [kept], "gradients": gradients}
        run = tool_trainer(arithmetic_dir, exact_engine, tmp_path / gradients, **settings)
        run.trainer.train()
        assert_exact(run, STEP)
        assert run.rows[0]["tools/call_frequency"] > 0
        found.append(kept.steps[0])
    assert 0 < distance(found[1], found[0]) < 2**-8


def three(arithmetic_dir, exact_engine, directory, **changes):
    """Three clipped steps of GRPO."""
    settings = {"max_steps": 3, "max_grad_norm": 0.05, **changes}
    run = train(arithmetic_dir, exact_engine, directory, **settings)
    assert_exact(run, 3 * STEP)
    assert all(row["grad_norm"] > 0.05 for row in run.rows), "clipped"
    return bits.digest(weights(run).items())


@pytest.mark.slow
def test_micro_batches_are_not_in_the_weights(arithmetic_dir, exact_engine, tmp_path):
    def of(rows, **changes):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 16 // rows}
        return three(arithmetic_dir, exact_engine, tmp_path / f"{rows}{len(changes)}", **sizes, **changes)

    assert len({of(rows, gradients="invariant") for rows in (1, 2, 16)}) == 1
    divided = {three(arithmetic_dir, exact_engine, tmp_path / str(t), tokens_per_microbatch=t) for t in (22, 60, None)}
    assert len(divided) == 3, "control: as stock kernels add a packed batch"


SETTINGS = (
    f"recipe={ROOT / 'tests/trainer/tiny_recipe.py'}",
    "wandb.mode=disabled",
    "data.eval_size=2",
    "steps=3",
    "trainer.num_generations=4",
    "trainer.learning_rate=1e-3",
    "trainer.lr_scheduler_type=constant",
    "trainer.max_grad_norm=0.05",  # so that every step is clipped
)
SAMPLES = 24  # of a step: a branch of 12 or 6 is no power of two
KINDS = {
    "plain": (),
    "reused": (
        "trainer.num_iterations=2",
        "trainer.beta=0.05",
        "trainer.loss_type=grpo",
        "trainer.gradient_checkpointing=true",
    ),
    "sequences": ("trainer.loss_type=luspo", "trainer.importance_sampling_level=sequence", "trainer.num_iterations=2"),
    "masked": ("trainer.mask_truncated_completions=true", "trainer.max_completion_length=8"),
    "adapters": ("lora.r=4",),
    "mixture": ("trainer.router_aux_loss_coef=0",),
    "ppo": ("algorithm=ppo", "ppo.kl_coef=0.05", "ppo.target_kl=9", "trainer.num_iterations=2", "trainer.save_steps=3"),
    "ppo, adapters": ("algorithm=ppo", "lora.r=4", "trainer.save_steps=3"),
}


def run_on(ranks: int, directory: Path, model: str, name: str, *settings: str, sharded: bool = False) -> Path:
    """Train three steps with so many processes; return the directory of the run, whose every step was exact."""
    command = [str(ROOT / "train.py"), *SETTINGS, f"model={model}", f"run={name}", *settings]
    if ranks == 1:
        done = [forks.run(command, cwd=directory, env=ENV | forks.LAUNCHED)]
    else:
        done = forks.run_ranks(ranks, command, cwd=directory, env=ENV | (FSDP if sharded else {}))
        assert ("weights in shards" in done[0].stdout) == sharded
    assert {rank.returncode for rank in done} == {0}, "".join(rank.stderr[-3000:] for rank in done)
    rows = read_metrics(run := directory / "runs" / name)
    assert sum(row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in rows) == 0 and len(rows) == 3
    return run


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Return what was trained, with the critic that the last checkpoint has, if there is one."""
    (path,) = [path for path in (run / "model").glob("*.safetensors")]
    critic = sorted(run.glob("checkpoints/checkpoint-3/critic/*.safetensors"))
    return load_file(path) | {f"{file.name} {name}": x for file in critic for name, x in load_file(file).items()}


def different(a: Path, b: Path) -> int:
    one, other = parameters(a), parameters(b)
    assert one.keys() == other.keys() and len(one) > 3
    return sum(bits.compare(x, other[name]) is not None for name, x in one.items())


def sizes(ranks: int, accumulated: int) -> tuple[str, str]:
    each = SAMPLES // ranks // accumulated
    return f"trainer.per_device_train_batch_size={each}", f"trainer.gradient_accumulation_steps={accumulated}"


@cpu_only("several processes of one run take a GPU each; here they are joined by gloo")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_are_not_in_the_weights(kind, arithmetic_dir, tmp_path):
    how = KINDS[kind]
    if kind == "mixture":
        model, tokenizer = arithmetic_moe.build_model()
        arithmetic_dir = str(tmp_path / "mixture")
        save_random(model.config, arithmetic_dir)
        tokenizer.save_pretrained(arithmetic_dir)
    one = run_on(1, tmp_path, arithmetic_dir, "one", "gradients=invariant", *sizes(1, 1), *how)
    layouts = [(2, 3, False), *([(4, 1, False), (4, 2, True)] if kind in ("plain", "ppo") else [])]
    for ranks, accumulated, sharded in (*layouts, *([(2, 1, True)] if kind != "masked" else [])):
        name, divided = f"{'shards' if sharded else 'on'}{ranks}", sizes(ranks, accumulated)
        several = run_on(ranks, tmp_path, arithmetic_dir, name, "gradients=invariant", *divided, *how, sharded=sharded)
        assert different(one, several) == 0, name
        assert all(row["grad_norm"] > 0.05 for row in read_metrics(several)), "clipped"
        for a, b in zip(read_metrics(one), read_metrics(several), strict=True):
            assert a["grad_norm"] == b["grad_norm"] and a["reward"] == b["reward"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-7)
            assert a.get("value/grad_norm") == b.get("value/grad_norm")
    if kind == "masked":
        assert all(0 < row["completions/clipped_ratio"] < 1 for row in read_metrics(one)), "some are masked, and not all"
    if kind == "ppo":
        assert "value_head.safetensors weight" in parameters(one) and read_metrics(one)[0]["value/grad_norm"] > 0
    if kind in ("plain", "ppo"):
        how = ("gradients=ordered", *how)
        controls = [run_on(n, tmp_path, arithmetic_dir, f"ordered{n}", *sizes(n, 1), *how, sharded=n > 1) for n in (1, 2)]
        assert different(*controls) > 0, "control: in a fixed order of the ranks"
        assert different(one, controls[0]) > 0


@cpu_only("several processes of one run take a GPU each; here they are joined by gloo")
@pytest.mark.slow
def test_a_rollout_of_ppo_is_left_at_the_same_step_on_any_number_of_processes(arithmetic_dir, tmp_path):
    """The policy has no gradients in the first step, which is the warm-up, and nothing has any in the third."""
    how = ("gradients=invariant", "algorithm=ppo", "ppo.value_warmup_steps=1", "ppo.target_kl=1e-7")
    how += ("trainer.num_iterations=3", "trainer.save_steps=3")
    one, *others = [
        run_on(ranks, tmp_path, arithmetic_dir, f"{ranks}{sharded}", *sizes(ranks, 1), *how, sharded=sharded)
        for ranks, sharded in ((1, False), (2, False), (2, True))
    ]
    names = ("policy/early_stopped", "policy/approx_kl", "grad_norm", "value/grad_norm")
    rows = [[row[name] for name in names] for row in read_metrics(one)]
    assert [row[0] for row in rows] == [0, 0, 1] and rows[0][2] == 0 == rows[1][1] and rows[1][2] > 0 and rows[2][1] > 1e-7
    for other in others:
        assert repr([[row[name] for name in names] for row in read_metrics(other)]) == repr(rows)
        assert different(one, other) == 0
