"""PPO: exact like GRPO, values that depend on nothing but their tokens, and what PPO adds, each against a control."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlinvariant.bits import assert_bits_equal
from rlinvariant.config import PPOConfig, parse
from rlinvariant.keys import KEYS, PPO_KEYS
from rlinvariant.models import lora
from rlinvariant.report.rundir import read_metrics
from rlinvariant.trainer import InvariantPPOTrainer
from rlinvariant.trainer.critic import VALUE_HEAD_FILE, Critic, beside
from tests import forks
from tests.parity.device import DEVICE, cpu_only, fp32_only_on_cpu
from tests.parity.harness import (
    Layout,
    Run,
    assert_exact,
    assert_same_weights,
    critic_weights,
    load,
    new_trainer,
    padded,
    weights,
)
from tests.trainer.gradients import Gradients, distance

STEP = 16 * 8
TIMES = ("time/", "perf/", "step_time", "profiling/")


@pytest.fixture
def run(new):
    def start(*args: Any, **changes: Any) -> Run:
        started = new(*args, **changes)
        started.trainer.train()
        return started

    return start


def moved(run: Run, arithmetic_dir: str) -> tuple[bool, bool]:
    """Return whether any weight of (policy, critic's backbone) is another than in the checkpoint."""
    first = dict(AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32).named_parameters())
    backbone = {f"model.{name}": p for name, p in run.trainer.critic.backbone.named_parameters()}
    return tuple(any((p.cpu() != first[name]).any() for name, p in found.items()) for found in (weights(run), backbone))  # type: ignore[return-value]


def test_a_run_is_exact_and_moves_policy_and_critic(run, arithmetic_dir):
    trained = run()
    assert_exact(trained, 2 * STEP)
    assert moved(trained, arithmetic_dir) == (True, True)
    assert all(p.abs().sum() > 0 for p in critic_weights(trained).values())
    assert all(p.grad is None for p in trained.trainer.critic.parameters()), "gradients would add up"
    for row in trained.rows:
        assert set(KEYS) | set(PPO_KEYS) <= row.keys() and row["onpolicy/coverage"] == 1
        assert (row["policy/ratio_min"], row["policy/ratio_max"], row["policy/approx_kl"]) == (1.0, 1.0, 0.0)
    assert trained.rows[0]["value/mean"] == 0.0 != trained.rows[1]["value/mean"], "the head starts at 0"


SCHEDULES = {
    "in parts": {"gradient_accumulation_steps": 2, "tokens_per_microbatch": 60},
    "two iterations": {"num_iterations": 2},
    "minibatches, two iterations": {"steps_per_generation": 2, "num_iterations": 2},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_exact(schedule, run):
    trained = run({"kl_coef": 0.1}, max_steps=4, per_device_train_batch_size=8, **SCHEDULES[schedule])
    assert_exact(trained, STEP)
    assert trained.rows[0]["policy/ratio_max"] == 1.0
    later = [row["policy/ratio_max"] for row in trained.rows if not row["onpolicy/compared_tokens"]]
    assert all(ratio > 1 for ratio in later) and len(later) == (2 if schedule == "two iterations" else len(later))


# ---- values


def some_rows() -> tuple[list[list[int]], list[list[int]]]:
    rng = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 13, (12, 2), generator=rng).tolist()
    return tuple([torch.randint(4, 90, (n[i],), generator=rng).tolist() for n in lengths] for i in (0, 1))  # type: ignore[return-value]


both = pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])


def valued(critic: Critic, layout: Layout, rows: list[int]) -> list[Tensor]:
    """Values of each completion, in the order of `rows`, scored in micro-batches."""
    prompts, completions = some_rows()
    found = {}
    for at in range(0, len(rows), layout.micro_batch):
        part = rows[at : at + layout.micro_batch]
        ids, mask, length = padded([prompts[i] for i in part], [completions[i] for i in part], layout)
        with torch.set_grad_enabled(layout.grad):
            values = critic(ids.to(DEVICE), mask.to(DEVICE), length).detach().cpu()
        assert not values[mask[:, -length:] == 0].any()
        found |= {i: values[row][mask[row, -length:].bool()] for row, i in enumerate(part)}
    return [found[i] for i in range(len(rows))]


def new_critic(path: str, invariant: bool, adapted: bool, dtype: torch.dtype = torch.bfloat16) -> Critic:
    """A critic with a random head, and, `adapted`, with adapters whose B is random, too."""
    model = load(path).to(DEVICE)
    if adapted:
        model = lora.applied(model, LoraConfig(r=4, target_modules="all-linear"), 0)
        lora.randomise(model, 0)
    made = Critic(beside(model, shared=True), dtype, invariant)
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator(DEVICE).manual_seed(0))
    return made.eval()


