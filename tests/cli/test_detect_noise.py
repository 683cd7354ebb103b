"""`chgval detect-noise` as a user sees it: files, pipes, exit codes and messages."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import chgval
from chgval.reports.tables import SUSPECTS_SCHEMA
from tests import commands
from tests.commands import imported_by
from tests.pictures import make_blobs

invoke = partial(commands.invoke, "detect-noise")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The digits valued once, and the truth that their ids end in."""
    path = tmp_path_factory.mktemp("digits") / "values.parquet"
    probabilities = path.with_name("probabilities.npy")
    arguments = ["value", "builtin:digits", "-q", "-o", str(path), "--write-probs", str(probabilities)]
    result = commands.invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return path


def wrong(table):
    return np.array([row["label_name"] != row["id"].rsplit("-", 1)[1] for row in table.to_pylist()])


def test_values_of_flipped_labels_are_lower(report):
    """What the README's first command says."""
    table = pq.read_table(report)
    is_wrong = wrong(table)
    assert is_wrong.sum() == 180
    for name in ("value", "margin_mean"):
        assert roc_auc_score(~is_wrong, table[name].to_numpy()) > 0.95, name


def test_flags_of_the_digits_are_the_flipped_ones(report, tmp_path):
    output = tmp_path / "suspects.parquet"
    result = invoke(report, "-o", output)
    assert result.exit_code == 0, result.stderr
    table = pq.read_table(output)
    assert table.schema.names == SUSPECTS_SCHEMA.names
    is_wrong = wrong(table)
    recall, precision = is_wrong.sum() / 180, is_wrong.mean()
    assert 2 * recall * precision / (recall + precision) > 0.85
    rows = table.to_pylist()
    right = [row["suggested_name"] == row["id"].rsplit("-", 1)[1] for row in rows]
    assert np.mean(np.array(right)[is_wrong]) > 0.95
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert (np.diff(table["noise_score"].to_numpy()) <= 0).all() and all(row["flagged"] for row in rows)
    metadata = json.loads(table.schema.metadata[b"chgval"])
    assert 0.067 < metadata["noise_rate"]["rate"] < 0.133
    assert metadata["fingerprint"] == json.loads(pq.read_schema(report).metadata[b"chgval"])["fingerprint"]


def test_all_rows_are_those_of_the_report(report, tmp_path):
    invoke(report, "--all", "-o", tmp_path / "all.parquet")
    table, values = pq.read_table(tmp_path / "all.parquet").sort_by("index"), pq.read_table(report)
    for name in ("index", "id", "label", "label_name", "value", "noise_score", "suggested_label"):
        assert table[name].equals(values[name]), name
    assert table["margin"].equals(values["margin_mean"])
    assert sorted(table["rank"].to_pylist()) == list(range(1, 1798))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "arrow"])
def test_every_format_of_a_report_gives_the_same_suspects(report, tmp_path, ending):
    from chgval.config import OutputConfig
    from chgval.reports.files import write_table

    other = tmp_path / f"values.{ending}"
    write_table(OutputConfig(path=str(other)), pq.read_table(report))
    invoke(report, "-o", tmp_path / "a.parquet")
    result = invoke(other, "-o", tmp_path / "b.parquet")
    assert result.exit_code == 0, result.stderr
    a, b = (pq.read_table(tmp_path / name).drop("noise_score") for name in ("a.parquet", "b.parquet"))
    assert a.equals(b)


def test_a_pipe_from_value_gives_what_the_dataset_gives(tmp_path):
    settings = ["--epochs", "3", "-q"]
    valued = subprocess.run(
        commands.command_line("value", "builtin:digits", "-o", "-", *settings),
        capture_output=True,
        check=True,
    )
    piped = subprocess.run(
        commands.command_line("detect-noise", "-", "-o", "-", "--format", "csv", "--all", "-q"),
        input=valued.stdout, capture_output=True, check=True,
    )  # fmt: skip
    kept, direct = tmp_path / "values.parquet", tmp_path / "direct.csv"
    arguments = ["builtin:digits", "-o", direct, "--values", kept, "--all", *settings]
    assert invoke(*arguments).exit_code == 0
    assert piped.stdout == direct.read_bytes()
    mistyped = tmp_path / "valeus.parquet"
    said = invoke("builtin:digits", "--epochs", "1", "-o", tmp_path / "s.csv", "--values", mistyped).stderr
    assert f"{mistyped} is not there; builtin:digits is valued now" in said
    assert pq.read_table(kept).equals(pq.read_table(pa.BufferReader(valued.stdout)))


