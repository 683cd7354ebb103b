"""Files from strangers: damaged images, pickles that run code, formulas, terminals, paths that lead away."""

import json
import subprocess
import sys

import pytest

# Damaged images that the decoder is tried on here; `pytest -m long` tries many more.
INPUTS = 3_000


def fuzz(seed, count):
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzzing", str(seed), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_damaged_images_are_decoded_or_refused():
    found = fuzz(0, INPUTS)
    assert found["decoded"] + found["refused"] == INPUTS and min(found["decoded"], found["refused"]) > 100


@pytest.mark.long
def test_a_great_many_damaged_images(capsys):
    for seed in range(1, 6):
        found = fuzz(seed, 100_000)
        with capsys.disabled():
            sys.stdout.write(f"\nseed {seed}: {found}\n")
        assert found["growth_MiB"] < 64
