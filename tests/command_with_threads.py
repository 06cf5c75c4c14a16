"""The command ``dictlearn``, which names at its end the threads that are left."""

import atexit
from pathlib import Path

from dictlearn.cli import main


def say() -> None:
    print("threads at the end:", *(file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")))


def no_group_is_left(output: str, ranks: int) -> bool:
    """Whether no rank's process group outlived its end."""
    threads = [line for line in output.splitlines() if "threads at the end:" in line]
    return len(threads) == ranks and not any("gloo" in line for line in threads)


if __name__ == "__main__":
    atexit.register(say)
    main()
