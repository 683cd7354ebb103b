"""Time of `chgval --help` against importing the two libraries that it cannot do without.

    python benchmarks/startup.py

Prints the median over interleaved repetitions. Bar: at most 2 x `python -c "import typer, rich"`.
"""

import statistics
import subprocess
import sys
import time

REPETITIONS = 15
COMMANDS = {
    "import typer, rich": [sys.executable, "-c", "import typer, rich"],
    "chgval --help": [sys.executable, "-m", "chgval", "--help"],
    "chgval value --help": [sys.executable, "-m", "chgval", "value", "--help"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repetition in range(REPETITIONS + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if repetition:  # the first fills the disk's cache
                times[name].append(time.perf_counter() - started)
    reference = statistics.median(times["import typer, rich"])
    for name, runs in times.items():
        median = statistics.median(runs)
        print(f"{name:<20} {median:.3f} s  {median / reference:.2f} x  (bar 2.00)")


if __name__ == "__main__":
    main()
