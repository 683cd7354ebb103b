"""Settings of a run: frozen, checked when created. Each field is an option of the command line.

What an option is called, what its help says and which values it takes stands at its field; the command line
is derived from it (`cli/options.py`). Nothing here may import torch, or numpy: `chgval --help` must start at
once.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from chgval.errors import SettingsError
from chgval.files import ARRAY_ENDING, EPOCHS_ENDING, STATE_ENDING, TRAINING_STATE_FILE
from chgval.registry import names_in

ReportFormat = Literal["parquet", "csv", "jsonl", "arrow"]
REPORT_FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)
# What a manifest can also be written as: only the names, or the numbers, of the kept rows.
Listing = Literal["paths", "indices"]
LISTINGS: tuple[Listing, ...] = get_args(Listing)
# How files of a folder get into a new one.
Link = Literal["copy", "hard", "sym"]
STANDARD_STREAM = "-"
# Images of more pixels are refused: a small file can claim any number, and take the memory for it.
MAX_PIXELS = 100_000_000
# What Pillow refuses by itself, in any program.
PILLOW_MAX_PIXELS = 178_956_970

# Rows of each list of samples in a summary, unless the user says otherwise.
SHOWN_SAMPLES = 5

DATA_PANEL, MODEL_PANEL, OUTPUT_PANEL = "Data", "Model and training", "Output"
VALUES_PANEL, DETECTION_PANEL, ROWS_PANEL = "Values", "Detection", "Rows"
SELECTION_PANEL, DATASET_PANEL, TEST_PANEL = "Selection", "Dataset", "Test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What the command line, and messages, need to know of a setting.

    Attributes:
        help: one sentence. "{name}" is the default name of the command's output.
        panel: under which heading of the help it stands.
        names: on the command line; empty is the field's name.
        is_argument: whether it is given without a name.
        metavar: what stands for its value in the help; None shows its type.
        least, most, above, below: bounds of its value.
        plugins: package whose plug-ins are its values.
        is_common: whether the short help shows it.
        affects_results: whether it changes what a run computes; else it may change while a run is unfinished.
    """

    help: str
    panel: str = ""
    names: tuple[str, ...] = ()
    is_argument: bool = False
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    plugins: str = ""
    affects_results: bool = True
    is_common: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it is a number from 0 to 1, which may also be given as 30%."""
        return self.most == 1 or self.below == 1

    def check(self, name: str, value: Any) -> None:
        """Raise SettingsError where a value is none of those that it may be."""
        if self.plugins and value not in names_in(self.plugins):
            raise SettingsError(f"{name} {value}: expected one of {', '.join(names_in(self.plugins))}.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        holds = {
            "{:,} or more": self.least is None or value >= self.least,
            "above {:,}": self.above is None or value > self.above,
            "at most {:,}": self.most is None or value <= self.most,
            "below {:,}": self.below is None or value < self.below,
        }
        if not all(holds.values()):  # NaN is out of all bounds
            bounds = zip(holds, (self.least, self.above, self.most, self.below), strict=True)
            wanted = " and ".join(text.format(bound) for text, bound in bounds if bound is not None)
            given = value if isinstance(value, int) else f"{value:g}"
            raise SettingsError(f"{name} {given}: must be {wanted} ({self.help.rstrip('.')}).")


def option(default: Any, help: str, panel: str = "", *names: str, **more: Any) -> Any:
    """Return the field of a setting; see Option."""
    metadata = {"option": Option(help=help, panel=panel, names=names, **more)}
    return field(default=default, metadata=metadata)


def argument(metavar: str, help: str, default: Any = "") -> Any:
    """Return the field of what a command is about: it is given without a name."""
    return option(default, help, is_argument=True, metavar=metavar, affects_results=False)


def same_option(config_class: type, name: str) -> Any:
    """Return the field of a setting that another class has too: with the same option and default."""
    found = next(setting for setting in dataclasses.fields(config_class) if setting.name == name)
    return field(default=found.default, metadata=found.metadata)


def option_of(setting: dataclasses.Field[Any]) -> Option | None:
    """Return what makes a field an option; None for groups of settings."""
    found: Option | None = setting.metadata.get("option")
    return found


def option_name(setting: dataclasses.Field[Any]) -> str:
    """Return what a setting is called on the command line, and in messages: --batch-size."""
    found = option_of(setting)
    names = found.names if found is not None else ()
    return names[0].partition("/")[0] if names else f"--{setting.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Checks the values of all its fields."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, bounds = getattr(self, setting.name), option_of(setting)
            if bounds is not None and value is not None:
                bounds.check(option_name(setting), value)


def free_settings(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings that may change while a run is unfinished, as `data.workers`."""
    for setting in dataclasses.fields(config):
        value, found = getattr(config, setting.name), option_of(setting)
        if (found is not None and not found.affects_results) or (found is None and value is None):
            yield f"{prefix}{setting.name}"
        elif dataclasses.is_dataclass(value):
            yield from free_settings(value, f"{prefix}{setting.name}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Settings):
    """What to read and how."""

    source: str = argument(
        "DATA",
        "Folder of class folders, table (Parquet, CSV, ...), glob, URI, or builtin:digits.",
    )
    split: str | None = option(
        None, "Split to read where there are several. Default: that for training.", DATA_PANEL, is_common=True
    )
    image_column: str | None = option(
        None, "Column of images, or of file names. Default: by type and name.", DATA_PANEL
    )
    label_columns: tuple[str, ...] = option(
        (),
        "Column of labels. Again for each annotator, or one of lists. Default: label, or by name.",
        DATA_PANEL,
        "--label-column",
        metavar="<str>",
        is_common=True,
    )
    id_column: str | None = option(None, "Column of ids. Default: id, paths, or row numbers.", DATA_PANEL)
    features_column: str | None = option(None, "Column of embeddings to value, not images.", DATA_PANEL)
    features: Path | None = option(
        None,
        "File of embeddings to value, a row per sample: .npy, .npz or .safetensors.",
        DATA_PANEL,
        metavar="FILE",
        is_common=True,
    )
    images_root: Path | None = option(
        None,
        "Folder that file names in a table are below. Default: that of the table.",
        DATA_PANEL,
        metavar="DIR",
        is_common=True,
    )
    image_size: int | None = option(None, "Side in pixels. Default: from the images.", DATA_PANEL, least=1)
    mean: tuple[float, float, float] | None = option(
        None, "Pixel mean in [0, 1]. Default: from the images.", DATA_PANEL, metavar="R,G,B"
    )
    std: tuple[float, float, float] | None = option(
        None, "Pixel deviation. Default: from the images.", DATA_PANEL, metavar="R,G,B"
    )
    on_error: Literal["keep", "fail"] = option(
        "keep", "Keep unreadable samples in the report, or stop.", DATA_PANEL
    )
    workers: int | None = option(
        None,
        "Processes that decode images. Default: one per core; none for a few small images.",
        DATA_PANEL,
        least=0,
        affects_results=False,
    )
    max_pixels: int = option(
        MAX_PIXELS, "Refuse images of more pixels.", DATA_PANEL, least=1, most=PILLOW_MAX_PIXELS
    )

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if len(set(self.label_columns)) < len(self.label_columns):
            named = " ".join(self.label_columns)
            raise SettingsError(f"--label-column {named}: names a column twice; name each annotator's once.")
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None and not all(0 <= number <= 1 for number in given):
                raise SettingsError(
                    f"--{name} {given}: pixels go from 0 to 1; divide numbers up to 255 by 255."
                )
        if self.std is not None and min(self.std) <= 0:
            raise SettingsError(f"--std {self.std}: standard deviations must be above 0.")
        if self.features_column is not None and self.features is not None:
            raise SettingsError("--features: is a file of embeddings; leave out --features-column.")
        images_only: dict[str, object] = {
            "--image-size": self.image_size,
            "--mean": self.mean,
            "--std": self.std,
        }
        if self.features_column is not None:
            images_only["--image-column"] = self.image_column
        wrong = next((name for name, value in images_only.items() if value is not None), None)
        if self.takes_features and wrong is not None:
            option = "--features" if self.features is not None else "--features-column"
            raise SettingsError(f"{option}: embeddings take no {wrong}; leave it out.")

    @property
    def takes_features(self) -> bool:
        """Whether embeddings are valued, not images."""
        return self.features_column is not None or self.features is not None

    @property
    def names_columns(self) -> bool:
        """Whether the user named a column, or where its files are, as only tables have them."""
        columns = (self.image_column, self.id_column, self.features_column, self.images_root)
        return bool(self.label_columns) or any(column is not None for column in columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Settings):
    """How to train. None lets the run choose from the data, the model and the device."""

    arch: str | None = option(
        None,
        "resnet8, resnet20, any torchvision classifier; linear or mlp for embeddings. Default: by image size "
        "and device.",
        MODEL_PANEL,
        is_common=True,
    )
    weights: str | None = option(
        None,
        "Pretrained weights: a file (safetensors or state dict), or what torchvision calls them, as DEFAULT.",
        MODEL_PANEL,
        metavar="FILE|NAME",
    )
    frozen: bool = option(
        False,
        "Train a linear model on what a pretrained network (--arch, --weights) makes of the images.",
        MODEL_PANEL,
    )
    epochs: int | None = option(
        None, "Passes over the data. Default: by its size.", MODEL_PANEL, least=1, is_common=True
    )
    batch_size: int | None = option(
        None, "Samples per step. Default: 128, or 512 on a GPU; fewer for small data.", MODEL_PANEL, least=2
    )
    lr: float | None = option(
        None, "Highest learning rate. Default: by the model.", MODEL_PANEL, above=0, below=float("inf")
    )
    momentum: float = option(0.9, "Nesterov momentum of SGD.", MODEL_PANEL, above=0, below=1)
    weight_decay: float = option(5e-4, "Weight decay of SGD.", MODEL_PANEL, least=0, below=float("inf"))
    schedule: Literal["one-cycle", "cosine"] = option("one-cycle", "Learning rate over the run.", MODEL_PANEL)
    augment: Literal["none", "crop", "crop-flip"] | None = option(
        None, "Random shifts and mirroring. Default: crop-flip.", MODEL_PANEL
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", MODEL_PANEL)
    threads: int | None = option(
        None,
        "CPU threads. Default: as OMP_NUM_THREADS says, or one per core; 1 for tiny samples.",
        MODEL_PANEL,
        least=1,
        affects_results=False,
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = option(
        "auto", "Numbers that the network computes in. Default: by the device and the network.", MODEL_PANEL
    )
    compile_model: bool = option(
        False, "Compile the model first, which takes a minute: for long runs.", MODEL_PANEL, "--compile"
    )
    seed: int = option(0, "Of all randomness in the run.", MODEL_PANEL, least=0, below=2**63)

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d{0,3}))?", self.device):
            raise SettingsError(f"--device {self.device}: expected auto, cpu, cuda, cuda:N or mps.")
        if self.frozen and self.augment not in (None, "none"):
            raise SettingsError("--augment: a frozen network sees each image once, as it is; leave it out.")


# What names of outputs leave out of the name of their input.
_INPUT_ENDINGS = re.compile(
    r"(\.(values|suspects|subset|merged|issues|embeddings))?\.(parquet|csv|tsv|jsonl|ndjson|json|arrow|tar|tgz|tar\.gz)$",
    re.IGNORECASE,
)


def default_name(source: str, what: str) -> str:
    """Return what an output is called by default, without ending: photos.values for the folder photos/.

    Args:
        source: what the command is about: a dataset, or a table that chgval wrote.
        what: the output holds.
    """
    if source in ("", STANDARD_STREAM):
        return what
    plain = re.split(r"[*?\[]", source.removeprefix("builtin:"), maxsplit=1)[0]
    name = Path(plain).name if plain.rstrip("/") == source.rstrip("/") or not plain.endswith("/") else ""
    name = _INPUT_ENDINGS.sub("", name).rstrip("-_. ") or Path(os.path.abspath(plain)).name  # noqa: PTH100
    return f"{name}.{what}" if name else what


OutputT = TypeVar("OutputT", bound="OutputConfig")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig(Settings):
    """Where a command's table goes."""

    # What a file is called if the user did not say.
    name: ClassVar[str] = "values"

    path: str = option(
        "",
        "File to write; - is standard output. Default: NAME.{name}.parquet, with the name of the input.",
        OUTPUT_PANEL,
        "--output",
        "-o",
        affects_results=False,
        is_common=True,
    )
    format: ReportFormat | None = option(
        None, "Default: by the ending, or parquet.", OUTPUT_PANEL, affects_results=False
    )
    overwrite: bool = option(
        False, "Replace existing files.", OUTPUT_PANEL, affects_results=False, is_common=True
    )

    def __post_init__(self) -> None:
        if not self.path:
            return  # until the input is known: see `named_after`
        if self.path.endswith(STATE_ENDING):
            raise SettingsError(
                f"--output {self.path}: runs keep their state under such names; pass another ending."
            )
        ending = Path(self.path).suffix.removeprefix(".")
        if self.format is None and not self.to_stdout and ending not in REPORT_FORMATS:
            raise SettingsError(
                f"--output {self.path}: the ending says no format; end it in one of "
                f"{', '.join(f'.{name}' for name in REPORT_FORMATS)}, or pass --format."
            )

    def named_after(self: OutputT, source: str) -> OutputT:
        """Return the output with the name that it has by default, if the user gave none."""
        if self.path:
            return self
        ending = "txt" if self.listing else self.format or "parquet"
        return dataclasses.replace(self, path=f"{default_name(source, self.name)}.{ending}")

    @property
    def listing(self) -> Listing | None:
        """What is written instead of a table, if anything."""
        return None

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
        """Whether the table goes to standard output."""
        return self.path == STANDARD_STREAM

    @property
    def target(self) -> str:
        """What people are told where the table is."""
        return "standard output" if self.to_stdout else self.path

    @property
    def resolved_format(self) -> ReportFormat:
        """The format of the table."""
        wanted = self.format or Path(self.path).suffix.removeprefix(".")
        return next((name for name in REPORT_FORMATS if name == wanted), "parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuspectsOutput(OutputConfig):
    """Where suspects go."""

    name: ClassVar[str] = "suspects"


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestOutput(OutputConfig):
    """Where a manifest goes, or a listing of what is kept."""

    name: ClassVar[str] = "subset"

    format: Literal[ReportFormat, Listing] | None = option(  # type: ignore[assignment]
        None, "Default: by the ending, or parquet.", OUTPUT_PANEL, affects_results=False
    )

    @property
    def listing(self) -> Listing | None:
        """What is written instead of a table, if anything."""
        return next((name for name in LISTINGS if name == self.format), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeConfig(Settings):
    """What becomes of unfinished runs; their state is kept after each epoch in any case."""

    resume: bool = option(
        False, "Resume an unfinished run.", OUTPUT_PANEL, affects_results=False, is_common=True
    )
    minutes: float = option(
        10.0,
        "Keep the state of a run so often inside an epoch; it is kept after each.",
        OUTPUT_PANEL,
        "--checkpoint-minutes",
        above=0,
        affects_results=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandConfig(Settings):
    """What a command reads and writes, as all that look at paths before it runs ask for it."""

    @property
    def inputs(self) -> list[str]:
        """What the command reads: the first is what it is about."""
        raise NotImplementedError

    @property
    def outputs(self) -> list[Path]:
        """Files and folders that the command writes."""
        raise NotImplementedError

    @property
    def overwrites(self) -> bool:
        """Whether outputs may be replaced."""
        raise NotImplementedError

    @property
    def state_file(self) -> Path | None:
        """Where the run keeps its state, if it can be resumed."""
        return None

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run is resumed."""
        return False

    @property
    def writes_to_stdout(self) -> bool:
        """Whether a table goes to standard output."""
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class OneTable(CommandConfig):
    """Settings of commands that write one table."""

    if TYPE_CHECKING:  # an option of each of them, whose place in the help is its own

        @property
        def output(self) -> OutputConfig | None:
            """Where the table goes; None writes none."""

    @property
    def outputs(self) -> list[Path]:
        """The table."""
        return _files(self.output)

    @property
    def overwrites(self) -> bool:
        """Whether a file may be replaced."""
        return self.output is not None and self.output.overwrite

    @property
    def writes_to_stdout(self) -> bool:
        """Whether the table goes to standard output."""
        return self.output is not None and self.output.to_stdout


REVIEW_PAGE = "Also write the page of chgval report, to look at suspicious samples."


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueConfig(CommandConfig):
    """Settings of `chgval value`. Without an output nothing is written."""

    output: OutputConfig | None = field(default_factory=OutputConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    write_probs: Path | None = option(
        None,
        "Write averaged probabilities of all classes, as .npy.",
        VALUES_PANEL,
        metavar="FILE",
        affects_results=False,
    )
    write_features: Path | None = option(
        None,
        "Write last-layer inputs of all samples, as .npy: the review page shows neighbours then.",
        VALUES_PANEL,
        metavar="FILE",
        affects_results=False,
    )
    report: Path | None = option(
        None, REVIEW_PAGE, VALUES_PANEL, metavar="FILE", affects_results=False, is_common=True
    )
    mode: Literal["online", "exact"] = option(
        "online",
        "online: from the training steps, at no cost. exact: from a pass before each epoch.",
        VALUES_PANEL,
    )
    utility: str = option(
        "chg", "The game: loss x gradient, gradient, or loss.", VALUES_PANEL, plugins="valuation.games"
    )
    per_class: bool = option(False, "Value samples within their class.", VALUES_PANEL)

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        _name_output(self, self.data.source)
        for name, path in (("probs", self.write_probs), ("features", self.write_features)):
            if path is not None and path.suffix != ARRAY_ENDING:
                raise SettingsError(f"--write-{name} {path}: is written as NumPy; end it in {ARRAY_ENDING}.")

    @property
    def inputs(self) -> list[str]:
        """The dataset."""
        return [self.data.source]

    @property
    def outputs(self) -> list[Path]:
        """Files that the command writes."""
        return _files(self.output, *self.also_written)

    @property
    def also_written(self) -> list[Path]:
        """Files that the command writes besides the report."""
        written = (self.write_probs, self.write_features, self.report)
        return [path for path in written if path is not None]

    @property
    def page(self) -> ReportConfig | None:
        """How the page is made, if it is."""
        return page_config(self.report, self.output, self.overwrites)

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run is resumed."""
        return self.resume.resume

    @property
    def writes_to_stdout(self) -> bool:
        """Whether the report goes to standard output."""
        return self.output is not None and self.output.to_stdout

    @property
    def state_file(self) -> Path | None:
        """Where the run keeps its state."""
        return None if self.output is None else self.output.state_file

    @property
    def overwrites(self) -> bool:
        """Whether outputs may be replaced."""
        return self.output is not None and self.output.overwrite


REPORT_OR_DATASET = "Values report, - for one on standard input, or a dataset, which is valued first."
KEPT_VALUES = "Values report of a dataset: read if it is there, else written."
DATASET_OF_REPORT = "Where the dataset of a report is now. Default: where it was valued."


@dataclass(frozen=True, kw_only=True, slots=True)
class FromValues(CommandConfig):
    """Settings of commands that start from values. Without an output nothing is written."""

    source: str = argument("INPUT", REPORT_OR_DATASET)
    output: OutputConfig | None = field(default_factory=OutputConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    if TYPE_CHECKING:  # an option of each of them, whose place in the help is its own

        @property
        def values(self) -> Path | None:
            """Where the values report of a dataset is kept, if it is."""

    @property
    def tables(self) -> list[OutputConfig]:
        """Tables that the command writes, besides the values report."""
        raise NotImplementedError

    @property
    def also_written(self) -> list[Path]:
        """Files that the command writes besides tables."""
        return []

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run is resumed."""
        return self.resume.resume

    @property
    def writes_to_stdout(self) -> bool:
        """Whether a table goes to standard output."""
        return any(table is not None and table.to_stdout for table in (*self.tables, self.values_output))

    @property
    def value(self) -> ValueConfig:
        """How the input is valued, if it is a dataset."""
        return ValueConfig(
            data=dataclasses.replace(self.data, source=self.source),
            train=self.train,
            resume=self.resume,
            output=self.values_output,
        )

    @property
    def values_output(self) -> OutputConfig | None:
        """Where the values report of a dataset is kept, if it is."""
        return self.second_output(self.values)

    @property
    def reads_values(self) -> bool:
        """Whether the values report of a dataset is there already, and is not to be made anew."""
        is_resumed = self.resume.resume or (self.state_file is not None and self.state_file.exists())
        anew = self.overwrites or is_resumed
        return not anew and self.values is not None and self.values.is_file()

    def check_report_is_enough(self, why: str) -> None:
        """Raise SettingsError where options are given that only matter when a dataset is valued."""
        for group in (self.data, self.train, self.resume):
            for setting in dataclasses.fields(group):
                is_own = group is self.data and setting.name == "source"
                # The seed also draws random choices; where runs keep their state does no harm.
                if is_own or setting.name in ("seed", "resume") or option_of(setting) is None:
                    continue
                if getattr(group, setting.name) != setting.default:
                    raise SettingsError(f"{option_name(setting)}: has no effect, as {why}; leave it out.")

    @property
    def state_file(self) -> Path | None:
        """Where the runs behind it keep their state, if the input is a dataset: beside the first file."""
        files = (output.state_file for output in (self.values_output, self.output) if output is not None)
        return next((file for file in files if file is not None), None)

    @property
    def overwrites(self) -> bool:
        """Whether outputs may be replaced."""
        return self.output is not None and self.output.overwrite

    def second_output(self, path: Path | None) -> OutputConfig | None:
        """Return an output beside the first one, which may be replaced as that may."""
        return None if path is None else OutputConfig(path=str(path), overwrite=self.overwrites)

    def check_needs(self, target: str, *names: str) -> None:
        """Raise SettingsError where settings are given that are about a dataset which is not written."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value is not False and getattr(self, target) is None:
                raise SettingsError(f"--{name}: is about what --{target} writes; pass that too.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig(FromValues):
    """Settings of `chgval detect-noise`."""

    output: SuspectsOutput | None = field(default_factory=SuspectsOutput)
    threshold: str = option(
        "auto",
        "What to flag: auto; samples from a noise score on; or another rule: confident (confident learning), "
        "gmm (mixture of losses), chg (two-means of values), aum (threshold samples; trains a dataset twice "
        "more).",
        DETECTION_PANEL,
        metavar="RULE|SCORE",
        is_common=True,
    )
    expected_noise: float | None = option(
        None, "Flag this share of the samples instead.", DETECTION_PANEL, least=0, most=1
    )
    score: Literal["all", "chg"] = option(
        "all", "Rank by all signals, or by the CHG value alone.", DETECTION_PANEL
    )
    duplicates: bool = option(
        False, "Also list near-duplicates with other labels; needs the images.", DETECTION_PANEL
    )
    fail_over: float | None = option(
        None,
        "Exit with 3 if more labels are estimated to be wrong.",
        DETECTION_PANEL,
        least=0,
        most=1,
        affects_results=False,
        is_common=True,
    )
    report: Path | None = option(
        None, REVIEW_PAGE, OUTPUT_PANEL, metavar="FILE", affects_results=False, is_common=True
    )
    all_rows: bool = option(False, "Write every row, not only flagged ones.", ROWS_PANEL, "--all")
    top: int | None = option(None, "Write at most so many rows.", ROWS_PANEL, least=1)
    values: Path | None = option(
        None, KEPT_VALUES, OUTPUT_PANEL, metavar="FILE", affects_results=False, is_common=True
    )
    cleaned: Path | None = option(
        None,
        "Write the dataset without the flagged rows: to a new folder, or one .parquet file.",
        DATASET_PANEL,
        metavar="DIR|FILE",
        affects_results=False,
        is_common=True,
    )
    relabel: float | None = option(
        None,
        "Keep flagged rows under suggestions this probable.",
        DATASET_PANEL,
        least=0,
        most=1,
        is_common=True,
    )
    link: Link | None = option(None, "How images of a folder get there. Default: copy.", DATASET_PANEL)
    force: bool = option(
        False,
        "Write it even if it loses over half of its rows, or a whole class.",
        DATASET_PANEL,
        affects_results=False,
    )
    dataset: str | None = option(
        None, DATASET_OF_REPORT, DATASET_PANEL, metavar="DATA", affects_results=False
    )

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        _name_output(self, self.source)
        self.check_needs("cleaned", "relabel", "link", "force")
        if self.report is None and not self.duplicates:
            self.check_needs("cleaned", "dataset")
        self.rule  # noqa: B018 (to name a mistake at once)
        if self.expected_noise is not None and self.threshold != "auto":
            raise SettingsError("--expected-noise: sets the cut itself; leave out --threshold.")
        _check_one_stream({"--output": self.output, "--values": self.values_output})

    @property
    def rule(self) -> str | float:
        """The rule that flags, or the score from which on samples are flagged."""
        rules = names_in("detection.rules")
        if self.threshold in rules:
            return self.threshold
        try:
            score = float(self.threshold)
        except ValueError as error:
            raise SettingsError(
                f"--threshold {self.threshold}: expected {', '.join(rules)}, or a score from 0 to 1."
            ) from error
        if not 0 <= score <= 1:
            raise SettingsError(f"--threshold {score:g}: scores lie between 0 and 1.")
        return score

    @property
    def outputs(self) -> list[Path]:
        """Files and folders that the command writes."""
        return _files(self.output, self.values, self.cleaned, self.report)

    @property
    def tables(self) -> list[OutputConfig]:
        """Tables that the command writes, besides the values report."""
        return [] if self.output is None else [self.output]

    @property
    def also_written(self) -> list[Path]:
        """The review page, if one is asked for."""
        return [] if self.report is None else [self.report]

    @property
    def target(self) -> Path | None:
        """Where the dataset is written anew, if it is."""
        return self.cleaned

    @property
    def inputs(self) -> list[str]:
        """The report or dataset."""
        return [self.source]

    @property
    def files(self) -> list[Path]:
        """Files and folders that the command reads or writes, besides the cleaned dataset."""
        return _files(self.source, self.output, self.values, self.report, _epochs_of(self.values_output))


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig(FromValues):
    """Settings of `chgval select`; train.seed draws random choices."""

    output: ManifestOutput | None = field(default_factory=ManifestOutput)
    fraction: float | None = option(
        None, "Share of ALL rows to keep.", SELECTION_PANEL, above=0, most=1, is_common=True
    )
    count: int | None = option(None, "Rows to keep.", SELECTION_PANEL, least=1, is_common=True)
    min_value: float | None = option(
        None, "Keep rows of at least this value (with --lowest, at most).", SELECTION_PANEL
    )
    per_class: bool = option(
        True,
        "Keep the same share of every class, or rank all rows against each other.",
        SELECTION_PANEL,
        "--per-class/--global",
    )
    by: str = option(
        "value", "Column of the report to rank by, or random.", SELECTION_PANEL, metavar="COLUMN"
    )
    lowest: bool = option(False, "Keep the lowest, not the highest.", SELECTION_PANEL)
    drop: str | None = option(
        None,
        "Leave out what detect-noise flagged: its table, or - for standard input.",
        SELECTION_PANEL,
        metavar="SUSPECTS",
        affects_results=False,
        is_common=True,
    )
    decisions: str | None = option(
        None,
        "Leave out what people decided to drop or relabel; keep what they kept in spite of --drop.",
        SELECTION_PANEL,
        metavar="FILE",
        affects_results=False,
    )
    weigh: bool = option(
        False, "Weigh kept rows from 0 (lowest) to 1 (highest), not all by 1.", SELECTION_PANEL
    )
    write_random: Path | None = option(
        None,
        "Also write a random subset with as many rows of each class.",
        SELECTION_PANEL,
        metavar="FILE",
        affects_results=False,
    )
    values: Path | None = option(
        None, KEPT_VALUES, OUTPUT_PANEL, metavar="FILE", affects_results=False, is_common=True
    )
    materialize: Path | None = option(
        None,
        "Write the kept rows as a dataset: to a new folder, or one .parquet file.",
        DATASET_PANEL,
        metavar="DIR|FILE",
        affects_results=False,
        is_common=True,
    )
    link: Link | None = option(None, "How images of a folder get there. Default: copy.", DATASET_PANEL)
    dataset: str | None = option(
        None, DATASET_OF_REPORT, DATASET_PANEL, metavar="DATA", affects_results=False
    )
    end_with_null: bool = option(
        False, "End paths or indices with NUL, as xargs -0 takes them.", SELECTION_PANEL, "-0"
    )

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        _name_output(self, self.source)
        given = [name for name in ("fraction", "count", "min_value") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(
                "how much to keep: pass --fraction (the share of all rows to keep), --count or --min-value."
            )
        if self.by == "random" and self.min_value is not None:
            raise SettingsError("--min-value: random ranks have no values; pass --fraction or --count.")
        if self.inputs.count(STANDARD_STREAM) > 1:
            raise SettingsError(f"{', '.join(self.inputs)}: only one can be standard input; name files.")
        if self.end_with_null and (self.output is None or self.output.listing is None):
            raise SettingsError("-0: ends names with NUL; pass --format paths or indices too.")
        self.check_needs("materialize", "link", "dataset")
        _check_one_stream(
            {"--output": self.output, "--values": self.values_output, "--write-random": self.random_output}
        )

    @property
    def random_output(self) -> OutputConfig | None:
        """Where the random manifest goes, if there shall be one."""
        return self.second_output(self.write_random)

    @property
    def outputs(self) -> list[Path]:
        """Files and folders that the command writes."""
        return _files(self.output, self.values, self.write_random, self.materialize)

    @property
    def tables(self) -> list[OutputConfig]:
        """Tables that the command writes, besides the values report."""
        return [output for output in (self.output, self.random_output) if output is not None]

    @property
    def target(self) -> Path | None:
        """Where the dataset is written anew, if it is."""
        return self.materialize

    @property
    def inputs(self) -> list[str]:
        """The report or dataset, and what says what is left out of it."""
        return [self.source, *(source for source in (self.drop, self.decisions) if source is not None)]

    @property
    def files(self) -> list[Path]:
        """Files and folders that the command reads or writes, besides the pruned dataset."""
        tables = (self.output, self.values, self.write_random)
        return _files(*self.inputs, *tables, _epochs_of(self.values_output))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(CommandConfig):
    """Settings of `chgval train`."""

    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    output_folder: Path | None = option(
        None,
        "Folder for the model, its settings and metrics. Default: NAME.trained, with the name of DATA.",
        OUTPUT_PANEL,
        "--output",
        "-o",
        metavar="DIR",
        affects_results=False,
        is_common=True,
    )
    overwrite: bool = option(
        False, "Replace an earlier training there.", OUTPUT_PANEL, affects_results=False, is_common=True
    )
    subset: str | None = option(
        None,
        "Train on what select kept, with its weights.",
        SELECTION_PANEL,
        metavar="SUBSET",
        affects_results=False,
        is_common=True,
    )
    decisions: str | None = option(
        None,
        "Train without what people decided to drop, and with the labels that they decided on.",
        SELECTION_PANEL,
        metavar="FILE",
        affects_results=False,
    )
    fraction: float | None = option(
        None, "Share of the samples to train on at a time.", SELECTION_PANEL, above=0, most=1, is_common=True
    )
    strategy: str | None = option(
        None,
        "What chooses them: {strategies}. Default: auto with --fraction, else full.",
        SELECTION_PANEL,
        metavar="NAME",
        is_common=True,
    )
    select_every: int | None = option(
        None, "Epochs from one choice to the next. Default: a fifteenth of all.", SELECTION_PANEL, least=1
    )
    test: str | None = option(
        None, "Dataset to test on.", TEST_PANEL, metavar="DATA", affects_results=False, is_common=True
    )
    holdout: float | None = option(
        None,
        "Share of the samples that is not trained on; it is tested on, unless --test is given.",
        TEST_PANEL,
        above=0,
        below=1,
        is_common=True,
    )
    test_every: int = option(1, "Epochs from one test to the next.", TEST_PANEL, least=1)
    target_accuracy: float | None = option(
        None, "Stop when the test reaches it.", TEST_PANEL, above=0, most=1
    )

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if self.strategy is None:
            object.__setattr__(self, "strategy", FULL if self.fraction is None else "auto")
        if self.strategy not in strategies():
            raise SettingsError(f"--strategy {self.strategy}: expected one of {', '.join(strategies())}.")
        if not self.chooses and (self.fraction, self.select_every) != (None, None):
            raise SettingsError(
                "--fraction, --select-every: full training has none; pass another --strategy."
            )
        if self.chooses and self.fraction is None:
            raise SettingsError(f"--strategy {self.strategy}: pass the --fraction to train on, such as 0.3.")
        if self.subset is not None and self.chooses:
            raise SettingsError("--subset: says what to train on; leave out --fraction and --strategy.")
        if self.target_accuracy is not None and self.test is None and self.holdout is None:
            raise SettingsError("--target-accuracy: is reached on a test; pass --test or --holdout.")

    @property
    def chooses(self) -> bool:
        """Whether a strategy chooses what is trained on."""
        return self.strategy != FULL

    @property
    def folder(self) -> Path:
        """Where the model, its settings and metrics go."""
        return self.output_folder or Path(default_name(self.data.source, "trained"))

    @property
    def inputs(self) -> list[str]:
        """The dataset, and what people decided about it."""
        return [self.data.source, *([] if self.decisions is None else [self.decisions])]

    @property
    def outputs(self) -> list[Path]:
        """The folder that the command writes."""
        return [self.folder]

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run is resumed."""
        return self.resume.resume

    @property
    def state_file(self) -> Path:
        """Where the run keeps its state."""
        return self.folder / TRAINING_STATE_FILE

    @property
    def overwrites(self) -> bool:
        """Whether an earlier training may be replaced."""
        return self.overwrite


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig(CommandConfig):
    """Settings of `chgval report`."""

    source: str = argument("VALUES", "Values report; - for one on standard input.")
    path: Path | None = option(
        None,
        "Page to write. Default: NAME.report.html, with the name of the input.",
        OUTPUT_PANEL,
        "--output",
        "-o",
        metavar="FILE",
        affects_results=False,
        is_common=True,
    )
    dataset: str | None = option(
        None, DATASET_OF_REPORT, DATASET_PANEL, metavar="DATA", affects_results=False, is_common=True
    )
    features: Path | None = option(
        None,
        "Features of all samples, to find neighbours: .npy, .npz, .safetensors. Default: those of the run.",
        DATASET_PANEL,
        metavar="FILE",
        affects_results=False,
        is_common=True,
    )
    issues: str | None = option(
        None,
        "What chgval detect-issues found, to review it too.",
        DATASET_PANEL,
        metavar="FILE",
        affects_results=False,
        is_common=True,
    )
    plots: Path | None = option(
        None,
        "Also write the figures as PNG and SVG.",
        OUTPUT_PANEL,
        metavar="DIR",
        affects_results=False,
        is_common=True,
    )
    top: int = option(1000, "Show at most so many samples to review.", ROWS_PANEL, least=1, is_common=True)
    overwrite: bool = same_option(OutputConfig, "overwrite")

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        _check_page(self.path)

    @property
    def target(self) -> Path:
        """The page."""
        return self.path or Path(f"{default_name(self.source, 'report')}.html")

    @property
    def inputs(self) -> list[str]:
        """The report, its dataset, and issues."""
        return [self.source, *(name for name in (self.dataset, self.issues) if name is not None)]

    @property
    def outputs(self) -> list[Path]:
        """The page."""
        return [self.target]

    @property
    def overwrites(self) -> bool:
        """Whether a file may be replaced."""
        return self.overwrite


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuesOutput(OutputConfig):
    """Where issues go."""

    name: ClassVar[str] = "issues"


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuesConfig(OneTable):
    """Settings of `chgval detect-issues`. Without an output nothing is written."""

    source: str = argument("VALUES", "Values report; - for one on standard input.")
    output: IssuesOutput | None = field(default_factory=IssuesOutput)
    dataset: str | None = same_option(ReportConfig, "dataset")
    features: Path | None = option(
        None,
        "Features of all samples, to find outliers: .npy, .npz, .safetensors. Default: those of the run.",
        DATASET_PANEL,
        metavar="FILE",
        affects_results=False,
        is_common=True,
    )
    against: str | None = option(
        None,
        "Test set: find samples that are also in it.",
        DATASET_PANEL,
        metavar="DATA",
        affects_results=False,
        is_common=True,
    )
    quality: bool = option(
        False,
        "Also find dark, blurry and odd images, with the cleanvision library.",
        DATASET_PANEL,
        is_common=True,
    )

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        _name_output(self, self.source)

    @property
    def inputs(self) -> list[str]:
        """The report, its dataset, and the test set."""
        return [self.source, *(data for data in (self.dataset, self.against) if data is not None)]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingsOutput(OutputConfig):
    """Where embeddings go."""

    name: ClassVar[str] = "embeddings"


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig(OneTable):
    """Settings of `chgval embed`."""

    data: DataConfig = field(default_factory=DataConfig)
    output: EmbeddingsOutput = field(default_factory=EmbeddingsOutput)
    arch: str | None = option(
        None,
        "Any torchvision classifier, or timm/NAME. Default: as the file of weights says, or resnet18.",
        MODEL_PANEL,
        is_common=True,
    )
    weights: str | None = option(
        None,
        "A file (safetensors or state dict), or what torchvision calls them. Default: DEFAULT.",
        MODEL_PANEL,
        metavar="FILE|NAME",
        is_common=True,
    )
    device: str = same_option(TrainConfig, "device")

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        _name_output(self, self.data.source)
        if self.output.resolved_format == "csv":
            raise SettingsError(
                f"--output {self.output.path}: CSV has no lists of numbers; end it in .parquet, .jsonl or "
                ".arrow."
            )

    @property
    def train(self) -> TrainConfig:
        """The network."""
        return TrainConfig(arch=self.arch, weights=self.weights, device=self.device, frozen=True)

    @property
    def inputs(self) -> list[str]:
        """The dataset."""
        return [self.data.source]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(CommandConfig):
    """Settings of `chgval compare`."""

    sources: tuple[str, ...] = argument(
        "TRAINED...", "Folders of trainings, or two values reports.", default=()
    )
    path: Path | None = option(
        None,
        "Also write a page with the table and its curves.",
        OUTPUT_PANEL,
        "--output",
        "-o",
        metavar="FILE",
        affects_results=False,
        is_common=True,
    )
    plots: Path | None = same_option(ReportConfig, "plots")
    overwrite: bool = same_option(OutputConfig, "overwrite")

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if len(self.sources) < 2:
            raise SettingsError(f"{' '.join(self.sources)}: is one; name two or more to compare.")
        _check_page(self.path)

    @property
    def inputs(self) -> list[str]:
        """What is compared."""
        return list(self.sources)

    @property
    def outputs(self) -> list[Path]:
        """The page; figures go to a folder that may hold others."""
        return _files(self.path)

    @property
    def overwrites(self) -> bool:
        """Whether files may be replaced."""
        return self.overwrite


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedOutput(OutputConfig):
    """Where a merged report goes."""

    name: ClassVar[str] = "merged"


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig(OneTable):
    """Settings of `chgval merge`. Without an output nothing is written."""

    sources: tuple[str, ...] = argument("REPORT...", "Values reports of runs on the same rows.", default=())
    output: MergedOutput | None = field(default_factory=MergedOutput)

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if len(self.sources) < 2:
            raise SettingsError(f"{' '.join(self.sources)}: is one report; name two or more to merge.")
        if len({os.path.realpath(source) for source in self.sources}) < len(self.sources):
            raise SettingsError(f"{' '.join(self.sources)}: names a report twice; name each run once.")
        _name_output(self, self.sources[0])

    @property
    def inputs(self) -> list[str]:
        """The reports."""
        return list(self.sources)


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplyConfig(CommandConfig):
    """Settings of `chgval apply`."""

    source: str = argument("DECISIONS", "Table of what was decided about samples; see below.")
    dataset: str = option(
        "", "Dataset that they are about.", DATA_PANEL, metavar="DATA", affects_results=False, is_common=True
    )
    split: str | None = same_option(DataConfig, "split")
    image_column: str | None = same_option(DataConfig, "image_column")
    label_columns: tuple[str, ...] = same_option(DataConfig, "label_columns")
    id_column: str | None = same_option(DataConfig, "id_column")
    features_column: str | None = same_option(DataConfig, "features_column")
    images_root: Path | None = same_option(DataConfig, "images_root")
    path: Path | None = option(
        None,
        "Where the corrected dataset goes: a new folder, or a file. Default: NAME.corrected.",
        OUTPUT_PANEL,
        "--output",
        "-o",
        metavar="DIR|FILE",
        affects_results=False,
        is_common=True,
    )
    labels_only: bool = option(
        False, "Write a table of ids and labels instead.", OUTPUT_PANEL, is_common=True
    )
    link: Link | None = option(
        None, "How images of a folder get there. Default: copy.", OUTPUT_PANEL, is_common=True
    )
    overwrite: bool = same_option(OutputConfig, "overwrite")

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if not self.dataset:
            raise SettingsError("--dataset: name the dataset that the decisions are about.")
        if self.labels_only:
            if self.link is not None:
                raise SettingsError("--link: no images are written with --labels-only; leave it out.")
            if self.target.suffix.removeprefix(".") not in REPORT_FORMATS:
                endings = ", ".join(f".{name}" for name in REPORT_FORMATS)
                raise SettingsError(
                    f"--output {self.path}: the labels are a table; end it in one of {endings}."
                )

    @property
    def data(self) -> DataConfig:
        """The dataset, and how to read it."""
        columns = ("split", "image_column", "label_columns", "id_column", "features_column", "images_root")
        return DataConfig(source=self.dataset, **{name: getattr(self, name) for name in columns})

    @property
    def target(self) -> Path:
        """Where the corrected dataset, or its labels, go."""
        default = "labels" if self.labels_only else "corrected"
        ending = ".csv" if self.labels_only else ""
        return self.path or Path(f"{default_name(self.dataset, default)}{ending}")

    @property
    def labels(self) -> OutputConfig:
        """The table of labels."""
        return OutputConfig(path=str(self.target), overwrite=self.overwrite)

    @property
    def kept_decisions(self) -> OutputConfig:
        """The decisions, beside what was made of them: photos.corrected.decisions.csv."""
        beside = self.target.with_name(f"{self.target.name}.decisions.csv")
        return OutputConfig(path=str(beside), overwrite=self.overwrite)

    @property
    def inputs(self) -> list[str]:
        """The decisions, and the dataset."""
        return [self.source, self.dataset]

    @property
    def outputs(self) -> list[Path]:
        """The corrected dataset or its labels, and the decisions."""
        return [self.target, Path(self.kept_decisions.path)]

    @property
    def overwrites(self) -> bool:
        """Whether files may be replaced."""
        return self.overwrite


# Training on everything: no strategy chooses.
FULL = "full"


def strategies() -> tuple[str, ...]:
    """Return the names of what can choose the samples to train on."""
    return (FULL, *names_in("training.strategies"))


def _files(*named: str | Path | OutputConfig | None) -> list[Path]:
    names = [item.path if isinstance(item, OutputConfig) else str(item or "") for item in named]
    return [Path(name) for name in names if name and name != STANDARD_STREAM and "://" not in name]


def _epochs_of(output: OutputConfig | None) -> Path | None:
    return None if output is None else output.epochs_folder


def _name_output(
    config: ValueConfig | DetectConfig | SelectConfig | MergeConfig | IssuesConfig | EmbedConfig, source: str
) -> None:
    if config.output is not None:
        object.__setattr__(config, "output", config.output.named_after(source))


def page_config(page: Path | None, values: OutputConfig | None, overwrite: bool) -> ReportConfig | None:
    """Return how the page of values is made that another command writes, if it is.

    Args:
        page: the page.
        values: where the values report is, if it is in a file: beside it lie the epochs.
        overwrite: whether a page may be replaced.
    """
    if page is None:
        return None
    source = STANDARD_STREAM if values is None else values.path
    return ReportConfig(source=source, path=page, overwrite=overwrite)


def _check_page(path: Path | None) -> None:
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"--output {path}: is a page for browsers; end it in .html.")


def _check_one_stream(outputs: dict[str, OutputConfig | None]) -> None:
    to_stdout = [name for name, output in outputs.items() if output is not None and output.to_stdout]
    if len(to_stdout) > 1:
        raise SettingsError(
            f"{', '.join(to_stdout)}: only one output can go to standard output; name files for the others."
        )
