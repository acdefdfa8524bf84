"""Resuming after every step: inside a reused rollout, in parts, after epochs, with evaluation between, with PPO."""

from collections.abc import Sequence

from tests.reliability.campaign import Campaign
from tests.reliability.lab import Fault, Lab

SMALL_BATCH = "trainer.per_device_train_batch_size=8"
PARTS = "trainer.tokens_per_microbatch=60"
TWO_STEPS_AN_EPOCH = "data.train_size=8"
EVALUATION = ("trainer.eval_strategy=steps", "trainer.eval_steps=2")
SETTINGS = {
    "steps_per_generation=4": (SMALL_BATCH, "trainer.steps_per_generation=4", "trainer.gradient_accumulation_steps=1"),
    "num_iterations=2 x steps_per_generation=2": (
        SMALL_BATCH,
        "trainer.steps_per_generation=2",
        "trainer.num_iterations=2",
        "trainer.gradient_accumulation_steps=1",
    ),
    "parts": (PARTS,),
    "parts x num_iterations=2": (PARTS, SMALL_BATCH, "trainer.gradient_accumulation_steps=2", "trainer.num_iterations=2"),
    "epochs of two steps": (TWO_STEPS_AN_EPOCH,),
    "epochs of two steps, a rollout of two": (
        TWO_STEPS_AN_EPOCH,
        SMALL_BATCH,
        "trainer.steps_per_generation=4",
        "trainer.gradient_accumulation_steps=2",
    ),
    "evaluation": EVALUATION,
    "evaluation and epochs": (*EVALUATION, TWO_STEPS_AN_EPOCH),
    "a reference model": ("trainer.beta=0.1",),
}
PPO = ("algorithm=ppo",)
STALE = ("staleness=1",)


def resume_everywhere(
    lab: Lab, name: str, settings: Sequence[str], steps: int = 7, offsets: Sequence[int] = (), planted: Sequence[Fault] = ()
) -> Campaign:
    """Resume a run after each of its steps, or after those that `offsets` says, each with a checkpoint."""
    every = (f"steps={steps}", "trainer.save_steps=1", "trainer.save_total_limit=99", *settings)
    campaign = Campaign(lab, "".join(c if c.isalnum() else "_" for c in name), every, planted)
    for step in offsets or range(1, steps):
        campaign.rewind(step)
        campaign.resume(f"{name}, from step {step}")
    return campaign
