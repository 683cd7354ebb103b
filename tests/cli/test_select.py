"""`chgval select` as a user sees it: manifests, listings, datasets, pipes and messages."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from torchvision.datasets import ImageFolder

from chgval.config import DataConfig
from chgval.data.open import open_dataset
from chgval.reports.files import with_metadata
from chgval.reports.tables import MANIFEST_SCHEMA, VALUES_SCHEMA
from tests import commands
from tests.commands import imported_by
from tests.pictures import write_folder

# Of the made-up report: 7 cats, 5 dogs, 1 cow, one row without a label and one that could not be read.
LABELS = [0, 1, 0, 1, 0, 0, -1, 1, 0, 2, 0, 1, 0, 1, 0]
VALUES = [5, 1, -2, 4, 4, 9, None, 2, 0, 3, 7, 6, -1, 8, None]
NUM_ROWS = len(LABELS)


invoke = partial(commands.invoke, "select")


def select(*arguments):
    """Run the command, which must succeed, and return its manifest."""
    output = Path(arguments[0]).with_name(f"manifest-{os.urandom(4).hex()}.parquet")
    result = invoke(*arguments, "-q", "-o", output)
    assert result.exit_code == 0, result.stderr
    return pq.read_table(output)


def kept(table):
    return table.filter(table["kept"])["index"].to_pylist()


@pytest.fixture
def report(tmp_path):
    """A report whose every figure is known."""
    names = ["cat", "dog", "cow", None]
    columns = {name: pa.nulls(NUM_ROWS, VALUES_SCHEMA.field(name).type) for name in VALUES_SCHEMA.names} | {
        "index": list(range(NUM_ROWS)),
        "id": [f"{names[label]}/{row}.png" for row, label in enumerate(LABELS)],
        "label": LABELS,
        "label_name": [names[label] for label in LABELS],
        "value": VALUES,
        "el2n_mean": [None if v is None else -v / 10 for v in VALUES],
        "num_epochs": [1] * NUM_ROWS,
        "status": ["valued"] * NUM_ROWS,
    }
    path = tmp_path / "values.parquet"
    pq.write_table(
        with_metadata(pa.table(columns, schema=VALUES_SCHEMA), {"fingerprint": "f", "root": "my photos"}),
        path,
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 40 images, valued."""
    root = write_folder(tmp_path_factory.mktemp("select") / "images")
    values = root.with_name("values.parquet")
    result = commands.invoke("value", str(root), "--epochs", "2", "-q", "-o", str(values))
    assert result.exit_code == 0, result.stderr
    return root, values


def test_a_fraction_is_of_all_rows_and_shared_out_by_class(report):
    # 0.4 of 15 rows are 6: of 7 cats, 5 dogs and 1 cow with values 3.2, 2.3 and 0.46, so 3, 2 and 1.
    manifest = select(report, "--fraction", "0.4")
    assert manifest.schema.names == MANIFEST_SCHEMA.names and manifest["index"].to_pylist() == list(range(15))
    assert kept(manifest) == [0, 5, 9, 10, 11, 13]
    ranks = dict(zip(manifest["index"].to_pylist(), manifest["rank"].to_pylist(), strict=True))
    assert [ranks[row] for row in (5, 10, 0, 4, 13, 9, 6, 14)] == [1, 2, 3, 4, 1, 1, None, None]
    assert set(manifest.filter(manifest["kept"])["weight"].to_pylist()) == {1.0}
    metadata = json.loads(manifest.schema.metadata[b"chgval"])
    assert metadata["fingerprint"] == "f" and metadata["selection"]["fraction"] == 0.4


