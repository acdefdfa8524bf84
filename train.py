"""Train a policy: `accelerate launch train.py recipe=NAME key=value ...`; `--help` shows the fields."""

import sys

from rlinvariant.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], script="train.py"))
