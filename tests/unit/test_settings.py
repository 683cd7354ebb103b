"""Names that outputs have by default, and settings that are text, or in a file."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chgval.config import DetectConfig, SelectConfig, TrainingConfig, ValueConfig, default_name
from chgval.errors import SettingsError
from chgval.settings import build, settings_in
from chgval.settings_file import read_settings


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos/", "photos.values"),
        ("data/photos", "photos.values"),
        ("train.csv", "train.values"),
        ("a.b/my.photos.JSONL", "my.photos.values"),
        ("shards-000.tar.gz", "shards-000.values"),
        ("data/train-*.parquet", "train.values"),
        ("data/*.parquet", "data.values"),
        ("s3://bucket/shards/", "shards.values"),
        ("builtin:digits", "digits.values"),
        ("-", "values"),
        ("photos.values.parquet", "photos.values"),
        ("photos.suspects.csv", "photos.values"),
        ("/", "values"),
    ],
)
def test_outputs_are_called_after_their_input(source, name):
    assert default_name(source, "values") == name


def test_a_dataset_here_gives_the_name_of_this_folder(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    for source in (".", "./", "*.parquet"):
        assert default_name(source, "values") == "photos.values"
    assert default_name("..", "values") == f"{tmp_path.name}.values"


def test_every_command_names_its_output_so():
    given = {("source",): "photos.values.parquet"}
    assert build(DetectConfig, given).output.path == "photos.suspects.parquet"
    assert build(DetectConfig, {**given, ("output", "format"): "csv"}).output.path == "photos.suspects.csv"
    listing = {**given, ("fraction",): "30%", ("output", "format"): "paths"}
    assert build(SelectConfig, listing).output.path == "photos.subset.txt"
    data = {("data", "source"): "photos/"}
    assert build(ValueConfig, data).output.path == "photos.values.parquet"
    assert str(build(TrainingConfig, data).folder) == "photos.trained"


@pytest.mark.parametrize(("text", "share"), [("30%", 0.3), (" 2.5 % ", 0.025), ("0.3", 0.3), ("100%", 1.0)])
def test_shares_may_be_percentages(text, share):
    assert build(SelectConfig, {("fraction",): text}).fraction == share


@pytest.mark.parametrize("text", ["30", "30%%", "a third", "%", "30% of all", "0%", "nan"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(SettingsError, match="--fraction"):
        build(SelectConfig, {("fraction",): text})


def test_settings_that_a_person_wrote(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'batch-size = 64\nlr = 0.1\nfraction = "30%"\nlabel_column = ["a", "b"]\noutput = "o"\nholdout = 0.1'
    )
    config = build(TrainingConfig, {**read_settings(file, TrainingConfig), ("data", "source"): "d"})
    assert (config.train.batch_size, config.train.lr, config.fraction, config.holdout) == (64, 0.1, 0.3, 0.1)
    assert config.data.label_columns == ("a", "b") and str(config.folder) == "o"
    file.write_text("epoch = 3")
    with pytest.raises(SettingsError, match="epoch: no such setting; did you mean epochs"):
        read_settings(file, TrainingConfig)
    for text in ("epochs = ", "[train]\nepochs = 3"):
        file.write_text(text)
        with pytest.raises(SettingsError, match=r"run\.toml: cannot be read|train: no such setting"):
            read_settings(file, TrainingConfig)
    with pytest.raises(SettingsError, match=r"absent\.toml: cannot be read \(.*No such file"):
        read_settings(tmp_path / "absent.toml", ValueConfig)


def test_settings_of_a_run_are_used_again_without_what_it_read_and_wrote(tmp_path):
    kept = {
        "data": {"source": "there", "label_columns": ["a"], "workers": 3, "mean": [0.1, 0.2, 0.3]},
        "train": {"epochs": 7, "seed": 3, "device": "auto", "threads": 9},
        "mode": "exact",
        "output": {"path": "there.parquet"},
    }
    (tmp_path / "training.json").write_text(json.dumps({"settings": kept}))
    metadata = {"chgval": json.dumps({"settings": kept})}
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), tmp_path / "v.parquet")
    for name in ("training.json", "v.parquet"):
        found = read_settings(tmp_path / name, ValueConfig)
        config = build(ValueConfig, {**found, ("data", "source"): "here"})
        assert (config.train.epochs, config.train.seed, config.mode) == (7, 3, "exact")
        assert config.data.label_columns == ("a",) and config.data.mean == (0.1, 0.2, 0.3)
        assert config.data.workers is None and config.train.threads is None
        assert config.output.path == "here.values.parquet"
    pq.write_table(pa.table({"a": [1]}), tmp_path / "v.parquet")
    with pytest.raises(SettingsError, match=r"--config .*v\.parquet: cannot be read"):
        read_settings(tmp_path / "v.parquet", ValueConfig)


def test_every_setting_has_a_name_of_its_own():
    for config_class in (ValueConfig, DetectConfig, SelectConfig, TrainingConfig):
        names = [setting.name for _, setting in settings_in(config_class)]
        assert len(set(names)) == len(names)
    assert os.sep not in default_name("a/b/c", "values")
