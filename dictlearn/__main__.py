"""``python -m dictlearn`` is the command ``dictlearn``: for ``torchrun -m dictlearn harvest ...``."""

from dictlearn.cli import main

main()
