"""Whether verdicts on labels hold: noise rate, calibration, flags and ranking on a grid of settings.

    pip install cleanlab
    python benchmarks/verdicts.py --images CIFAR10N.parquet --embeddings EMBEDDINGS.parquet --work FOLDER

A setting is a network, a number of rows, a number of epochs, an augmentation and a kind of noise. A third of
them is set aside: constants were chosen without looking at those. What noise scores are made of
(probabilities and last-layer inputs) is kept in FOLDER, so that `--no-train` tries another scoring on all
settings in minutes, and a run that was stopped resumes. Results go to benchmarks/results/verdicts.jsonl, a
line per setting and seed. `--cleanlab` also trains the five folds of the settings in PEERS.

The images' file holds `image`, `label` (one human annotator), `worse_label` (-1 where there is none) and
`clean_label`, the embeddings' file `embedding` and `clean_label` of the same rows; clean labels only make the
noise and measure. On 2 CPU cores all of it takes about five hours.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.data.dataset import Embeddings, PixelImages
from chgval.data.formats.digits import read_digits
from chgval.data.loader import make_loader
from chgval.detection.calibration import estimate_rate
from chgval.detection.rules.auto import automatic_cut
from chgval.detection.scores import score_labels
from chgval.runs.session import make_valuing, prepare, read_dataset
from chgval.runs.value import observe_average
from chgval.training.evaluation import predict
from chgval.training.loop import Trainer
from chgval.training.models import InputShape, build_model
from chgval.training.step import WeightAverage
from chgval.training.views import mirrored

RESULTS = Path(__file__).parent / "results" / "verdicts.jsonl"
NUM_CLASSES = 10
NUM_FOLDS = 5
# Of the noise score, where its calibration is measured.
NUM_BINS = 10
# cat <-> dog, truck <-> automobile, deer <-> horse, bird <-> airplane
PARTNERS = {3: 5, 5: 3, 9: 1, 1: 9, 4: 7, 7: 4, 2: 0, 0: 2}
NOISES = ("random1", "worse", "symmetric10", "symmetric30", "pairs", "uneven", "imbalanced", "none")
# Network, rows, epochs, augmentation, kinds of noise. Embeddings are never augmented.
GRID = (
    ("linear", 10_000, 15, "none", NOISES),
    ("linear", 10_000, 5, "none", ("random1", "symmetric30", "none")),
    ("linear", 10_000, 45, "none", ("random1", "pairs", "none")),
    ("linear", 3_000, 15, "none", ("random1", "worse", "none")),
    ("linear", 1_000, 15, "none", ("symmetric30", "none")),
    ("linear", 1_000, 45, "none", ("random1",)),
    ("mlp", 10_000, 15, "none", ("random1", "worse", "symmetric10", "pairs", "uneven", "none")),
    ("mlp", 10_000, 5, "none", ("imbalanced",)),
    ("mlp", 10_000, 45, "none", ("random1", "symmetric30")),
    ("mlp", 3_000, 15, "none", ("random1", "none")),
    ("mlp", 1_000, 45, "none", ("symmetric10", "worse")),
    ("digits", 400, 30, "default", ("symmetric30", "pairs", "none")),
    ("digits", 1_797, 30, "default", ("symmetric10", "pairs", "none")),
    ("resnet8", 1_000, 15, "none", ("worse",)),
    ("resnet8", 1_000, 45, "default", ("random1", "symmetric30", "none")),
    ("resnet8", 3_000, 15, "default", ("random1", "pairs", "none")),
    ("resnet8", 3_000, 45, "none", ("random1", "symmetric10")),
    ("resnet8", 10_000, 5, "default", ("random1", "none")),
    ("resnet8", 10_000, 15, "default", NOISES),
    ("resnet8", 10_000, 15, "none", ("random1", "symmetric30", "none")),
    ("resnet8", 10_000, 45, "default", ("random1", "worse", "symmetric30")),
    ("resnet8", 30_000, 5, "default", ("random1", "symmetric10")),
    ("resnet8", 30_000, 15, "default", ("random1", "pairs", "none")),
    ("resnet8", 30_000, 15, "none", ("random1",)),
    ("resnet20", 1_000, 45, "default", ("imbalanced",)),
    ("resnet20", 3_000, 15, "default", ("random1", "uneven")),
    ("resnet20", 3_000, 45, "default", ("worse",)),
    ("resnet20", 10_000, 5, "default", ("symmetric10", "none")),
    ("resnet20", 10_000, 15, "default", ("random1", "pairs")),
    ("resnet20", 30_000, 5, "none", ("uneven",)),
)
# Set aside in place of those in LOOKED_AT.
ADDED = (
    ("linear", 10_000, 5, "none", ("imbalanced",)),
    ("linear", 3_000, 45, "none", ("pairs",)),
    ("linear", 1_000, 15, "none", ("random1",)),
    ("mlp", 10_000, 5, "none", ("worse",)),
    ("mlp", 10_000, 45, "none", ("uneven",)),
    ("mlp", 3_000, 15, "none", ("symmetric10",)),
    ("digits", 400, 30, "default", ("symmetric10",)),
    ("digits", 1_797, 30, "default", ("symmetric30",)),
    ("resnet8", 3_000, 15, "default", ("worse",)),
    ("resnet8", 10_000, 5, "default", ("symmetric30",)),
    ("resnet20", 10_000, 5, "default", ("random1",)),
)
SETTINGS = [(*rest, noise) for *rest, noises in (*GRID, *ADDED) for noise in noises]
ADDED_SETTINGS = [(*rest, noise) for *rest, noises in ADDED for noise in noises]
# Compared with cleanlab: every network and every noise, where five trainings take minutes.
PEERS = [
    setting
    for setting in SETTINGS
    if (setting[0] in ("linear", "mlp") and setting[1:3] == (10_000, 15))
    or setting[0] == "digits"
    or setting[:3] in (("resnet8", 3_000, 15), ("resnet20", 3_000, 15))
]  # fmt: skip
# Meant to be set aside, but looked at while constants were chosen.
LOOKED_AT = (
    "linear-3000-15-none-random1", "digits-400-30-default-none", "resnet8-1000-45-default-symmetric30",
    "resnet8-3000-15-default-pairs", "resnet8-3000-45-none-symmetric10", "resnet8-10000-15-default-random1",
    "resnet8-10000-15-default-symmetric30", "resnet20-3000-15-default-random1",
)  # fmt: skip
CLEANLAB_FILTERS = ("prune_by_noise_rate", "prune_by_class")


def name_of(setting) -> str:
    return "-".join(map(str, setting))


def is_set_aside(setting) -> bool:
    is_third = SETTINGS.index(setting) % 3 == 2
    return setting in ADDED_SETTINGS or (is_third and name_of(setting) not in LOOKED_AT)


def noisy_labels(noise: str, human_N, worse_N, clean_N):
    """Return the rows to use and the label of each; the noise is always the same."""
    rng = np.random.default_rng([0, *noise.encode()])
    rows = np.arange(len(clean_N))
    if noise == "random1":
        return rows, human_N
    if noise == "worse":
        return rows, worse_N
    if noise == "imbalanced":  # classes shrink from all their images to a tenth of them, at random
        shares = 10 ** -np.linspace(0, 1, NUM_CLASSES)
        kept = [
            rng.permutation(np.flatnonzero(clean_N == label))[: round(share * (clean_N == label).sum())]
            for label, share in zip(rng.permutation(NUM_CLASSES), shares, strict=True)
        ]
        rows = np.sort(np.concatenate(kept))
    labels_N = clean_N[rows].copy()
    # uneven: every class has its own rate, from 0 to twice the mean
    rates_C = {
        "none": np.zeros(NUM_CLASSES),
        "symmetric10": np.full(NUM_CLASSES, 0.1),
        "symmetric30": np.full(NUM_CLASSES, 0.3),
        "imbalanced": np.full(NUM_CLASSES, 0.15),
        "uneven": rng.permutation(np.linspace(0, 0.3, NUM_CLASSES)),
        "pairs": np.where(
            np.isin(np.arange(NUM_CLASSES), list(PARTNERS)), 0.2 * NUM_CLASSES / len(PARTNERS), 0
        ),
    }[noise]
    flipped = np.flatnonzero(rng.random(len(rows)) < rates_C[labels_N])
    if noise == "pairs":
        labels_N[flipped] = [PARTNERS[label] for label in labels_N[flipped]]
    else:
        labels_N[flipped] = (labels_N[flipped] + rng.integers(1, NUM_CLASSES, len(flipped))) % NUM_CLASSES
    return rows, labels_N


def open_setting(setting, options):
    """Return the settings of a run, its dataset, and the true labels."""
    network, num_rows, epochs, augment, noise = setting
    train = TrainConfig(
        arch="resnet8" if network == "digits" else network,
        epochs=epochs,
        seed=options.seed,
        augment="none" if augment == "none" and network.startswith("resnet") else None,
    )
    if network == "digits":
        digits, clean_N = read_digits(), load_digits().target.astype(np.int64)
        chosen = np.sort(np.random.default_rng(num_rows).permutation(len(clean_N))[:num_rows])
        rows, labels_N = noisy_labels(noise, None, None, clean_N[chosen])
        chosen = chosen[rows]
        dataset = dataclasses.replace(
            digits,
            ids=[digits.ids[row] for row in chosen],
            labels_N=labels_N,
            content=PixelImages(np.ascontiguousarray(digits.content.pixels_N3SS[chosen])),
        )
        config = ValueConfig(data=DataConfig(source="builtin:digits"), train=train)
        return config, dataset, clean_N[chosen]
    is_embedding = network in ("linear", "mlp")
    column = "embedding" if is_embedding else "image"
    images = pq.read_table(options.images, columns=["label", "worse_label", "clean_label"]).slice(0, num_rows)
    human_N, worse_N, clean_N = (images[name].to_numpy() for name in images.column_names)
    rows, labels_N = noisy_labels(noise, human_N, worse_N, clean_N)
    path = options.work / f"{column}-{num_rows}-{noise}.parquet"
    if not path.exists():
        contents = pq.read_table(options.embeddings if is_embedding else options.images, columns=[column])
        table = pa.table({column: contents[column].take(rows), "label": labels_N})
        pq.write_table(table, path, row_group_size=1000)
    features = "embedding" if is_embedding else None
    config = ValueConfig(data=DataConfig(source=str(path), features_column=features), train=train)
    return config, read_dataset(config.data, config.train), clean_N[rows]


def train(setting, options, path: Path) -> None:
    """Value a setting, and keep what its noise scores are made of."""
    config, dataset, clean_N = open_setting(setting, options)
    started = time.perf_counter()
    run = prepare(config.data, config.train, dataset)
    accumulator, average, trainer = make_valuing(run, config)
    for _ in trainer.records():
        pass
    unseen_ND, seen_ND = observe_average(run, accumulator, average)
    signals = accumulator.run_signals()
    kept = {} if seen_ND is None else {"unseen": unseen_ND.numpy(), "seen": seen_ND.numpy()}
    np.savez(
        path,
        **kept,
        labels=dataset.labels_N,
        clean=clean_N,
        averaged=accumulator.averaged_probabilities(),
        value=signals.value_N,
        **signals.means,
        seconds=time.perf_counter() - started,
    )


def score(setting, options, path: Path) -> dict[str, object]:
    """Score what was kept of a setting, and measure."""
    kept = np.load(path)
    labels_N, clean_N = kept["labels"], kept["clean"]
    if "unseen" in kept:
        unseen, seen = torch.from_numpy(kept["unseen"]), torch.from_numpy(kept["seen"])
    else:
        unseen, seen = torch.from_numpy(open_setting(setting, options)[1].content.vectors_ND), None
    started = time.perf_counter()
    noise = score_labels(labels_N, kept["averaged"], unseen, seen)
    seconds = time.perf_counter() - started
    score_N, wrong_N = noise.noise_score_N, labels_N != clean_N
    flagged_N = score_N >= automatic_cut(score_N)
    rate = estimate_rate(score_N, noise.noise_score_std_N)
    result = {
        "setting": name_of(setting),
        "seed": options.seed,
        "set_aside": is_set_aside(setting),
        "truth": wrong_N.mean(),
        "rate": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "calibration": calibration_error(score_N, wrong_N),
        "flagged": flagged_N.mean(),
        "explained": noise.explained,
        "memorised": noise.memorised,
        "train_seconds": float(kept["seconds"]),
        "score_seconds": seconds,
    }
    if wrong_N.any():
        single = [-kept["value"], -kept["margin"], kept["el2n"], kept["loss"], -kept["label_probability"]]
        caught_N = flagged_N & wrong_N
        result |= {
            "f1": f1_of(flagged_N, wrong_N),
            "best_f1": best_f1(score_N, wrong_N),
            "auroc": roc_auc_score(wrong_N, score_N),
            "ap": average_precision_score(wrong_N, score_N),
            "best_single_auroc": max(roc_auc_score(wrong_N, signal_N) for signal_N in single),
            "best_single_ap": max(average_precision_score(wrong_N, signal_N) for signal_N in single),
            "suggested_right": (noise.suggested_label_N == clean_N)[caught_N].mean() if caught_N.any() else 0,
        }
    fold_path = path.with_suffix(".folds.npz")
    if fold_path.exists():
        result |= cleanlab_result(np.load(fold_path)["probabilities"], labels_N, clean_N, flagged_N)
    return {name: round(v, 5) if isinstance(v, float) else v for name, v in result.items()}


def fold_probabilities(config, dataset):
    """Predict every fold by a model trained on the others, by the same recipe and with averaged weights."""
    run = prepare(config.data, config.train, dataset)  # the recipe is that of the whole dataset
    labels_N, seed = dataset.labels_N, config.train.seed
    probabilities_NC = np.zeros((len(labels_N), NUM_CLASSES))

    def loader_of(rows):
        return make_loader(
            dataset.only(rows),
            batch_size=run.recipe.batch_size,
            augment=run.recipe.augment,
            device=run.device,
        )

    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(labels_N, labels_N)
    for fold, (train_rows, held_rows) in enumerate(folds):
        generator = torch.Generator().manual_seed(seed * NUM_FOLDS + fold)
        shape = InputShape(dataset.input_size, isinstance(dataset.content, Embeddings))
        model = build_model(run.arch, NUM_CLASSES, shape, generator, None)
        model.to(memory_format=torch.channels_last)
        loader, held = loader_of(train_rows), loader_of(held_rows)
        average = WeightAverage(model, run.recipe.epochs * loader.num_batches(loader.rows))
        trainer = Trainer(model, loader, run.recipe, device=run.device, generator=generator, average=average)
        for _ in trainer.records():
            pass
        views = [None, mirrored] if run.recipe.augment == "crop-flip" else [None]
        for view in views:
            rows_N, logits_NC, _ = predict(average.model, held, view=view)
            probabilities_NC[rows_N] += logits_NC.double().softmax(1).numpy() / len(views)
    return probabilities_NC


def train_folds(setting, options, path: Path) -> None:
    """Train the five folds of a setting, and keep their predictions."""
    config, dataset, _ = open_setting(setting, options)
    started = time.perf_counter()
    probabilities_NC = fold_probabilities(config, dataset)
    np.savez(path, probabilities=probabilities_NC, seconds=time.perf_counter() - started)


def cleanlab_result(probabilities_NC, labels_N, clean_N, flagged_N) -> dict[str, float]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    wrong_N = labels_N != clean_N
    flags = [find_label_issues(labels_N, probabilities_NC, filter_by=f, n_jobs=1) for f in CLEANLAB_FILTERS]
    result = {"cleanlab_flagged": min(flags_N.mean() for flags_N in flags)}
    if wrong_N.any():
        others_NC = probabilities_NC.copy()
        others_NC[np.arange(len(labels_N)), labels_N] = -1
        score_N = 1 - get_label_quality_scores(labels_N, probabilities_NC)
        caught_N = flagged_N & wrong_N
        result |= {
            "cleanlab_f1": max(f1_of(flags_N, wrong_N) for flags_N in flags),
            "cleanlab_auroc": roc_auc_score(wrong_N, score_N),
            "cleanlab_ap": average_precision_score(wrong_N, score_N),
            # Of the same labels: those that chgval flags rightly.
            "cleanlab_suggested_right": (others_NC.argmax(1) == clean_N)[caught_N].mean()
            if caught_N.any()
            else 0,
        }
    return result


def f1_of(flagged_N, wrong_N) -> float:
    return float(2 * (flagged_N & wrong_N).sum() / (flagged_N.sum() + wrong_N.sum()))


def best_f1(score_N, wrong_N) -> float:
    caught_N = wrong_N[np.argsort(-score_N, kind="stable")].cumsum()
    return float((2 * caught_N / (np.arange(1, len(score_N) + 1) + wrong_N.sum())).max())


def calibration_error(score_N, wrong_N) -> float:
    """Expected calibration error: mean distance of score and truth over equal bins of the score."""
    bin_N = (score_N * NUM_BINS).astype(int).clip(0, NUM_BINS - 1)
    return float(np.abs(np.bincount(bin_N, score_N - wrong_N, minlength=NUM_BINS)).sum() / len(score_N))


def print_summary(title: str, results: list[dict]) -> None:
    """Print in how many settings each bar is met."""
    if not results:
        return

    def column(name):
        return np.array([line.get(name, np.nan) for line in results], float)

    truth = column("truth")
    error = np.abs(column("rate") - truth)
    noisy = truth > 0
    shares = {
        "rate within 15 % (or a point)": error <= np.maximum(0.15 * truth, 0.01),
        "rate within 30 % (or a point)": error <= np.maximum(0.3 * truth, 0.01),
        "interval holds the truth": (column("low") <= truth) & (truth <= column("high")),
        "calibration error <= 0.04": column("calibration") <= 0.04,
        "calibration error <= 0.06": column("calibration") <= 0.06,
        "F1 >= 0.96 of the best": (column("f1") >= 0.96 * column("best_f1"))[noisy],
        "AUROC >= best signal - 0.003": (column("auroc") >= column("best_single_auroc") - 0.003)[noisy],
        "AP >= best signal - 0.003": (column("ap") >= column("best_single_ap") - 0.003)[noisy],
        "none wrong: flagged <= 0.5 %": (column("flagged") <= 0.005)[~noisy],
    }
    peers = np.isfinite(column("cleanlab_f1"))
    shares["F1 >= cleanlab's"] = (column("f1") >= column("cleanlab_f1"))[peers]
    shares["suggestions >= cleanlab's"] = (
        column("suggested_right") >= column("cleanlab_suggested_right")
    )[peers]  # fmt: skip
    print(f"\n{title}: {len(results)} runs")
    for name, met in shares.items():
        print(f"  {name:<32} {met.sum():>3} of {len(met):>3}  {met.mean() if len(met) else np.nan:6.1%}")


def parser_of_files(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of where the data are, and where to work."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    return parser


def main() -> None:
    parser = parser_of_files(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="settings whose names contain one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-train", action="store_true", help="score what there is")
    parser.add_argument("--set-aside", action="store_true", help="score the settings that are set aside too")
    parser.add_argument("--cleanlab", action="store_true", help="train the folds of the settings in PEERS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    results = {}
    if options.results.exists():
        lines = map(json.loads, options.results.read_text().splitlines())
        results = {(line["setting"], line["seed"]): line for line in lines}
    for setting in SETTINGS:
        name = name_of(setting)
        path = options.work / f"{name}-s{options.seed}.npz"
        if not any(part in name for part in options.only):
            continue
        if not options.no_train and not path.exists():
            train(setting, options, path)
        fold_path = path.with_suffix(".folds.npz")
        if options.cleanlab and setting in PEERS and not options.no_train and not fold_path.exists():
            train_folds(setting, options, fold_path)
        if path.exists() and (options.set_aside or not is_set_aside(setting)):
            result = results[name, options.seed] = score(setting, options, path)
            print(json.dumps(result), flush=True)
            options.results.parent.mkdir(exist_ok=True)
            options.results.write_text("".join(json.dumps(line) + "\n" for line in results.values()))
    print_summary("chosen on these", [line for line in results.values() if not line["set_aside"]])
    print_summary("set aside", [line for line in results.values() if line["set_aside"]])


if __name__ == "__main__":
    main()
