"""Closed form against the two matrix products that it cannot avoid: ratio of times, and extra memory.

    python benchmarks/closed_form.py

Prints the median over interleaved repetitions. Bars: at most 2 x the time of the two products, and at most
1.25 x the factors in extra peak memory.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch

from chgval.valuation.closed_form import Factors, chg_values


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    residuals_NC = torch.randn(options.samples, options.classes, generator=generator)
    features_ND = torch.randn(options.samples, options.features, generator=generator)
    factor_bytes = 4 * (residuals_NC.numel() + features_ND.numel())
    total_CD = torch.randn(options.classes, options.features, generator=generator)

    def products() -> None:
        residuals_NC.T @ features_ND
        features_ND @ total_CD.T

    # Loads the libraries, so that their memory is not counted as the closed form's.
    chg_values(Factors(residuals_NC[:100], features_ND[:100]))
    before = peak_bytes()
    chg_values(Factors(residuals_NC, features_ND))
    extra = peak_bytes() - before
    products()
    product_times, value_times = [], []
    for _ in range(options.repetitions):
        product_times.append(seconds(products))
        value_times.append(seconds(lambda: chg_values(Factors(residuals_NC, features_ND))))

    product, value = statistics.median(product_times), statistics.median(value_times)
    print(
        f"n = {options.samples:,}, C = {options.classes}, D = {options.features}, float32, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"two products      {product:8.4f} s")
    print(f"closed form       {value:8.4f} s   {value / product:.2f} x the products (bar 2.00)")
    print(f"extra peak memory {extra / 2**20:8.1f} MiB {extra / factor_bytes:.2f} x the factors (bar 1.25)")


if __name__ == "__main__":
    main()
