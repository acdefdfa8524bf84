"""`train.py`, with a NaN among rank 1's log-probs in the second step; DIRECTORY/RANK.txt has how each rank ended.

accelerate launch --config_file configs/cpu2.yaml nan_on_a_rank.py DIRECTORY ARGUMENTS-OF-A-RUN
"""

import os
import sys
from pathlib import Path

from rlinvariant import cli


def main(directory: str, arguments: list[str]) -> int:
    from rlinvariant.trainer import InvariantGRPOTrainer

    generate, train, rank = InvariantGRPOTrainer._generate_single_turn, InvariantGRPOTrainer.train, os.environ["RANK"]

    def poisoned(self, *args, **kwargs):
        ids, logprobs = generate(self, *args, **kwargs)
        if rank == "1" and self.model.training and self.state.global_step == 1:
            logprobs[0][0] = float("nan")
        return ids, logprobs

    def recording(self, *args, **kwargs):
        try:
            return train(self, *args, **kwargs)
        except BaseException as error:
            Path(directory, f"{rank}.txt").write_text(str(error))
            raise

    InvariantGRPOTrainer._generate_single_turn, InvariantGRPOTrainer.train = poisoned, recording
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