@both
def test_values_do_not_depend_on_micro_batch_order_or_padding(adapted, arithmetic_dir):
    ours, every = new_critic(arithmetic_dir, True, adapted), list(range(12))
    alone = torch.cat(valued(ours, Layout(1), every))
    assert alone.unique().numel() > 40, "blind: values are alike"
    others = [Layout(12), Layout(5), Layout(12, padding=3), Layout(7, padding=9, grad=True)]
    for layout in others:
        assert_bits_equal(torch.cat(valued(ours, layout, every)), alone, str(layout))
    assert_bits_equal(torch.cat(valued(ours, Layout(5), every[::-1])), alone, "reversed")
    stock = new_critic(arithmetic_dir, False, adapted)
    with torch.autocast(DEVICE, torch.bfloat16):
        control = [torch.cat(valued(stock, layout, every)) for layout in (Layout(1), Layout(12))]
    assert (control[0] != control[1]).any(), "control: the stock critic's values depend on the batch"


# ---- losses


def test_the_policy_loss_is_ppos(new, arithmetic_dir):
    """TRL's loss with advantages per token against float64, by cases, at ratios on both sides of the clip range."""
    trainer = new().trainer
    rng = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4]])).long().to(DEVICE)
    old, advantages = (torch.randn(3, 6, generator=rng).to(DEVICE) for _ in range(2))
    new_logprobs = (old + 0.3 * torch.randn(3, 6, generator=rng).to(DEVICE)).requires_grad_()
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), mask)
    inputs |= dict.fromkeys(("old_per_token_logps", "sampling_per_token_logps"), old)
    inputs |= {"advantages": advantages, "num_items_in_batch": mask.sum(), "compared": torch.ones(3)}
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with (
        mock.patch.object(trainer, "_packed_logprobs", lambda *_: (new_logprobs, new_logprobs.detach() * 0)),
        mock.patch.object(trainer, "_learn_values"),
    ):
        loss = trainer._compute_loss(trainer.model, inputs)
    total, slopes, clipped = 0.0, torch.zeros(3, 6, dtype=torch.float64), 0
    for b, t in mask.nonzero().tolist():
        a, ratio = advantages[b, t].item(), (new_logprobs[b, t].double() - old[b, t].double()).exp().item()
        flat = ratio > 1.2 if a > 0 else ratio < 0.8
        total -= a * ((1.2 if a > 0 else 0.8) if flat else ratio)
        slopes[b, t], clipped = (0.0 if flat else -a * ratio), clipped + flat
    assert 2 <= clipped <= 8
    assert loss.item() == pytest.approx(total / 12, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, new_logprobs)
    assert torch.allclose(gradient.double().cpu(), slopes / 12, rtol=1e-5, atol=1e-7)


def test_parts_change_no_mean(run):
    """One step over 16 rows, whole, in parts or row by row: the same loss and gradient of the critic, but for rounding."""
    whole, pieces = run(max_steps=1), run(max_steps=1, tokens_per_microbatch=60)
    leaves = run(max_steps=1, gradients="invariant")
    for key, error in {"value/loss": 1e-5, "value/grad_norm": 2e-2, "grad_norm": 2e-2, "reward": 0}.items():
        for divided in (pieces, leaves):
            assert divided.rows[0][key] == pytest.approx(whole.rows[0][key], rel=error), key
    assert whole.rows[0]["value/grad_norm"] > 0


def test_one_pass_of_the_critic_where_the_rollout_is_one_micro_batch(run):
    def passes(**changes: Any) -> int:
        count, forward = 0, Critic.forward

        def counted(self, *args):
            nonlocal count
            count += 1
            return forward(self, *args)

        with mock.patch.object(Critic, "forward", counted):
            run(max_steps=2, **changes)
        return count

    assert passes() == 2, "the step's own"
    assert passes(num_iterations=2) == 2
    assert passes(gradient_accumulation_steps=2, per_device_train_batch_size=8) == 2, "as many rows in one part"
    assert passes(tokens_per_microbatch=200) == 2 * (2 + 2), "old values, and the step's"