def test_counts_limits_and_other_figures(report):
    assert kept(select(report, "--count", "4", "--global")) == [5, 10, 11, 13]
    assert kept(select(report, "--count", "2", "--global", "--lowest")) == [2, 12]
    assert kept(select(report, "--min-value", "6")) == [5, 10, 11, 13]
    assert kept(select(report, "--min-value", "0", "--lowest")) == [2, 8, 12]
    assert kept(select(report, "--count", "2", "--global", "--by", "el2n_mean")) == [2, 12]
    everything = [row for row in range(15) if VALUES[row] is not None]
    assert kept(select(report, "--fraction", "1")) == everything


def test_equal_figures_are_kept_by_index(report):
    assert kept(select(report, "--count", "6", "--global")) == [0, 3, 5, 10, 11, 13]


def test_weights_are_the_scaled_values_of_the_kept(report):
    manifest = select(report, "--count", "5", "--global", "--weigh")
    chosen = manifest.filter(manifest["kept"])
    np.testing.assert_allclose(chosen["weight"].to_numpy(), (np.array([5, 9, 7, 6, 8]) - 5) / 4)
    assert manifest["weight"].null_count == 10


def test_random_ranks_depend_on_the_seed_alone_and_keep_the_labelled(report):
    a, b, c = (kept(select(report, "--count", "7", "--by", "random", "--seed", s)) for s in (1, 1, 2))
    assert a == b != c and len(a) == 7 and 6 not in a + c


def test_flagged_rows_are_dropped_before(report, tmp_path):
    suspects = tmp_path / "suspects.csv"
    ids = pq.read_table(report)["id"].to_pylist()
    pacsv.write_csv(
        pa.table({"index": [5, 13, 3], "id": [ids[5], ids[13], ids[3]], "flagged": [True, True, False]}),
        suspects,
    )
    assert kept(select(report, "--count", "4", "--global", "--drop", suspects)) == [0, 3, 10, 11]
    result = invoke(report, "--fraction", "0.9", "--drop", suspects, "-o", tmp_path / "m.parquet")
    assert "14 rows were asked for, but only 11 are labelled, readable and not dropped" in result.stderr
    pacsv.write_csv(pa.table({"index": [5], "id": ["other.png"], "flagged": [True]}), suspects)
    result = invoke(report, "--count", "4", "--drop", suspects, "-o", tmp_path / "n.parquet")
    assert result.exit_code == 1 and "'other.png' has another number in the report" in result.stderr


def test_the_random_manifest_has_the_same_class_counts(report, tmp_path):
    random = tmp_path / "random.parquet"
    manifest = select(report, "--fraction", "0.4", "--write-random", random)
    counts = [
        np.bincount(table.filter(table["kept"])["label"].to_numpy(), minlength=3).tolist()
        for table in (manifest, pq.read_table(random))
    ]
    assert counts[0] == counts[1] == [3, 2, 1] and kept(pq.read_table(random)) != kept(manifest)


def test_a_class_that_vanishes_is_told(report, tmp_path):
    result = invoke(report, "--fraction", "0.2", "-o", tmp_path / "m.parquet")
    assert "warning: nothing is kept of cow" in result.stderr and "3 of 15 rows kept" in result.stderr
    result = invoke(report, "--fraction", "0.4", "-o", tmp_path / "n.parquet")
    assert "warning" not in result.stderr


@pytest.mark.parametrize(
    ("form", "flags", "expected"),
    [
        ("paths", [], "my photos/cat/5.png\nmy photos/dog/13.png\n"),
        ("paths", ["-0"], "my photos/cat/5.png\0my photos/dog/13.png\0"),
        ("indices", [], "5\n13\n"),
        ("csv", [], None),
        ("jsonl", [], None),
    ],
)
def test_standard_output_carries_the_listing_and_nothing_else(report, form, flags, expected):
    result = invoke(report, "--count", "2", "--format", form, "-o", "-", *flags)
    assert result.exit_code == 0, result.stderr
    if expected is None:
        assert len(result.stdout.splitlines()) == 15 + (form == "csv")
    else:
        assert result.stdout == expected