def test_rules_and_limits_decide_what_is_written(report, tmp_path):
    scores = pq.read_table(report)["noise_score"].to_numpy()

    def rows(*arguments):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        result = invoke(report, "-o", output, *arguments)
        assert result.exit_code == 0, result.stderr
        return pacsv.read_csv(output)

    assert rows("--threshold", "0.9").num_rows == (scores >= 0.9).sum()
    assert rows("--expected-noise", "0.1").num_rows == 180
    assert rows("--expected-noise", "0").num_rows == 0
    assert rows("--top", "7").num_rows == 7 and rows("--all", "--top", "300").num_rows == 300
    for rule in ("chg", "gmm", "confident"):
        flagged = rows("--threshold", rule)
        assert wrong(flagged).mean() > 0.5, rule
        marked = rows("--threshold", rule, "--all")  # ranks are the same where all rows are sorted
        assert marked.filter(marked["flagged"]).select(["id", "rank"]).equals(flagged.select(["id", "rank"]))
    by_value = rows("--score", "chg", "--top", "50")
    assert (np.diff(by_value["value"].to_numpy()) >= 0).all()


def test_threshold_samples_flag_the_flipped_ones(tmp_path):
    output = tmp_path / "aum.parquet"
    result = invoke("builtin:digits", "--threshold", "aum", "--epochs", "8", "-q", "-o", output)
    assert result.exit_code == 0, result.stderr
    flagged = wrong(pq.read_table(output))
    assert flagged.sum() > 0.85 * 180 and flagged.mean() > 0.8


def test_duplicates_are_listed_whether_flagged_or_not(tmp_path):
    folder = tmp_path / "images"
    for seed in range(40):
        path = folder / ("cat", "dog")[seed % 2] / f"{seed:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_blobs(seed, 20).save(path)
    shutil.copy(folder / "cat" / "008.png", folder / "dog" / "copy.png")
    shutil.copy(folder / "dog" / "003.png", folder / "dog" / "003-again.png")
    arguments = ["--duplicates", "--expected-noise", "0", "--epochs", "2", "-q", "-o", tmp_path / "s.parquet"]
    result = invoke(folder, *arguments)
    assert result.exit_code == 0, result.stderr
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "s.parquet").to_pylist()}
    assert set(rows) == {"cat/008.png", "dog/copy.png"} and not any(r["flagged"] for r in rows.values())
    assert rows["cat/008.png"]["duplicate_of"] == rows["dog/copy.png"]["index"]
    assert rows["dog/copy.png"]["duplicate_of"] == rows["cat/008.png"]["index"]
    arguments = ["--duplicates", "--expected-noise", "0", "-q", "-o", tmp_path / "again.parquet"]
    report = chgval.value(folder, epochs=1, output=tmp_path / "v.parquet")
    result = invoke(tmp_path / "v.parquet", *arguments)  # of a report: nothing is trained
    assert result.exit_code == 0, result.stderr
    again = {row["id"]: row["duplicate_of"] for row in pq.read_table(tmp_path / "again.parquet").to_pylist()}
    assert again == {name: row["duplicate_of"] for name, row in rows.items()} and len(report) == 42
    folder.rename(tmp_path / "moved")
    refused = invoke(tmp_path / "v.parquet", *arguments, "--overwrite")
    assert refused.exit_code == 1 and "no such file or folder" in refused.stderr
    moved = ("--dataset", tmp_path / "moved", "--overwrite")
    assert invoke(tmp_path / "v.parquet", *arguments, *moved).exit_code == 0


