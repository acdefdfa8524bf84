"""`train.py`, and the critic that each rank ends with in DIRECTORY/RANK.pt.

accelerate launch --config_file configs/cpu2.yaml ppo_on_ranks.py DIRECTORY ARGUMENTS-OF-A-RUN
"""

import os
import sys

from rlinvariant import cli


def main(directory: str, arguments: list[str]) -> int:
    import torch

    from rlinvariant.trainer import InvariantPPOTrainer

    train = InvariantPPOTrainer.train

    def recording(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        torch.save(self.critic.state_dict(), f"{directory}/{os.environ['RANK']}.pt")
        return result

    InvariantPPOTrainer.train = recording
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