def test_a_listing_has_a_default_name(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(report, "--count", "1", "--format", "indices", "-q").exit_code == 0
    assert (tmp_path / f"{report.stem}.subset.txt").read_text() == "5\n"


def in_shell(pipeline, folder):
    """Run a pipeline of our own, in which CHGVAL stands for the command, as a shell would."""
    script = "set -o pipefail; " + pipeline.replace("CHGVAL", f"{sys.executable} -m chgval")
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_pipelines_of_the_readme(folder, tmp_path):
    root, values = folder
    listed = in_shell(
        f"CHGVAL value {root.name} --epochs 2 -q -o - "
        "| CHGVAL select - --fraction 0.3 --format paths -0 -o - -q | xargs -0 ls -1",
        root.parent,
    )
    names = listed.stdout.split()
    assert listed.returncode == 0 and len(names) == 12
    assert all((root.parent / name).is_file() for name in names)

    dropped = in_shell(
        "CHGVAL detect-noise values.parquet --expected-noise 0.2 -q -o - "
        f"| CHGVAL select values.parquet --drop - --fraction 0.5 -q -o {tmp_path}/m.parquet",
        root.parent,
    )
    assert dropped.returncode == 0, dropped.stderr
    flags = ["--expected-noise", "0.2", "-q", "-o", str(tmp_path / "s.parquet")]
    commands.invoke("detect-noise", str(values), *flags)
    chosen = kept(pq.read_table(tmp_path / "m.parquet"))
    assert len(chosen) == 20
    assert not set(chosen) & set(pq.read_table(tmp_path / "s.parquet")["index"].to_pylist())


def test_a_reader_that_stops_early_is_no_error(folder):
    root, _ = folder
    result = in_shell("CHGVAL select values.parquet --fraction 1 --format paths -o - | head -1", root.parent)
    assert result.returncode == 0 and "Traceback" not in result.stderr


@pytest.mark.parametrize("link", ["copy", "hard", "sym"])
def test_a_pruned_folder_is_read_back(folder, tmp_path, link):
    root, values = folder
    manifest = select(values, "--fraction", "0.25", "--materialize", tmp_path / "new", "--link", link)
    images = ImageFolder(tmp_path / "new")
    ids = [str(Path(path).relative_to(tmp_path / "new")) for path, _ in images.samples]
    assert ids == manifest.filter(manifest["kept"])["id"].to_pylist() and len(ids) == 10
    first = tmp_path / "new" / ids[0]
    assert first.read_bytes() == (root / ids[0]).read_bytes()
    assert first.is_symlink() == (link == "sym")
    assert first.samefile(root / ids[0]) == (link != "copy")


def test_pruned_parquet_is_read_back_by_hugging_face_and_by_chgval(folder, tmp_path):
    root, _ = folder
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = [
        {"image": {"bytes": Path(path).read_bytes(), "path": Path(path).name}, "label": label}
        for path, label in ImageFolder(root).samples
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    output = tmp_path / "subset.parquet"
    result = invoke(
        tmp_path / "data.parquet", "--fraction", "0.3", "--epochs", "2", "-q", "-o", output,
        "--values", tmp_path / "values.parquet", "--materialize", tmp_path / "new",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    chosen = kept(pq.read_table(output))
    again = datasets.load_dataset("parquet", data_dir=str(tmp_path / "new"), split="train")
    assert again.features == features and len(again) == 12
    assert [image["path"] for image in again.cast_column("image", datasets.Image(decode=False))["image"]] == [
        rows[row]["image"]["path"] for row in chosen
    ]
    assert open_dataset(DataConfig(source=str(tmp_path / "new")), 12).class_names == ["cat", "dog"]


def test_shares_are_of_the_whole_report_in_any_order(report, tmp_path):
    """Suspects are a part of the rows unless all were asked for, and come worst first."""
    whole = pq.read_table(report)
    pq.write_table(whole.take(np.random.default_rng(0).permutation(NUM_ROWS)), report)
    manifest = select(report, "--fraction", "0.4")
    assert manifest["index"].to_pylist() == list(range(NUM_ROWS))
    assert manifest["id"].equals(whole["id"]) and sum(manifest["kept"].to_pylist()) == 6
    pq.write_table(whole.slice(9), report)
    result = invoke(report, "--fraction", "0.4", "-o", tmp_path / "m.parquet")
    assert result.exit_code == 1 and "is not the whole report (its 6 rows" in result.stderr, result.stderr
    arguments = ["select", "-", "--fraction", "0.4", "-o", str(tmp_path / "m.parquet")]
    piped = commands.invoke(*arguments, input=report.read_bytes())
    assert piped.exit_code == 1 and "error: standard input: is not the whole" in piped.stderr, piped.stderr


def test_a_report_is_read_without_torch(report, tmp_path):
    loaded = imported_by(["select", str(report), "--count", "2", "-q", "-o", str(tmp_path / "s.csv")])
    assert "numpy" in loaded and not {"torch", "torchvision", "sklearn", "scipy", "PIL"} & loaded


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "how much to keep: pass --fraction"),
        (["--fraction", "0.3", "--count", "4"], 2, "how much to keep: pass --fraction"),
        (["--fraction", "30"], 2, "--fraction 30: must be above 0 and at most 1 (Share of ALL"),
        (["--count", "3", "--by", "size"], 2, "--by size: expected one of value, value_std"),
        (["--count", "3", "-0"], 2, "-0: ends names with NUL; pass --format paths or indices"),
        (["--count", "3", "--link", "hard"], 2, "--link: is about what --materialize writes"),
        (["--min-value", "1", "--by", "random"], 2, "random ranks have no values"),
        (["--min-value", "100"], 1, "no row can be kept"),
        (["--count", "3", "--materialize", "new"], 1, "does not say which dataset it is about"),
        (["--count", "3", "--drop", "missing.csv"], 1, "missing.csv: no such file"),
        (["--count", "3", "--by", "loss_mean"], 1, "no row can be kept"),
    ],
)
def test_mistakes_are_told_in_one_line(report, tmp_path, arguments, code, message):
    result = invoke(report, "-o", tmp_path / "m.csv", *arguments)
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "m.csv").exists()


