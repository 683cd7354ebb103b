"""Settings of a run: frozen, checked when created. Nothing below the command line sees a flag."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from chgval.errors import SettingsError

ReportFormat = Literal["parquet", "csv", "jsonl", "arrow"]
REPORT_FORMATS: tuple[ReportFormat, ...] = ("parquet", "csv", "jsonl", "arrow")
# What a manifest can also be written as: only the names, or the numbers, of the kept rows.
Listing = Literal["paths", "indices"]
LISTINGS: tuple[Listing, ...] = ("paths", "indices")
STANDARD_STREAM = "-"
# Images of more pixels are refused: a small file can claim any number, and take the memory for it.
MAX_PIXELS = 100_000_000
# What Pillow refuses by itself, in any program.
PILLOW_MAX_PIXELS = 178_956_970
# Key of the schema metadata that a report carries, and by which a report among data is known.
METADATA_KEY = b"chgval"
# What files end in that hold the state of unfinished runs.
STATE_ENDING = ".checkpoint"
# What folders end in that hold the values of each epoch.
EPOCHS_ENDING = ".epochs"
# What is in the folder of a training from its start, and holds its state while it is unfinished.
TRAINING_FILE, TRAINING_STATE_FILE = "training.json", f"training{STATE_ENDING}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to read and how.

    Attributes:
        source: a folder, a Parquet file, glob, folder or URI, or builtin:digits.
        image_column, id_column: columns of Parquet files; None finds them by type and name.
        label_columns: the same of labels; several, or one of lists, are labels of several annotators.
        features_column: column of embeddings; the model is then fed these instead of images.
        image_size: side in pixels of the squares that the model is fed; None takes it from the images.
        mean, std: of the pixels, in [0, 1], per channel; None takes them from the images.
        on_error: whether rows that cannot be read are kept with a status, or stop the run.
        workers: processes that decode large images; None chooses.
        max_pixels: images of more are refused.
    """

    source: str = ""
    image_column: str | None = None
    label_columns: tuple[str, ...] = ()
    id_column: str | None = None
    features_column: str | None = None
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    on_error: Literal["keep", "fail"] = "keep"
    workers: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check_at_least("--image-size", self.image_size, 1)
        _check_at_least("--workers", self.workers, 0)
        if len(set(self.label_columns)) < len(self.label_columns):
            named = " ".join(self.label_columns)
            raise SettingsError(f"--label-column {named}: names a column twice; name each annotator's once.")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise SettingsError(f"--max-pixels {self.max_pixels}: must be from 1 to {PILLOW_MAX_PIXELS:,}.")
        if self.std is not None and min(self.std) <= 0:
            raise SettingsError(f"--std {self.std}: standard deviations must be above 0.")
        images_only = (self.image_column, self.image_size, self.mean, self.std)
        if self.features_column is not None and any(option is not None for option in images_only):
            raise SettingsError(
                "--features-column: embeddings take no --image-column, -size, --mean or --std."
            )

    @property
    def names_columns(self) -> bool:
        """Whether the user named a column, as only Parquet files have them."""
        columns = (self.image_column, self.id_column, self.features_column)
        return bool(self.label_columns) or any(column is not None for column in columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train. None lets the run choose from the data, the model and the device.

    Attributes:
        arch: the model's name.
        weights: file of pretrained weights.
        epochs, batch_size: passes over the data, and samples in one optimizer step.
        lr: the schedule's highest learning rate.
        momentum, weight_decay: of SGD with Nesterov momentum.
        schedule: one-cycle (linear up, cosine down) or cosine (down only).
        augment: none, crop (random shifts), or crop-flip (also mirrored).
        device: auto, cpu, cuda, cuda:N or mps.
        compile_model: whether to compile the backbone.
        seed: of all randomness in the run.
    """

    arch: str | None = None
    weights: Path | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    augment: Literal["none", "crop", "crop-flip"] | None = None
    device: str = "auto"
    compile_model: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_at_least("--epochs", self.epochs, 1)
        _check_at_least("--batch-size", self.batch_size, 2)
        _check_at_least("--seed", self.seed, 0)
        if self.seed >= 2**63:
            raise SettingsError(f"--seed {self.seed}: must be below 2**63.")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise SettingsError(f"--lr {self.lr}: the learning rate must be above 0.")
        if not 0 < self.momentum < 1:
            raise SettingsError(f"--momentum {self.momentum}: must lie between 0 and 1, both excluded.")
        if not 0 <= self.weight_decay < float("inf"):
            raise SettingsError(f"--weight-decay {self.weight_decay}: must be 0 or more.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d{0,3}))?", self.device):
            raise SettingsError(f"--device {self.device}: expected auto, cpu, cuda, cuda:N or mps.")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where the report goes.

    Attributes:
        path: a file, or "-" for standard output. Default: the name, with the ending of the format.
        name: what a file is called if the user did not say.
        report_format: None takes it from the file's ending (parquet for standard output).
        overwrite: whether an output that exists may be replaced.
        listing: what is written instead of a table, if anything.
    """

    path: str = ""
    name: str = "values"
    report_format: ReportFormat | None = None
    overwrite: bool = False
    listing: Listing | None = None

    def __post_init__(self) -> None:
        if not self.path:
            default = "txt" if self.listing else self.report_format or "parquet"
            object.__setattr__(self, "path", f"{self.name}.{default}")
        if self.path.endswith(STATE_ENDING):
            raise SettingsError(
                f"--output {self.path}: runs keep their state under such names; pass another ending."
            )
        ending = Path(self.path).suffix.removeprefix(".")
        is_told = self.listing is not None or self.report_format is not None or self.to_stdout
        if not is_told and ending not in REPORT_FORMATS:
            raise SettingsError(
                f"--output {self.path}: the ending says no format; end it in one of "
                f"{', '.join(f'.{name}' for name in REPORT_FORMATS)}, or pass --format."
            )

    @property
    def state_file(self) -> Path | None:
        """Where a run keeps its state until all is written: values.checkpoint for values.parquet."""
        return self._beside(STATE_ENDING)

    @property
    def epochs_folder(self) -> Path | None:
        """Where the values of each epoch go: values.epochs beside values.parquet."""
        return self._beside(EPOCHS_ENDING)

    def _beside(self, ending: str) -> Path | None:
        path = Path(self.path)
        return None if self.to_stdout else path.with_name(f"{path.stem}{ending}")

    @property
    def to_stdout(self) -> bool:
        """Whether the report goes to standard output."""
        return self.path == STANDARD_STREAM

    @property
    def resolved_format(self) -> ReportFormat:
        """The format of the report."""
        if self.report_format is not None:
            return self.report_format
        ending = Path(self.path).suffix.removeprefix(".")
        return next((name for name in REPORT_FORMATS if name == ending), "parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeConfig:
    """What becomes of unfinished runs.

    Attributes:
        resume: whether to go on with one.
        minutes: how often the state is kept inside an epoch; it is kept after each in any case.
    """

    resume: bool = False
    minutes: float = 10.0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise SettingsError(f"--checkpoint-minutes {self.minutes:g}: must be above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueConfig:
    """Settings of `chgval value`.

    Attributes:
        data, train, output, resume: see there.
        mode: online takes the values from the training steps, exact from a pass of its own before each epoch,
            none trains without valuing.
        utility: the game whose Shapley values are computed.
        per_class: whether every class is a coalition of its own.
        pred_probs: file of the averaged probabilities.
    """

    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    mode: Literal["online", "exact", "none"] = "online"
    utility: Literal["chg", "gradient", "hardness"] = "chg"
    per_class: bool = False
    pred_probs: Path | None = None

    def __post_init__(self) -> None:
        if self.pred_probs is not None and self.pred_probs.suffix != ".npy":
            raise SettingsError(f"--pred-probs {self.pred_probs}: is written as NumPy; end it in .npy.")
        if self.pred_probs is not None and self.mode == "none":
            raise SettingsError("--pred-probs: with --no-values there are none.")
        if self.resume.resume and self.mode == "none":
            raise SettingsError("--resume: with --no-values nothing is kept to go on with.")

    @property
    def outputs(self) -> list[Path]:
        """Files that the command writes."""
        if self.mode == "none":
            return []
        return _files(self.output, self.pred_probs)

    @property
    def state_file(self) -> Path | None:
        """Where the run keeps its state."""
        return None if self.mode == "none" else self.output.state_file


# How files of a folder get into a new one.
Link = Literal["copy", "hard", "sym"]

Rule = Literal["auto", "chg", "gmm", "confident", "aum"]
RULES: tuple[Rule, ...] = ("auto", "chg", "gmm", "confident", "aum")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """Settings of `chgval detect-noise`.

    Attributes:
        value: how to value the input, if it is a dataset; its data.source is the input in any case.
        values: where the values report is kept, if it is.
        output: where the suspects go.
        rule: what decides which samples are flagged, or the score from which on they are.
        expected_noise: share of the samples to flag, instead of a rule.
        score: whether samples are ranked by all signals of the run or by the CHG value alone.
        duplicates: whether near-duplicates with other labels are looked for; needs a dataset.
        all_rows: whether rows that are not flagged are written too.
        top: most rows to write.
        fail_over: estimated noise rate above which the command fails.
        cleaned: where the dataset is written without its flagged rows.
        relabel: probability of a suggested label from which on a flagged row is not left out of it, but gets
            that label.
        force: whether that is written even if most rows, or all of a class, are left out.
        dataset: where the dataset of a report is; None takes where it was when it was valued.
    """

    value: ValueConfig
    values: OutputConfig | None = None
    output: OutputConfig = field(default_factory=lambda: OutputConfig(name="suspects"))
    rule: Rule | float = "auto"
    expected_noise: float | None = None
    score: Literal["all", "chg"] = "all"
    duplicates: bool = False
    all_rows: bool = False
    top: int | None = None
    fail_over: float | None = None
    cleaned: Path | None = None
    relabel: float | None = None
    force: bool = False
    dataset: str | None = None

    def __post_init__(self) -> None:
        _check_at_least("--top", self.top, 1)
        for option, share in (
            ("--expected-noise", self.expected_noise),
            ("--fail-over", self.fail_over),
            ("--relabel", self.relabel),
        ):
            if share is not None and not 0 <= share <= 1:
                raise SettingsError(f"{option} {share:g}: must be a share from 0 to 1.")
        if self.relabel is not None and self.cleaned is None:
            raise SettingsError("--relabel: changes what --cleaned writes; pass that too.")
        if self.force and self.cleaned is None:
            raise SettingsError("--force: is about what --cleaned writes; pass that too.")
        if self.dataset is not None and self.cleaned is None:
            raise SettingsError(
                "--dataset: says where the dataset is that --cleaned writes anew; pass that too."
            )
        if isinstance(self.rule, float) and not 0 <= self.rule <= 1:
            raise SettingsError(f"--threshold {self.rule:g}: scores lie between 0 and 1.")
        if self.expected_noise is not None and self.rule != "auto":
            raise SettingsError("--expected-noise: sets the cut itself; leave out --threshold.")
        _check_one_stream({"--output": self.output, "--values": self.values})

    @property
    def outputs(self) -> list[Path]:
        """Files and folders that the command writes."""
        return _files(self.output, self.values, self.cleaned)

    @property
    def state_file(self) -> Path | None:
        """Where the runs behind it keep their state, if the input is a dataset."""
        return _state_file(self.values, self.output)

    @property
    def files(self) -> list[Path]:
        """Files and folders that the command reads or writes, besides the cleaned dataset."""
        return _files(self.value.data.source, self.output, self.values, _epochs_of(self.values))


# What samples can be ranked by, besides at random: figures of the values report.
RANKED_BY = (
    *("value", "value_std", "loss_mean", "margin_mean", "el2n_mean", "label_probability_mean"),
    *("forgetting_events", "predicted_probability", "noise_score", "random"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Settings of `chgval select`.

    Attributes:
        value: how to value the input, if it is a dataset; its data.source is the input in any case, and its
            train.seed that of random choices.
        values: where the values report is kept, if it is.
        output: where the manifest goes.
        end_with_null: whether names in a listing end with a NUL byte instead of a line's end.
        fraction: of all rows, which is kept.
        count: of rows that are kept.
        min_value: the figure from which on rows are kept.
        per_class: whether every class is ranked by itself and keeps its share.
        by: the figure that rows are ranked by.
        lowest: whether the lowest are kept instead of the highest.
        drop: suspects whose flagged rows are left out before.
        with_random: where a random manifest of the same class counts goes.
        weights: whether kept rows weigh by their figure (else 1).
        materialize: folder, or Parquet file, that the kept rows of the dataset are written to.
        link: how files of a folder get there; None copies.
        dataset: where the dataset of a report is; None takes where it was when it was valued.
    """

    value: ValueConfig
    values: OutputConfig | None = None
    output: OutputConfig = field(default_factory=lambda: OutputConfig(name="subset"))
    end_with_null: bool = False
    fraction: float | None = None
    count: int | None = None
    min_value: float | None = None
    per_class: bool = True
    by: str = "value"
    lowest: bool = False
    drop: str | None = None
    with_random: OutputConfig | None = None
    weights: bool = False
    materialize: Path | None = None
    link: Link | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("fraction", "count", "min_value") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(
                "how much to keep: pass --fraction (the share of all rows to keep), --count or --min-value."
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SettingsError(
                f"--fraction {self.fraction:g}: is the share of all rows that is kept, above 0 and at most 1."
            )
        _check_at_least("--count", self.count, 1)
        if self.by not in RANKED_BY:
            raise SettingsError(f"--by {self.by}: expected one of {', '.join(RANKED_BY)}.")
        if self.by == "random" and self.min_value is not None:
            raise SettingsError("--min-value: random ranks have no values; pass --fraction or --count.")
        if self.drop == STANDARD_STREAM and self.value.data.source == STANDARD_STREAM:
            raise SettingsError("--drop -: standard input is the values report already; name a file.")
        if self.end_with_null and self.output.listing is None:
            raise SettingsError("-0: ends names with NUL; pass --format paths or indices too.")
        if self.link is not None and self.materialize is None:
            raise SettingsError("--link: says how --materialize places files; pass that too.")
        if self.dataset is not None and self.materialize is None:
            raise SettingsError(
                "--dataset: says where the dataset is that --materialize writes anew; pass that too."
            )
        _check_one_stream(
            {"--output": self.output, "--values": self.values, "--with-random": self.with_random}
        )

    @property
    def outputs(self) -> list[Path]:
        """Files and folders that the command writes."""
        return _files(self.output, self.values, self.with_random, self.materialize)

    @property
    def state_file(self) -> Path | None:
        """Where the run behind it keeps its state, if the input is a dataset."""
        return _state_file(self.values, self.output)

    @property
    def files(self) -> list[Path]:
        """Files and folders that the command reads or writes, besides the pruned dataset."""
        tables = (self.output, self.values, self.with_random)
        return _files(self.value.data.source, *tables, self.drop, _epochs_of(self.values))


Strategy = Literal[
    "full", "random", "adaptive-random", "glister", "gradmatch", "chg", "hardness", "gradient", "el2n",
    "infobatch", "auto",
]  # fmt: skip
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Settings of `chgval train`.

    Attributes:
        data, train, resume: see there.
        folder: where the model and what is known of its training go.
        overwrite: whether files of an earlier training there may be replaced.
        subset: a manifest of what to train on, with its weights.
        strategy: what chooses the samples to train on, while training.
        fraction: of the samples, that is trained on in an epoch.
        select_every: epochs from one choice to the next; None chooses by their number.
        test: dataset that the model is tested on.
        holdout: share of the samples that is not trained on, but tested on (if there is no test dataset).
        test_every: epochs from one test to the next; the last epoch is tested in any case.
        target_accuracy: on the test, at which training stops.
    """

    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    folder: Path = Path("trained")
    overwrite: bool = False
    subset: str | None = None
    strategy: Strategy = "full"
    fraction: float | None = None
    select_every: int | None = None
    test: str | None = None
    holdout: float | None = None
    test_every: int = 1
    target_accuracy: float | None = None

    def __post_init__(self) -> None:
        _check_at_least("--select-every", self.select_every, 1)
        _check_at_least("--test-every", self.test_every, 1)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SettingsError(
                f"--fraction {self.fraction:g}: is the share that is trained on, above 0 and at most 1."
            )
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise SettingsError(f"--holdout {self.holdout:g}: is a share between 0 and 1, both excluded.")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise SettingsError(f"--target-accuracy {self.target_accuracy:g}: is a share, such as 0.9.")
        if self.strategy == "full" and (self.fraction, self.select_every) != (None, None):
            raise SettingsError(
                "--fraction, --select-every: full training has none; pass another --strategy."
            )
        if self.strategy != "full" and self.fraction is None:
            raise SettingsError(f"--strategy {self.strategy}: pass the --fraction to train on, such as 0.3.")
        if self.subset is not None and self.strategy != "full":
            raise SettingsError("--subset: says what to train on; leave out --fraction and --strategy.")
        if self.strategy == "glister" and self.holdout is None:
            raise SettingsError("--strategy glister: compares with held-out samples; pass --holdout 0.1.")
        if self.target_accuracy is not None and self.test is None and self.holdout is None:
            raise SettingsError("--target-accuracy: is reached on a test; pass --test or --holdout.")

    @property
    def outputs(self) -> list[Path]:
        """The folder that the command writes."""
        return [self.folder]

    @property
    def state_file(self) -> Path:
        """Where the run keeps its state."""
        return self.folder / TRAINING_STATE_FILE


def _files(*named: str | Path | OutputConfig | None) -> list[Path]:
    names = [item.path if isinstance(item, OutputConfig) else str(item or "") for item in named]
    return [Path(name) for name in names if name and name != STANDARD_STREAM and "://" not in name]


def _epochs_of(output: OutputConfig | None) -> Path | None:
    return None if output is None else output.epochs_folder


def _state_file(*outputs: OutputConfig | None) -> Path | None:
    """Return where the state is kept: beside the first of the outputs that is a file."""
    files = (output.state_file for output in outputs if output is not None)
    return next((file for file in files if file is not None), None)


def _check_one_stream(outputs: dict[str, OutputConfig | None]) -> None:
    to_stdout = [option for option, output in outputs.items() if output is not None and output.to_stdout]
    if len(to_stdout) > 1:
        raise SettingsError(
            f"{', '.join(to_stdout)}: only one output can go to standard output; name files for the others."
        )


def _check_at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise SettingsError(f"{option} {value}: must be {least} or more.")
