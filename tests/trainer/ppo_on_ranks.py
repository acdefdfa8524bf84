"""`train.py`, and in DIRECTORY/RANK.pt of each rank: the critic it ends with, the policy's first gradient, and how many parts
each batch would have had on this rank alone, and had.

accelerate launch --config_file configs/cpu2.yaml ppo_on_ranks.py DIRECTORY ARGUMENTS-OF-A-RUN
"""

import os
import sys

from rlinvariant import cli


def main(directory: str, arguments: list[str]) -> int:
    import torch

    from rlinvariant.trainer import InvariantPPOTrainer
    from tests.trainer.gradients import Gradients

    train, divide, parts, kept = InvariantPPOTrainer.train, InvariantPPOTrainer._parts, [], Gradients()

    def recording(self, *args, **kwargs):
        self.add_callback(kept)
        result = train(self, *args, **kwargs)
        found = {"critic": self.critic.state_dict(), "gradient": kept.steps[0], "parts": parts}
        torch.save(found, f"{directory}/{os.environ['RANK']}.pt")
        return result

    def divided(self, lengths, together=False):
        found = divide(self, lengths, together)
        if together:
            parts.append((len(divide(self, lengths)), len(found)))
        return found

    InvariantPPOTrainer.train, InvariantPPOTrainer._parts = recording, divided
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