def test_duplicates_need_images(tmp_path):
    table = {"v": np.eye(4).tolist() * 5, "label": [0, 1, 2, 3] * 5}
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    settings = ("--features-column", "v", "--arch", "linear", "--epochs", "1", "-o", tmp_path / "s.csv")
    result = invoke(tmp_path / "d.parquet", *settings, "--duplicates")
    assert result.exit_code == 2 and "--duplicates: needs images" in result.stderr


def test_flags_of_confident_learning_are_those_of_cleanlab(report):
    """Runs what docs/detection.md tells users of cleanlab to do, as it stands there."""
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    page = Path(__file__).parents[2] / "docs" / "detection.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    program = f"{snippet}\nnp.save('issues.npy', issues)\n"
    subprocess.run([sys.executable, "-c", program], cwd=report.parent, check=True)
    theirs = np.load(report.with_name("issues.npy"))
    probabilities_NC = np.load(report.with_name("probabilities.npy"))
    np.testing.assert_allclose(probabilities_NC.sum(1), 1, atol=1e-5)
    labels_N = pq.read_table(report)["label"].to_numpy()
    invoke(report, "--threshold", "confident", "--all", "--overwrite", "-o", report.with_name("c.parquet"))
    ours = pq.read_table(report.with_name("c.parquet")).sort_by("index")["flagged"].to_numpy()
    np.testing.assert_array_equal(ours, theirs)
    default = filters.find_label_issues(labels_N, probabilities_NC, n_jobs=1)
    invoke(report, "--all", "--overwrite", "-o", report.with_name("c.parquet"))
    ours = pq.read_table(report.with_name("c.parquet")).sort_by("index")["flagged"].to_numpy()
    assert (ours & default).sum() / (ours | default).sum() > 0.6


def test_too_much_noise_exits_with_3(report, tmp_path):
    result = invoke(report, "-o", tmp_path / "a.csv", "--fail-over", "0.05")
    assert result.exit_code == 3 and "over --fail-over 0.05" in result.stderr
    assert (tmp_path / "a.csv").exists()
    assert invoke(report, "-o", tmp_path / "b.csv", "--fail-over", "0.2").exit_code == 0


def test_a_report_is_read_without_torch(report, tmp_path):
    loaded = imported_by(["detect-noise", str(report), "-q", "-o", str(tmp_path / "s.csv")])
    assert "numpy" in loaded
    assert not {"torch", "torchvision", "sklearn", "scipy", "PIL"} & loaded


def test_rows_without_a_score_come_last_and_are_never_flagged(report, tmp_path):
    values = pq.read_table(report)
    masked = values.set_column(
        values.schema.get_field_index("noise_score"),
        "noise_score",
        pa.array([None if i < 5 else v for i, v in enumerate(values["noise_score"].to_pylist())]),
    )
    pq.write_table(masked, tmp_path / "masked.parquet")
    assert invoke(tmp_path / "masked.parquet", "--all", "-o", tmp_path / "all.parquet").exit_code == 0
    last = pq.read_table(tmp_path / "all.parquet").slice(1792).to_pylist()
    assert [row["index"] for row in last] == [0, 1, 2, 3, 4]
    assert all(row["rank"] is None and row["noise_score"] is None and not row["flagged"] for row in last)