@both
@fp32_only_on_cpu
def test_the_critics_gradient_is_autograds(adapted, arithmetic_dir):
    """Ours, packed through the ops, against the stock model in fp32, on rows of one length, which need no padding."""
    ids = torch.randint(4, 90, (6, 14), generator=torch.Generator().manual_seed(0))
    mask, upstream = torch.ones_like(ids), torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    gradients = []
    for invariant in (True, False):
        made = new_critic(arithmetic_dir, invariant, adapted, torch.float32)
        (made(ids, mask, 9) * upstream).sum().backward()
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.requires_grad})
    for name, stock in gradients[1].items():
        error = (gradients[0][name] - stock).abs().max() / stock.abs().max()
        assert 0 <= error < 1e-4, f"{name}: {error}"


def test_the_critic_learns_what_can_be_known(run):
    """A reward that the prompt alone decides: the critic comes to explain it, and nothing of one that is a coin's."""

    def small(prompts: list[str], **_: Any) -> list[float]:
        return [float(prompt[0] < "5") for prompt in prompts]

    settings = {"learning_rate": 1e-5, "per_device_train_batch_size": 32, "num_generations": 2, "max_completion_length": 4}
    settings |= {"lr_scheduler_type": "constant", "adam_beta2": 0.95, "max_steps": 40}
    trained = run({"critic_learning_rate": 1e-3, "lam": 1.0}, reward_funcs=small, **settings)
    explained = [row["value/explained_variance"] for row in trained.rows]
    assert explained[0] == 0 and sum(explained[-5:]) / 5 > 0.8, explained
    assert trained.rows[-1]["value/loss"] < 0.1 * trained.rows[0]["value/loss"]


# ---- what PPO adds


def test_the_penalty_is_in_the_rewards_and_not_in_the_loss(run):
    """Reference and policy are one function at first: the penalty is 0 without rounding."""
    trained = run({"kl_coef": 0.5})
    assert_exact(trained, 2 * STEP)
    assert trained.rows[0]["reward/kl_penalty"] == 0.0 != trained.rows[1]["reward/kl_penalty"]
    assert not any("kl" in row for row in trained.rows), "TRL's term of the loss"
    assert trained.trainer.ref_model is not None and run().trainer.ref_model is None


def test_in_the_warm_up_the_critic_alone_learns(run, arithmetic_dir):
    assert moved(run({"value_warmup_steps": 2}), arithmetic_dir) == (False, True)
    assert moved(run({"value_warmup_steps": 2}, max_steps=3), arithmetic_dir) == (True, True)


class Versions(TrainerCallback):
    """The weights of policy and critic after each step."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.run: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.run.trainer
        self.kept.append(torch.cat([p.detach().flatten() for m in (trainer.model, trainer.critic) for p in m.parameters()]))


def test_a_rollout_is_left_where_the_policy_has_moved_too_far(new):
    versions = Versions()
    started = versions.run = new({"target_kl": 1e-7}, num_iterations=3, max_steps=6, callbacks=[versions])
    started.trainer.train()
    assert_exact(started, 2 * STEP)
    assert [row["policy/early_stopped"] for row in started.rows] == [0, 1, 1, 0, 1, 1]
    same = [bool((a == b).all()) for a, b in zip(versions.kept, versions.kept[1:], strict=False)]
    assert same == [True, True, False, True, True], "a step that is skipped moves nothing"
    kl = [row["policy/approx_kl"] for row in started.rows]
    assert kl[0] == 0 == kl[3] and kl[1] > 1e-7 and kl[2] != kl[2], "the third step computes nothing"
    free = new({"target_kl": 1e3}, num_iterations=3, max_steps=3)
    free.trainer.train()
    assert not any(row["policy/early_stopped"] for row in free.rows)


def test_drift_enters_the_ratio(arithmetic_dir, stock_engine, tmp_path):
    """Stock kernels on both sides, the first pass over a rollout: the ratio should be 1, as it is in exact mode."""
    drifting = new_trainer(arithmetic_dir, stock_engine, tmp_path, invariance="off", bf16=True, ppo=PPOConfig(kl_coef=0.1))
    drifting.trainer.train()
    for row in drifting.rows:
        assert row["policy/ratio_min"] < 1 < row["policy/ratio_max"] and row["policy/approx_kl"] > 0
        assert row["onpolicy/mismatched_tokens"] > 0
    assert drifting.rows[0]["reward/kl_penalty"] != 0, "the reference is not the function that sampled"


def configured(engine: Any, directory: Path, *settings: str) -> tuple[InvariantPPOTrainer, list[dict[str, Any]]]:
    """Return the trainer that `rlinvariant train` would make, on an engine that runs already, and where its rows will be."""
    config, rows = parse([*settings, "trainer.report_to=none", "trainer.save_strategy=no"]), []
    args, recipe = config.grpo_config(), config.load_recipe()
    args.output_dir = str(directory)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    trainer = InvariantPPOTrainer(
        AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        recipe.reward_funcs(config),
        args,
        train_dataset=recipe.datasets(config, tokenizer)[0],
        processing_class=tokenizer,
        ppo=config.ppo,
        sampler=lambda: engine,
        on_row=lambda row, _: rows.append(row),
    )
    return trainer, rows


def test_one_sample_of_each_prompt(arithmetic_dir, exact_engine, tmp_path):
    """Through the configuration: TRL's own class asks for two."""
    settings = ["per_device_train_batch_size=16", "max_completion_length=12", "num_generations=1"]
    settings = ["recipe=arithmetic_ppo", f"model={arithmetic_dir}", "steps=2", *(f"trainer.{s}" for s in settings)]
    trainer, rows = configured(exact_engine, tmp_path, *settings)
    trainer.train()
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0] and trainer.num_generations == 1
    assert len(set(trainer._logs["prompt"])) > 12, "16 prompts, but for some that are alike"


