"""Train a policy: `accelerate launch train.py recipe=NAME key=value ...`; `--help` lists every field."""

import sys

from rlinvariant.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
