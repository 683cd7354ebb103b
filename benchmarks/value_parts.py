"""Where the time of `chgval value` goes: start-up, reading, training, scoring, in processes of their own.

    python benchmarks/value_parts.py DATA [--repetitions 3] [OPTIONS OF chgval value]

Prints the median over repetitions of each part. Start-up is from the start of the process until the command
runs; the rest is what lies between the parts: building the model, writing the report.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Seconds after which a run is given up.
TIMEOUT = 600
PARTS = ("start-up", "reading", "training", "scoring", "rest", "whole")
# Run in the new process: time what the run is made of, and print it.
CHILD = """
import json, sys, time
started = float(sys.argv[1])
seconds = {"reading": 0.0, "training": 0.0, "scoring": 0.0}

def timed(name, work):
    def run(*args, **named):
        before = time.perf_counter()
        try:
            return work(*args, **named)
        finally:
            seconds[name] += time.perf_counter() - before
    return run

from chgval.cli.commands import app
import chgval.runs.value as value
parts = {"read_dataset": "reading", "train_to_end": "training", "observe_average": "scoring",
         "make_report": "scoring"}
for function, name in parts.items():
    setattr(value, function, timed(name, getattr(value, function)))
seconds["start-up"] = time.time() - started
app(sys.argv[2:], standalone_mode=False)
seconds["whole"] = time.time() - started
print("PARTS " + json.dumps(seconds))
"""


def run_once(
    source: str, options: list[str], output: Path | None = None, timeout: float = TIMEOUT
) -> tuple[dict[str, float], str]:
    """Make one run, in a process of its own.

    Args:
        source: the dataset.
        options: of chgval value.
        output: where the report goes; None keeps none.
        timeout: seconds after which the run is given up.
    Returns:
        The seconds of each part, and what the run said.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = output or Path(folder) / "values.parquet"
        arguments = [str(time.time()), "value", source, "-o", str(output), *options]
        command = [sys.executable, "-c", CHILD, *arguments]
        # Of this checkout, if chgval is not installed.
        places = [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("PARTS ")), None)
    if line is None:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    seconds: dict[str, Any] = json.loads(line.removeprefix("PARTS "))
    seconds["rest"] = 2 * seconds["whole"] - sum(seconds.values())
    return seconds, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--repetitions", type=int, default=3)
    options, of_value = parser.parse_known_args()
    runs = [run_once(options.data, of_value)[0] for _ in range(options.repetitions)]
    print("  ".join(f"{part} {statistics.median(run[part] for run in runs):.2f} s" for part in PARTS))


if __name__ == "__main__":
    main()
