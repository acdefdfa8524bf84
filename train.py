"""Train a policy: `train.py recipe=NAME key=value ...`; `--help` lists every field."""

import os
import sys

from rlinvariant.config import parse
from rlinvariant.errors import ConfigErrors, UserError


def main(argv: list[str]) -> int:
    try:
        config = parse(argv)
        from rlinvariant.run import run

        run(config)
    except UserError as error:
        # Every rank finds the same configuration errors; other errors are one rank's own.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigErrors):
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