@cpu_only("two processes of one run take a GPU each; here they are joined by gloo")
@pytest.mark.slow
def test_two_processes_train_one_policy_and_one_critic(arithmetic_dir, exact_engine, tmp_path):
    """Each has rows of its own, the first one the long ones, of which it makes more parts; the step is that of one process.

    Without an average of gradients the critics would part; with other numbers of parts they would wait for each other.
    """
    here = Path(__file__).parent
    settings = [f"recipe={here / 'tiny_recipe.py'}", f"model={arithmetic_dir}", "steps=2", "run=two", "data.uneven=true"]
    settings += ["algorithm=ppo", "ppo.kl_coef=0.1", "ppo.critic_learning_rate=1e-3", "trainer.shuffle_dataset=false"]
    each = [*settings, "trainer.per_device_train_batch_size=8", "trainer.tokens_per_microbatch=130", "wandb.mode=disabled"]
    ranks = forks.run_ranks(2, [str(here / "ppo_on_ranks.py"), str(tmp_path), *each], cwd=tmp_path)
    for done in ranks:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_metrics(tmp_path / "runs/two")
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same_weights(first["critic"], second["critic"], "critics of two ranks")
    for (own, had), (others, others_had) in zip(first["parts"], second["parts"], strict=True):
        assert own > others and had == others_had == own, "blind: both ranks divide alike"
    trainer, rows_of_one = configured(exact_engine, tmp_path / "one", *settings)
    trainer.add_callback(kept := Gradients())
    trainer.train()
    alone = rows_of_one[0]
    assert rows[0]["onpolicy/compared_tokens"] == alone["onpolicy/compared_tokens"] >= STEP
    assert torch.equal(first["gradient"], second["gradient"]) and distance(first["gradient"], kept.steps[0]) < 2**-8
    for key, error in {"value/loss": 1e-5, "value/grad_norm": 2e-2, "grad_norm": 2e-2}.items():
        assert rows[0][key] == pytest.approx(alone[key], rel=error) != 0, key


# ---- checkpoints


@pytest.fixture(scope="module")
def saved(arithmetic_dir, exact_engine, tmp_path_factory):
    """Four steps, a checkpoint after the second and the last."""
    directory = tmp_path_factory.mktemp("saved")
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ppo": PPOConfig(critic_learning_rate=2e-3)}
    run = new_trainer(arithmetic_dir, exact_engine, directory, **saving)
    run.trainer.train()
    return run, directory


def test_a_resumed_run_is_the_run_that_was_not_interrupted(saved, new):
    whole, directory = saved
    rest = new({"critic_learning_rate": 2e-3}, max_steps=4)
    rest.trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert_exact(rest, 2 * STEP)
    names = [key for key in whole.rows[0] if not key.startswith((*TIMES, "onpolicy/exact_streak", "num_tokens"))]
    for a, b in zip(rest.rows, whole.rows[2:], strict=True):
        assert [repr(a[key]) for key in names] == [repr(b[key]) for key in names]
    assert_same_weights(weights(rest), weights(whole), "resumed policy")
    assert_same_weights(critic_weights(rest), critic_weights(whole), "resumed critic")


def test_a_saved_critic_is_a_plain_model_and_a_critic_to_start_from(saved, new):
    whole, directory = saved
    path = directory / "checkpoint-4" / "critic"
    model, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers.") and (path / VALUE_HEAD_FILE).is_file()
    assert_same_weights(critic_weights(new({"critic": str(path)})), critic_weights(whole), "loaded")
