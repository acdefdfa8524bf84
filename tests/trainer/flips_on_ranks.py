"""`train.py`, whose trainer sees one token of each part of a rollout go to other experts.

accelerate launch --config_file configs/cpu2_fsdp2.yaml flips_on_ranks.py ARGUMENTS-OF-A-RUN
"""

import sys

from rlinvariant import cli


def main(arguments: list[str]) -> int:
    import torch

    from rlinvariant.trainer.packing import Packed

    unpacked = Packed.unpack

    def one_off(self: Packed, values: torch.Tensor) -> torch.Tensor:
        values = values + torch.eye(1, len(values), dtype=torch.int64)[0] if values.dtype == torch.int64 else values
        return unpacked(self, values)

    Packed.unpack = one_off
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