def test_an_empty_id_comes_through_csv(report, tmp_path):
    values = pq.read_table(report)
    ids = ["", *values["id"].to_pylist()[1:]]
    values = values.set_column(values.schema.get_field_index("id"), values.schema.field("id"), pa.array(ids))
    pacsv.write_csv(values, tmp_path / "v.csv")
    result = invoke(tmp_path / "v.csv", "--all", "-o", tmp_path / "s.parquet")
    assert result.exit_code == 0, result.stderr
    suspects = pq.read_table(tmp_path / "s.parquet").sort_by("index")
    assert suspects["id"].to_pylist() == ids


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """The digits as images in class folders, a tenth under a wrong one; the names say the true one."""
    bunch = load_digits()
    rng = np.random.default_rng(5)
    root = tmp_path_factory.mktemp("folder") / "digits"
    for row, (gray, digit) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        given = digit if row % 10 else (digit + rng.integers(1, 10)) % 10
        (root / f"d{given}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((gray * 15.9).astype(np.uint8))
        image.save(root / f"d{given}" / f"{row:04d}-is-d{digit}.png")
    return root


def purity(folder):
    """Share of the images that lie under their true class."""
    files = list(folder.rglob("*.png"))
    return np.mean([re.search(r"is-(d\d)", path.name)[1] == path.parent.name for path in files]), len(files)


def test_a_cleaned_folder_holds_fewer_wrong_labels(digits_folder, tmp_path):
    values = tmp_path / "values.parquet"
    settings = ["--augment", "crop", "--epochs", 15, "-q", "--values", values, "-o", tmp_path / "a.parquet"]
    result = invoke(digits_folder, *settings, "--cleaned", tmp_path / "dropped")
    assert result.exit_code == 0, result.stderr
    flagged = pq.read_table(tmp_path / "a.parquet")
    assert purity(digits_folder) == (pytest.approx(0.9, abs=1e-3), 1797)
    share, count = purity(tmp_path / "dropped")
    assert share > 0.98 and count == 1797 - flagged.num_rows
    dropped = {path.name for path in digits_folder.rglob("*.png")} - {
        path.name for path in (tmp_path / "dropped").rglob("*.png")
    }
    assert dropped == {Path(name).name for name in flagged["id"].to_pylist()}

    arguments = ["-o", tmp_path / "b.parquet", "--cleaned", tmp_path / "relabelled", "--relabel", "0.9"]
    result = invoke(values, *arguments)
    assert result.exit_code == 0, result.stderr
    sure = int((flagged["suggested_probability"].to_numpy() >= 0.9).sum())
    share, count = purity(tmp_path / "relabelled")
    assert share > 0.98 and count == 1797 - flagged.num_rows + sure
    assert (
        f"{count:,} of 1,797 rows kept, {sure} of them relabelled -> {tmp_path}/relabelled" in result.stderr
    )


def test_a_dataset_is_not_cleaned_of_most_of_its_rows_by_accident(digits_folder, tmp_path):
    values, target = tmp_path / "values.parquet", tmp_path / "cleaned"
    arguments = [values, "--epochs", "2", "--overwrite", "-o", tmp_path / "s.parquet", "--cleaned", target]
    assert invoke(digits_folder, "--epochs", "2", "-q", "--values", values, "-o", "-").exit_code == 0
    result = invoke(*arguments[:1], *arguments[3:], "--expected-noise", "0.6")
    assert result.exit_code == 1 and not target.exists()
    assert f"--cleaned {target}: would lose 1,078 of 1,797 rows" in result.stderr.replace("\n", " ")
    assert "or pass --force" in result.stderr.replace("\n", " ")
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 1078  # to look at
    result = invoke(*arguments[:1], *arguments[3:], "--expected-noise", "0.6", "--force")
    assert result.exit_code == 0, result.stderr
    assert purity(target)[1] == 1797 - 1078

    # A whole class, however small.
    table = pq.read_table(values)
    scores = [
        1.0 if name == "d3" else 0.0 if score is not None else None
        for name, score in zip(
            *(table[column].to_pylist() for column in ("label_name", "noise_score")), strict=True
        )
    ]
    place = table.schema.get_field_index("noise_score")
    pq.write_table(table.set_column(place, table.schema.field(place), [scores]), values)
    result = invoke(*arguments[:1], *arguments[3:-1], tmp_path / "other")
    assert result.exit_code == 1 and "would lose all of class 'd3'" in result.stderr.replace("\n", " ")


def test_pictures_that_cannot_be_told_apart_have_no_suspects(tmp_path):
    for number in range(60):
        folder = tmp_path / "white" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "white").save(folder / f"{number}.png")
    result = invoke(tmp_path / "white", "--epochs", "3", "-o", tmp_path / "s.parquet")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stderr.split())
    assert "estimated noise: unknown; 0 of 60 flagged" in text
    assert "nothing can be said about these labels" in text
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 0
    # What the user flags all the same has no suggestion.
    arguments = ["--epochs", "3", "--expected-noise", "0.5", "-o", tmp_path / "t.parquet"]
    result = invoke(tmp_path / "white", *arguments)
    assert result.exit_code == 0, result.stderr
    assert pq.read_table(tmp_path / "t.parquet")["suggested_label"].null_count == 30
    result = invoke(tmp_path / "white", "--epochs", "3", "--fail-over", "0.5", "-o", tmp_path / "u.parquet")
    assert result.exit_code == 1 and "--fail-over: nothing can be said" in result.stderr


