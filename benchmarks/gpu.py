"""A GPU kept busy: what a run takes on one, in one table, within eight minutes and without a network.

    python benchmarks/gpu.py --data TRAIN.parquet --test TEST.parquet [--output gpu.json]

TRAIN is a Parquet file of small images, 50,000 of 32 pixels for the figures of docs/benchmarks.md, with a
column of labels and, if these are noisy, `clean_label`. TEST is one of the same classes. Needs no more than
chgval itself does. Without a CUDA device it runs on the CPU, for a trial: add --small.

Parts: tests (those marked cuda), epochs (none, online, exact, interleaved), rates (images a second by batch
size, plain, captured and compiled, and by precision), busy (share of the time that kernels run), value (a
whole run), digits (both devices), closed-form, memory (against --plan), selection. `--only PART ...` runs
some. Each part that fails is told, and the others go on; none begins after six and a half minutes. Parts
that could leave the device in a bad state have a process of their own.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[1]))

from value_parts import PARTS, run_once

from chgval.config import DataConfig, TrainConfig, TrainingConfig, ValueConfig
from chgval.data.dataset import Dataset, PixelImages
from chgval.data.open import open_dataset
from chgval.runs.choosing import Chooser, select_every
from chgval.runs.plan import measure_costs
from chgval.runs.session import Run, make_trainer, make_valuing, prepared
from chgval.runs.train import ready_for
from chgval.training import graph
from chgval.training.evaluation import evaluate
from chgval.training.loop import Trainer
from chgval.training.records import EpochRecord, PlainRecord, Record, SplitRecord
from chgval.valuation.closed_form import Factors, chg_values
from tests.cuda_checks import CHECKS
from tests.pictures import write_folder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOISE, FRACTION = 0.3, 0.3
STRATEGIES = ("chg", "gradient", "auto", "adaptive-random")
# Of a step, to time it.
NUM_REPLAYS = 50
# Rows that the bars of epochs are about.
NUM_ROWS = 50_000
# Seconds after which no part begins, and that a process may take.
LAST_BEGINNING, LONGEST = 390, 120
# An error in the first, and what the profiler leaves of the second, would spoil what follows.
ISOLATED = ("tests", "busy")


@dataclasses.dataclass
class Options:
    """What is measured, and how much of it."""

    data: str | None
    test: str | None
    small: bool
    arch: str
    selection_epochs: int

    def size(self, full: int, small: int) -> int:
        """Return how much to do."""
        return small if self.small else full


class Results:
    """Rows of the table, printed and written as they come.

    Args:
        output: JSON file, if any.
    """

    def __init__(self, output: Path | None) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self._output = output
        self._console = Console(width=110)
        self._started = time.perf_counter()

    @property
    def is_late(self) -> bool:
        """Whether nothing long should begin any more."""
        return time.perf_counter() - self._started > LAST_BEGINNING

    def add(self, part: str, what: str, found: str, bar: str = "") -> None:
        """Print a row, and keep it for the table."""
        print(f"{part:<12} {what:<48} {found}{f'   (bar {bar})' if bar else ''}", flush=True)
        self.take(part, what, found, bar)

    def take(self, *row: str) -> None:
        """Keep a row that was printed already."""
        part, what, found, bar = row
        self.rows.append((part, what, found, bar))
        if self._output is not None:
            self._output.write_text(json.dumps(self.rows, indent=1))

    def show(self) -> None:
        """Print the table."""
        table = Table("part", "what", "found", "bar")
        for row in self.rows:
            table.add_row(*row)
        self._console.print(table)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


@contextlib.contextmanager
def clean_memory() -> Iterator[None]:
    """Free what earlier parts have left, before and after."""
    for _ in range(2):
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()


def images_of(options: Options) -> Dataset:
    """Read the images that were passed, or make some."""
    if options.data is not None:
        dataset = open_dataset(DataConfig(source=options.data), 64)
        return dataset.only(dataset.usable_rows()[: options.size(len(dataset), 600)])
    rng = np.random.default_rng(0)
    count = options.size(50_000, 600)
    labels_N = rng.integers(10, size=count)
    pixels = rng.integers(0, 255, (count, 3, 32, 32), dtype=np.uint8)
    return Dataset(
        source="noise",
        ids=[str(row) for row in range(count)],
        labels_N=labels_N,
        class_names=[str(label) for label in range(10)],
        content=PixelImages(pixels),
        fingerprint="",
    )


def config_of(options: Options, **train: object) -> ValueConfig:
    return ValueConfig(
        data=DataConfig(source=options.data or "noise"),
        train=TrainConfig(arch=options.arch, device=str(DEVICE), **train),
    )


def cuda_tests(_: Options, results: Results) -> None:
    """The checks of tests/cuda_checks.py, which are the tests marked cuda."""
    if DEVICE.type != "cuda":
        results.add("tests", "marked cuda", "no CUDA device")
        return
    with tempfile.TemporaryDirectory() as folder:
        images = write_folder(Path(folder) / "images")
        for check in CHECKS:
            try:
                check(images)
                results.add("tests", check.__name__, "passed", "passes")
            except Exception as error:
                traceback.print_exc()
                results.add("tests", check.__name__, f"FAILED: {type(error).__name__}: {str(error)[:60]}")


def epoch_times(options: Options, results: Results) -> None:
    """Epochs of three runs of one recipe, in turn."""
    num_epochs = options.size(4, 1)
    dataset, modes = images_of(options), ("none", "online", "exact")
    with contextlib.ExitStack() as stack:
        runs = {}
        for mode in modes:
            config = config_of(options, epochs=num_epochs + 1)
            run = stack.enter_context(prepared(config.data, config.train, dataset))
            config = dataclasses.replace(config, mode="online" if mode == "none" else mode)
            trainer = make_trainer(run) if mode == "none" else make_valuing(run, config)[2]
            runs[mode] = noted(trainer.records(), results, "epochs")
        results.add("epochs", "recipe", described(run))
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for turn in range(num_epochs + 1):
            for mode in modes[turn % 3 :] + modes[: turn % 3]:
                spent = seconds(lambda mode=mode: next_epoch(runs[mode]))
                if turn:
                    times[mode].append(spent)
                else:
                    results.add("epochs", f"{mode}, the first one", f"{spent:.3f} s")
    bars = (f"{0.75 * len(dataset.usable_rows()) / NUM_ROWS:.2f} s", "1.03 x none", "1.45 x none")
    for mode, bar in zip(modes, bars, strict=True):
        ratio = statistics.median(a / b for a, b in zip(times[mode], times["none"], strict=True))
        median = statistics.median(times[mode])
        rate = len(dataset.usable_rows()) / median
        results.add("epochs", mode, f"{median:.3f} s  {rate:,.0f} images/s  {ratio:.3f} x none", bar)


def described(run: Run) -> str:
    recipe = run.recipe
    return f"{run.arch} on {run.device}, {run.precision}, batches of {recipe.batch_size}, lr {recipe.lr:g}"


def noted(records: Iterator[Record], results: Results, part: str) -> Iterator[Record]:
    """Yield what a training tells, and add to the results what makes its figures others than they seem."""
    for record in records:
        if isinstance(record, PlainRecord):
            results.add(part, "NOT CAPTURED", record.reason)
        if isinstance(record, SplitRecord):
            results.add(part, "OUT OF MEMORY", f"batches are shown in {record.num_parts} parts")
        yield record


def next_epoch(records: Iterator[Record]) -> None:
    for record in records:
        if isinstance(record, EpochRecord):
            return


def rates(options: Options, results: Results) -> None:
    """Images a second over some steps of each kind."""
    dataset = images_of(options)
    sizes = (128, 512, 1024) if not options.small else (16,)
    kinds: list[tuple[int, str, str]] = [
        (size, kind, "auto") for size in sizes for kind in ("plain", "graph")
    ]
    middle = sizes[len(sizes) // 2]
    precisions = ("float32", "tf32", "bfloat16") if DEVICE.type == "cuda" else ("bfloat16",)
    kinds += [(middle, "graph", precision) for precision in precisions]
    kinds += [(middle, "compiled", "auto")] if DEVICE.type == "cuda" else []
    for size, kind, precision in kinds:
        what = f"batches of {size}, {kind}" + ("" if precision == "auto" else f", {precision}")
        if results.is_late:
            results.add("rates", what, "left out: no time")
            continue
        try:
            rate = rate_of(options, results, dataset, size, kind, precision)
            results.add("rates", what, f"{rate:,.0f} images/s")
        except Exception as error:
            results.add("rates", what, f"FAILED: {type(error).__name__}: {str(error)[:60]}")


def rate_of(
    options: Options, results: Results, dataset: Dataset, size: int, kind: str, precision: str
) -> float:
    """Images a second, without the first steps, in batches of one size."""
    dataset = dataset.only(dataset.usable_rows()[: len(dataset.usable_rows()) // size * size])
    config = config_of(
        options, epochs=100, batch_size=size, precision=precision, compile_model=kind == "compiled"
    )
    wanted, first = options.size(80, 2), options.size(20, 1)
    warm_up = 10**9 if kind == "plain" else graph.WARM_UP_STEPS
    with (
        clean_memory(),
        patch.object(graph, "WARM_UP_STEPS", warm_up),
        prepared(config.data, config.train, dataset) as run,
    ):
        _, _, trainer = make_valuing(run, config)
        steps_per_epoch = run.loader.num_batches(run.loader.rows)
        started = 0.0

        def is_stopped() -> bool:
            nonlocal started
            epochs, steps = trainer.position
            steps += epochs * steps_per_epoch
            if steps == first and not started:
                synchronise()
                started = time.perf_counter()
            return steps >= first + wanted

        for _ in noted(trainer.records(is_stopped), results, "rates"):
            pass
        synchronise()
        return wanted * size / (time.perf_counter() - started)


def busy_share(options: Options, results: Results) -> None:
    """Union of the times of all kernels, against the time of an epoch, its end included."""
    if DEVICE.type != "cuda":
        results.add("busy", "kernels", "no CUDA device")
        return
    dataset = images_of(options)
    config = config_of(options, epochs=4)
    with clean_memory(), prepared(config.data, config.train, dataset) as run:
        trainer = make_valuing(run, config)[2]
        records = noted(trainer.records(), results, "busy")
        next_epoch(records)
        unprofiled = seconds(lambda: next_epoch(records))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            spent = seconds(lambda: next_epoch(records))
        num_steps = run.loader.num_batches(run.loader.rows)
        replayed = replay_seconds(trainer)
    spans: list[tuple[float, float]] = []
    by_name: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            start, end = event.time_range.start, event.time_range.end
            spans.append((start, end))
            by_name[event.name] = by_name.get(event.name, 0.0) + end - start
    busy, last = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    share, per_step = busy / 1e6 / unprofiled, len(spans) / num_steps
    found = f"{share:.1%} of an epoch of {unprofiled:.3f} s, {per_step:,.0f} kernels a step"
    results.add("busy", "kernels run", found, ">= 85 %")
    results.add("busy", "while profiled", f"{busy / 1e6 / spent:.1%} of an epoch of {spent:.3f} s")
    if replayed is not None:
        steps_share = num_steps * replayed / unprofiled
        found = f"{steps_share:.1%} of an epoch, {1e3 * replayed:.2f} ms a step"
        results.add("busy", "captured steps alone, without a profiler", found)
    total = sum(by_name.values())
    for name, duration in sorted(by_name.items(), key=lambda item: -item[1])[:8]:
        results.add("busy", name[:46], f"{duration / 1e3:.1f} ms  {duration / total:.1%}")


def replay_seconds(trainer: Trainer) -> float | None:
    """Return what one captured step takes on the device, many in a row; None where none was captured."""
    graphs = [] if trainer._captured is None else list(trainer._captured._graphs.values())
    if not graphs:
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(NUM_REPLAYS):
        graphs[0].graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / NUM_REPLAYS


def whole_value(options: Options, results: Results) -> None:
    """`chgval value` in a process of its own, and the ranking of wrong labels where these are known."""
    if options.data is None:
        results.add("value", "whole run", "pass --data")
        return
    more = ["--epochs", "1", "--arch", "resnet8"] if options.small else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "values.parquet"
        found, said = run_once(options.data, ["--device", str(DEVICE), *more], output, LONGEST)
        for line in said.splitlines():
            if "captured" in line or "out of device memory" in line:
                results.add("value", "said", line)
        for part in PARTS:
            results.add("value", part, f"{found[part]:.2f} s", "30 s" if part == "whole" else "")
        if "clean_label" in pq.read_schema(options.data).names:
            truth = pq.read_table(options.data, columns=["clean_label", "label"])
            report = pq.read_table(output, columns=["label", "noise_score"])
            wrong_N = truth["clean_label"].to_numpy() != truth["label"].to_numpy()
            score_N = np.nan_to_num(report["noise_score"].to_numpy())
            auroc = roc_auc_score(wrong_N, score_N)
            results.add("value", "AUROC of noise_score", f"{auroc:.4f}", ">= .963")
            results.add(
                "value", "estimated share of wrong labels", f"{score_N.mean():.3f} of {wrong_N.mean():.3f}"
            )


def digits(options: Options, results: Results) -> None:
    """The embedded digits where the user says nothing, and on both devices."""
    more = ["--epochs", "1"] if options.small else []
    for device in dict.fromkeys(("auto", "cpu", DEVICE.type)):
        found, _ = run_once("builtin:digits", ["--device", device, *more], timeout=LONGEST)
        bar = "8 s" if device == "auto" else ""
        results.add(
            "digits", device, f"{found['whole']:.2f} s, of which training {found['training']:.2f}", bar
        )


def closed_form(options: Options, results: Results) -> None:
    """Values against the two matrix products that they cannot do without."""
    sizes = [(50_000, 10, 512), (100_000, 100, 512), (1_000_000, 100, 512), (1_281_167, 1000, 2048)]
    sizes = [(2_000, 10, 64)] if options.small else sizes
    for num_samples, num_classes, width in sizes:
        with clean_memory():
            residuals_NC = torch.randn(num_samples, num_classes, device=DEVICE)
            features_ND = torch.randn(num_samples, width, device=DEVICE)
            total_CD = torch.randn(num_classes, width, device=DEVICE)
            times: dict[str, list[float]] = {"products": [], "values": []}
            work = {
                "products": lambda r=residuals_NC, f=features_ND, t=total_CD: (r.T @ f, f @ t.T),
                "values": lambda r=residuals_NC, f=features_ND: chg_values(Factors(r, f)),
            }
            for repetition in range(8):
                for name, function in work.items():
                    spent = seconds(function)
                    if repetition:
                        times[name].append(spent)
            products, values = (statistics.median(times[name]) for name in ("products", "values"))
            what = f"{num_samples:,} x {num_classes} x {width}"
            bar = "3 x" if num_samples >= 100_000 else ""
            ratio = f"{values / products:.2f} x"
            results.add(
                "closed-form", what, f"{1e3 * values:.2f} ms, products {1e3 * products:.2f}: {ratio}", bar
            )
            del residuals_NC, features_ND, total_CD, work


def memory(options: Options, results: Results) -> None:
    """What --plan tells of the device against what two epochs took."""
    if DEVICE.type != "cuda":
        results.add("memory", "told by --plan", "no CUDA device")
        return
    dataset, config = images_of(options), config_of(options, epochs=2)
    taken = 0
    for _ in range(
        2
    ):  # in the first, cuDNN also searches for kernels, which takes memory that --plan does not
        with clean_memory(), prepared(config.data, config.train, dataset) as run:
            for _ in noted(make_valuing(run, config)[2].records(), results, "memory"):
                pass
            taken = torch.cuda.max_memory_reserved()
        del run
    with clean_memory(), prepared(config.data, config.train, dataset) as run:
        told = measure_costs(run, config).device_bytes or 0
    results.add("memory", "told by --plan", f"{told / 2**20:,.0f} MiB")
    results.add("memory", "taken", f"{taken / 2**20:,.0f} MiB: {told / taken:.2f} x", "within 15 %")


def selection(options: Options, results: Results) -> None:
    """Strategies at fraction 0.3, with 30 % of the labels replaced; tested on clean labels."""
    if options.data is None or options.test is None:
        results.add("selection", "strategies", "pass --data and --test")
        return
    clean = images_of(options)
    column = ("clean_label",) if "clean_label" in pq.read_schema(options.data).names else ()
    if column:
        clean = open_dataset(DataConfig(source=options.data, label_columns=column), 64).only(
            clean.usable_rows()
        )
    rng = np.random.default_rng(0)
    flipped_N = rng.random(len(clean)) < NOISE
    labels_N = clean.labels_N.copy()
    labels_N[flipped_N] = (labels_N[flipped_N] + rng.integers(1, 10, flipped_N.sum())) % 10
    dataset = dataclasses.replace(clean, labels_N=np.where(clean.labels_N < 0, -1, labels_N))
    names = pq.read_schema(options.test).names
    test_column = ("clean_label",) if "clean_label" in names else ()
    tested = open_dataset(DataConfig(source=options.test, label_columns=test_column), 64)
    epochs = options.size(options.selection_epochs, 2)
    for name in STRATEGIES:
        if results.is_late:
            results.add("selection", name, "left out: no time")
            continue
        config = TrainingConfig(
            data=DataConfig(source=options.data),
            train=TrainConfig(arch=options.arch, device=str(DEVICE), epochs=epochs),
            strategy=name,
            fraction=FRACTION,
            select_every=max(1, epochs // 10),
        )
        with clean_memory(), prepared(config.data, config.train, dataset) as run:
            every = dataclasses.replace(config, select_every=select_every(config, epochs))
            chooser = Chooser(run, every)
            trainer = make_trainer(run, average=chooser.average, choose=chooser)
            records = noted(trainer.records(), results, "selection")
            spent = seconds(lambda records=records: [None for _ in records])
            test = ready_for(run, config.data, tested)
            accuracy = evaluate(run.model, test.loader, test.labels_N, run.dataset.num_classes).accuracy
            kept = chooser.subset
            wrong = float(flipped_N[kept.rows.numpy()].mean()) if kept is not None else float("nan")
        results.add("selection", name, f"{accuracy:.2%}, {wrong:.1%} wrong among the kept, {spent:.1f} s")


SECTIONS: dict[str, Callable[[Options, Results], None]] = {
    "tests": cuda_tests,
    "epochs": epoch_times,
    "busy": busy_share,
    "value": whole_value,
    "digits": digits,
    "closed-form": closed_form,
    "memory": memory,
    "selection": selection,
    "rates": rates,  # the last, as single rows of it can be left out
}


def run_apart(section: str, results: Results) -> None:
    """Run a part in a process of its own, and take its rows."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, *sys.argv, "--only", section, "--output", str(output)]
        # Graphs and the end of a profiler do not go well together.
        environment = {**os.environ, "TEARDOWN_CUPTI": "0"}
        try:
            subprocess.run(command, check=True, timeout=LONGEST, env=environment)
        finally:
            rows = json.loads(output.read_text()) if output.exists() else []
            for part, *row in rows:
                if part == section and row[0] != "took":
                    results.take(part, *row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="Parquet file of images to train on")
    parser.add_argument("--test", help="Parquet file of images to test on")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--selection-epochs", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true", help="a trial of a minute on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    options = Options(given.data, given.test, given.small, given.arch, given.selection_epochs)
    results = Results(given.output)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    results.add("machine", name, f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    for section in given.only:
        started = time.perf_counter()
        if results.is_late:
            results.add(section, "left out", "no time")
            continue
        try:
            if section in ISOLATED and len(given.only) > 1:
                run_apart(section, results)
            else:
                SECTIONS[section](options, results)
        except Exception as error:
            traceback.print_exc()
            results.add(section, "FAILED", f"{type(error).__name__}: {str(error)[:80]}")
        results.add(section, "took", f"{time.perf_counter() - started:.1f} s")
    results.show()


if __name__ == "__main__":
    main()
