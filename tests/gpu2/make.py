"""`python -m tests.gpu2.make SHAPE DIRECTORY`: a model with random weights, made once a machine, whole or not at all."""

import os
import shutil
import sys

from rlinvariant.models.shapes import build

if __name__ == "__main__":
    shape, directory = sys.argv[1:]
    if not os.path.isdir(directory):
        shutil.rmtree(f"{directory}.part", ignore_errors=True)
        build(shape, f"{directory}.part")
        os.rename(f"{directory}.part", directory)