def test_what_stands_in_the_way_of_a_cleaned_dataset_is_told(digits_folder, report, tmp_path, monkeypatch):
    monkeypatch.chdir(digits_folder.parent)
    settings = ["--epochs", "2", "-q", "--values", tmp_path / "v.parquet"]
    invoke("digits", "-o", tmp_path / "s.parquet", *settings)
    pacsv.write_csv(pq.read_table(tmp_path / "v.parquet"), tmp_path / "v.csv")
    monkeypatch.chdir(tmp_path)
    for source, arguments, message in [
        ("v.parquet", ["--cleaned", "new"], "digits: no such file or folder. v.parquet was made from it"),
        ("v.csv", ["--cleaned", "new"], "v.csv: does not say which dataset it is about"),
        (report, ["--cleaned", "new"], "builtin:digits: is built in"),
        ("v.parquet", ["--relabel", "0.9"], "pass that too"),
        (
            "v.parquet",
            ["--relabel", "90", "--cleaned", "new"],
            "--relabel 90: must be 0 or more and at most 1",
        ),
        ("v.parquet", ["--cleaned", tmp_path / "t.parquet"], "t.parquet: is named as two outputs"),
        ("v.parquet", ["--cleaned", "v.parquet", "--overwrite"], "v.parquet is or goes there"),
        (digits_folder, ["--cleaned", digits_folder / "new"], "is part of the dataset"),
    ]:
        result = invoke(source, "-o", "t.parquet", *arguments)
        assert result.exit_code in (1, 2) and message in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not Path("t.parquet").exists() and not Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.parquet"], 1, "missing.parquet: no such file or folder"),
        (
            ["{report}", "--threshold", "often"],
            2,
            "--threshold often: expected aum, auto, chg, confident, gmm, or",
        ),
        (["{report}", "--threshold", "aum"], 2, "--threshold aum: trains twice more; pass the dataset, not"),
        (["{report}", "--threshold", "1.5"], 2, "--threshold 1.5: scores lie between 0 and 1"),
        (
            ["{report}", "--expected-noise", "10"],
            2,
            "--expected-noise 10: must be 0 or more and at most 1 (Flag",
        ),
        (["{report}", "--expected-noise", "0.1", "--threshold", "chg"], 2, "leave out --threshold"),
        (["{report}", "--force"], 2, "--force: is about what --cleaned writes"),
        (["{old}"], 1, "no column 'noise_score'; expected a values report of this version"),
        (["{old_lines}"], 1, "no column 'noise_score'; expected a values report of this version"),
        (["{empty}"], 1, "is empty; expected a first line that names the columns"),
        (["{other}"], 1, "column 'label' not found; columns are name"),
        (["{report}", "-o", "{report}"], 1, "is the input itself"),
    ],
)
def test_mistakes_are_told_in_one_line(report, tmp_path, arguments, code, message):
    old, empty = tmp_path / "old.parquet", tmp_path / "empty.csv"
    pq.write_table(pq.read_table(report).drop("noise_score"), old)
    old_lines = tmp_path / "old.jsonl"
    old_lines.write_text("".join(json.dumps(row) + "\n" for row in pq.read_table(old).to_pylist()))
    empty.touch()
    other = tmp_path / "other.csv"
    other.write_text("name\n")
    names = {"report": report, "old": old, "old_lines": old_lines, "empty": empty, "other": other}
    given = [argument.format(**names) for argument in arguments]
    output = [] if "-o" in given else ["-o", str(tmp_path / "s.csv")]
    result = invoke(*given, *output)
    assert result.exit_code == code
    assert message in result.stderr.replace("\n", " ") and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "s.csv").exists()
