"""What containers are limited to, and what processors can, as Linux tells it."""

import pytest

from chgval.system import cpu_quota, has_amx, memory_limit


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, None, None),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu.max": "150000 100000\n", "memory.max": "1073741824\n"}, 1.5, 2**30),
        (
            {
                "cpu/cpu.cfs_quota_us": "50000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "536870912\n",
            },
            0.5,
            2**29,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
        ({"cpu.max": "\n", "memory.max": "a lot"}, None, None),
    ],
)
def test_limits_of_control_groups(tmp_path, files, cores, memory):
    """Docker's --cpus 1.5 --memory 1g, and the same of older systems."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cores and memory_limit(tmp_path) == memory


@pytest.mark.parametrize(
    ("told", "has"),
    [
        ("processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 avx512_fp16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        ("", False),
        (None, False),
    ],
    ids=["with AMX", "with AVX512", "ARM", "nothing", "no file"],
)
def test_what_a_processor_can(tmp_path, told, has):
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    assert has_amx(tmp_path / "cpuinfo") is has
