"""`python -m rlinvariant`; and the file that accelerate starts in each process of a run."""

import os
import sys

if not __package__:  # started as a file: Python would look for modules in this folder, where `config` and `models` are ours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from rlinvariant.cli import end

if __name__ == "__main__":
    end()