def test_suspects_of_another_dataset_are_refused(report, folder, tmp_path):
    _, values = folder
    commands.invoke("detect-noise", str(values), "--all", "-q", "-o", str(tmp_path / "s.parquet"))
    result = invoke(report, "--count", "3", "--drop", tmp_path / "s.parquet", "-o", tmp_path / "m.parquet")
    assert result.exit_code == 1 and "these suspects are of another dataset" in result.stderr


def test_a_folder_of_links_is_pruned_and_cleaned_with_links(tmp_path):
    """As the caches of data tools lay files out; from a report as from the dataset."""
    blobs, root, report = tmp_path / "blobs", tmp_path / "images", tmp_path / "v.parquet"
    write_folder(root, 6)
    blobs.mkdir()
    for number, file in enumerate(sorted(root.glob("*/*.png"))):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert commands.invoke("value", root, "--epochs", 1, "-q", "-o", report).exit_code == 0
    args = ["--fraction", 0.5, "-q", "-o", tmp_path / "m.parquet", "--materialize", tmp_path / "pruned"]
    refused = invoke(report, *args)
    assert refused.exit_code == 1 and "pass --link sym, which only makes the same links" in refused.stderr
    assert invoke(report, *args, "--link", "sym").exit_code == 0
    cleaning = ["--cleaned", tmp_path / "clean", "--link", "sym", "-q", "-o", tmp_path / "s.parquet"]
    assert commands.invoke("detect-noise", report, *cleaning).exit_code == 0
    for name in ("pruned", "clean"):
        files = list((tmp_path / name).glob("*/*.png"))
        assert files and all(file.resolve().parent == blobs for file in files)
