"""Train a policy: `accelerate launch train.py recipe=NAME key=value ...`; `--help` shows the fields."""

import sys

from rlinvariant.cli import end

if __name__ == "__main__":
    end(["train", *sys.argv[1:]], script="train.py")
