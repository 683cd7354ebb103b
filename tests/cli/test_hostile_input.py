"""Files from strangers: damaged images, formulas, paths that lead away, headers that lie."""

import csv
import io
import json
import os
import resource
import shutil
import socket
import string
import subprocess
import sys
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chgval.data.decode import UnreadableImageError, decode_centre
from chgval.reports.files import with_metadata
from chgval.reports.tables import VALUES_SCHEMA
from chgval.spreadsheets import with_marks, without_marks
from tests.commands import command_line, invoke, run
from tests.pictures import write_folder

DAMAGED = Path(__file__).parent / "damaged"
# Damaged images that the decoder is tried on here; `pytest -m long` tries many more.
INPUTS = 3_000
FAST = ["--arch", "resnet8", "--epochs", "2", "-q"]


def fuzz(seed, count, code="from tests import fuzzing"):
    """Try damaged images in a process of its own; code may replace some of the program first."""
    code += "; from tests.fuzzing import main; import sys; main(int(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(seed), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_damaged_images_are_decoded_or_refused():
    found = fuzz(0, INPUTS)
    assert found["decoded"] + found["refused"] == INPUTS and min(found["decoded"], found["refused"]) > 100
    assert found["growth_MiB"] < 64


IMPATIENT = "D.SECONDS_PER_INPUT = 0.5"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (f"{IMPATIENT}; import time; D.shorter_side = lambda *_: time.sleep(9)", "Timeout"),
        # Nothing of Python runs meanwhile.
        (f"{IMPATIENT}; import ctypes; D.shorter_side = lambda *_: ctypes.PyDLL(None).sleep(9)", "Timeout"),
        ("import ctypes; D.shorter_side = lambda *_: ctypes.string_at(0)", "Segmentation fault"),
        ("D.shorter_side = lambda *_: 1 / 0", "ZeroDivisionError"),
    ],
)
def test_the_search_for_faults_finds_those_that_are_there(code, fault):
    with pytest.raises(AssertionError, match=fault):
        fuzz(0, 5, f"import tests.fuzzing as D; {code}")


@pytest.mark.parametrize("path", sorted(DAMAGED.iterdir()), ids=lambda path: path.name)
def test_images_that_were_found_odd_stay_decoded_or_refused(path):
    """The slowest ones, and those that need most memory, of the long search; in silence."""
    code = (
        "import sys; from pathlib import Path; from tests.fuzzing import outcome; import faulthandler;"
        "faulthandler.dump_traceback_later(20, exit=True);"
        "print(outcome(Path(sys.argv[1]).read_bytes(), 0))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout in ("decoded\n", "refused\n"), result.stderr


@pytest.mark.long
def test_a_great_many_damaged_images(capsys):
    for seed in range(1, 6):
        found = fuzz(seed, 100_000)
        with capsys.disabled():
            sys.stdout.write(f"\nseed {seed}: {found}\n")
        assert found["growth_MiB"] < 64


def test_formats_that_need_other_programs_are_no_images():
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "EPS")
    with pytest.raises(UnreadableImageError, match="not an image in a known format"):
        decode_centre(image.getvalue(), 8)


def test_a_bomb_costs_a_row_and_no_memory(tmp_path):
    """A PNG of some kilobytes that claims, and holds, 12,000 x 12,000 pixels; the limit is settable."""
    root = write_folder(tmp_path / "images", 6)
    Image.new("1", (12_000, 12_000)).save(root / "cat" / "bomb.png")
    assert (root / "cat" / "bomb.png").stat().st_size < 30_000
    out = tmp_path / "v.parquet"
    code, said, peak = run_measured("value", root, *FAST, "-o", out)
    assert code == 0 and peak < 1.5, (said, peak)
    bomb = next(row for row in pq.read_table(out).to_pylist() if row["id"] == "cat/bomb.png")
    assert bomb["status"] == "unreadable"
    assert bomb["reason"] == "144,000,000 pixels, more than --max-pixels 100,000,000"
    assert invoke("value", root, *FAST, "--max-pixels", 143, "-o", out, "--overwrite").exit_code == 1
    assert invoke("value", root, *FAST, "--max-pixels", 144, "-o", out, "--overwrite").exit_code == 0
    statuses = pq.read_table(out)["status"].to_pylist()
    assert statuses.count("unreadable") == 1 and len(statuses) == 13
    refused = invoke("value", root, *FAST, "--max-pixels", 10**9, "-o", out)
    assert refused.exit_code == 2 and "must be 1 or more and at most 178,956,970" in refused.stderr


def test_16_bit_images_take_their_memory_once(tmp_path):
    """Three PNGs of some hundred kilobytes each, of nearly as many pixels as are accepted, on all cores."""
    root = write_folder(tmp_path / "images", 6)
    for number in range(3):
        large = Image.fromarray(np.full((9_990, 10_000), 20_000 * number, np.uint16))
        large.save(root / "cat" / f"large-{number}.png")
    code, said, peak = run_measured("value", root, *FAST, "-o", tmp_path / "v.parquet")
    assert code == 0 and peak < 2, (said, peak)
    assert pq.read_table(tmp_path / "v.parquet")["status"].to_pylist() == ["valued"] * 15


def test_encoded_images_wait_for_their_turn_on_disk(tmp_path):
    """12 files that claim 200 MiB each and hold nothing on disk: 2.3 GiB if all were read before any."""
    root = write_folder(tmp_path / "images", 6)
    for number in range(12):
        path = root / "cat" / f"large-{number:02d}.png"
        path.write_bytes((root / "cat" / "000.png").read_bytes())
        os.truncate(path, 200 * 2**20)
    code, said, peak = run_measured("value", root, *FAST, "-o", tmp_path / "v.parquet")
    assert code == 0 and peak < 1.5, (said, peak)


@given(st.lists(st.text(alphabet=st.sampled_from("=+-@'\t\r a1.é\"\n,"), max_size=6)))
def test_texts_that_a_spreadsheet_could_run_are_marked_and_come_back(texts):
    table = pa.table({"id": pa.array(texts, pa.string()), "value": pa.array([-1.0] * len(texts))})
    marked = with_marks(table)
    assert without_marks(marked).equals(table) and marked["value"].equals(table["value"])
    for text, cell in zip(texts, marked["id"].to_pylist(), strict=True):
        assert not cell or cell[0] not in "=+-@\t\r" or set(cell) <= {*string.digits, *"+-."}
        assert cell == text or cell == "'" + text


def test_formulas_in_names_are_marked_in_csv_and_read_back(tmp_path):
    """From the folder's names to the report, the manifest, and back to the dataset."""
    root = write_folder(tmp_path / "images", 6)
    evil = '=HYPERLINK("http:evil")'
    (root / "cat").rename(root / evil)
    (root / "dog" / "000.png").rename(root / "dog" / "@SUM(1).png")
    report, manifest = tmp_path / "v.csv", tmp_path / "s.csv"
    assert invoke("value", root, *FAST, "-o", report).exit_code == 0
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label_name"] for row in rows} == {"'" + evil, "dog"}
    assert all(row["id"].startswith(("'=", "dog/")) for row in rows)
    assert invoke("select", report, "--fraction", 0.5, "-q", "-o", manifest).exit_code == 0
    trained = invoke("train", root, *FAST, "--subset", manifest, "-o", tmp_path / "trained")
    assert trained.exit_code == 0, trained.stderr


def test_manifests_whose_paths_lead_away_are_refused(tmp_path):
    root = write_folder(tmp_path / "images", 6)
    (tmp_path / "secret.png").write_bytes((root / "cat" / "000.png").read_bytes())
    report = tmp_path / "v.parquet"
    assert invoke("value", root, *FAST, "-o", report).exit_code == 0
    table = pq.read_table(report)
    for number, path in enumerate(("../secret.png", str(tmp_path / "secret.png"), "cat/../../secret.png")):
        ids = [path, *table["id"].to_pylist()[1:]]
        changed = table.set_column(1, table.schema.field("id"), pa.array(ids))
        pq.write_table(changed, tmp_path / "changed.parquet")
        target = tmp_path / f"pruned-{number}"
        args = ["--fraction", 1, "--materialize", target, "-q", "-o", tmp_path / f"s-{number}.parquet"]
        result = invoke("select", tmp_path / "changed.parquet", *args)
        assert result.exit_code == 1 and "is not that of the report" in result.stderr
        assert not target.exists()


@pytest.mark.parametrize("link", ["copy", "hard", "sym"])
def test_links_that_lead_out_of_the_folder_are_not_copied(link, tmp_path):
    root = write_folder(tmp_path / "images", 6)
    secret = tmp_path / "secret.png"
    secret.write_bytes((root / "cat" / "000.png").read_bytes())
    (root / "cat" / "000.png").unlink()
    (root / "cat" / "000.png").symlink_to(secret)
    target = tmp_path / "pruned"
    result = invoke("select", root, *FAST, "--fraction", 1, "--materialize", target, "--link", link,
                    "-o", tmp_path / "s.parquet")  # fmt: skip
    if link == "sym":
        assert result.exit_code == 0 and (target / "cat" / "000.png").resolve() == secret
    else:
        assert result.exit_code == 1 and "leads out of the dataset" in result.stderr and not target.exists()


def test_parquet_paths_that_lead_away_are_not_opened(tmp_path):
    """Neither to be valued nor, as --cleaned embeds what lies beside the file, to be handed on."""
    folder = tmp_path / "data"
    root = write_folder(folder / "images", 6)
    (tmp_path / "secret.png").write_bytes((root / "cat" / "000.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    paths = [str(file.relative_to(folder)) for file in sorted(root.glob("*/*.png"))]
    paths[:3] = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    table = pa.table({"image": images, "label": [0, 1] * 6})
    pq.write_table(table, folder / "d.parquet")
    result = invoke("detect-noise", folder / "d.parquet", *FAST, "--values", tmp_path / "v.parquet",
                    "-o", tmp_path / "s.parquet", "--cleaned", tmp_path / "clean.parquet")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["unreadable"] * 3 + ["valued"] * 9
    assert "lies outside of" in rows[0]["reason"]
    images = pq.read_table(tmp_path / "clean.parquet")["image"].to_pylist()
    assert [image["bytes"] for image in images if image["path"] in paths[:3]] == [None] * 3


def test_a_report_whose_offsets_lead_out_of_it_is_an_error_of_one_line(tmp_path):
    """Arrow looks at them only when it is asked to; a read past the end of the file would follow."""
    report = tmp_path / "v.arrow"
    assert invoke("value", "builtin:digits", "--epochs", 1, "-q", "-o", report).exit_code == 0
    data = bytearray(report.read_bytes())
    offsets = pa.ipc.open_file(report).read_all()["id"].chunk(0).buffers()[1]
    at = bytes(data).index(offsets.to_pybytes()[:400])
    data[at + 40 : at + 44] = (2 * 10**9).to_bytes(4, "little")
    report.write_bytes(bytes(data))
    result = run("select", report, "--fraction", 0.5, "-o", tmp_path / "s.csv")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "v.arrow: cannot be read as a values report" in result.stderr


NESTED = b"[" * 200_000 + b"]" * 200_000


def write_report(path, label=1, **settings):
    """A report of forty rows whose metadata say what they are told to."""
    columns = {name: pa.nulls(40, VALUES_SCHEMA.field(name).type) for name in VALUES_SCHEMA.names} | {
        "index": range(40),
        "id": list(map(str, range(40))),
        "label": [0, label] * 20,
        "value": np.linspace(-1, 1, 40),
        "noise_score": np.linspace(1, 0, 40),
        "num_epochs": [1] * 40,
        "status": ["valued"] * 40,
    }
    pq.write_table(with_metadata(pa.table(columns, schema=VALUES_SCHEMA), settings), path)
    return path


@pytest.mark.parametrize("text", [b"[1]", b"7", NESTED, b'{"root": 5}', b'{"fingerprint": [1]}'])
def test_reports_whose_metadata_are_odd_are_an_error_of_one_line(text, tmp_path):
    report = write_report(tmp_path / "v.parquet")
    pq.write_table(pq.read_table(report).replace_schema_metadata({b"chgval": text}), report)
    for args in (["detect-noise", report], ["select", report, "--fraction", 0.5, "--format", "paths"]):
        result = invoke(*args, "-o", tmp_path / "out.csv")
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.stderr[-2000:]
        assert "v.parquet: cannot be read as a values report" in result.stderr


def test_lines_that_nest_without_end_are_no_report(tmp_path):
    (tmp_path / "v.jsonl").write_bytes(b'{"index": ' + NESTED + b"}\n")
    result = invoke("detect-noise", tmp_path / "v.jsonl", "-o", tmp_path / "out.csv")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.stderr[-2000:]


def test_a_dataset_that_is_no_name_is_none(tmp_path):
    columns = {**dict.fromkeys(("image_column", "id_column", "features_column")), "label_columns": []}
    report = write_report(tmp_path / "v.parquet", settings={"data": {"source": 5, **columns}})
    result = invoke("detect-noise", report, "--cleaned", tmp_path / "c", "-o", tmp_path / "out.csv")
    assert result.exit_code == 1 and "does not say which dataset it is about" in result.stderr


def test_descriptions_of_columns_that_nest_without_end_are_passed_over(tmp_path):
    table = pa.table({"x": list(np.eye(8)), "label": [0, 1] * 4})
    pq.write_table(table.replace_schema_metadata({b"huggingface": NESTED}), tmp_path / "d.parquet")
    args = ["--features-column", "x", "--epochs", 1, "-q", "-o", tmp_path / "v.parquet"]
    assert invoke("value", tmp_path / "d.parquet", *args).exit_code == 0


@pytest.mark.parametrize("label", [5 * 10**7, 2**36, 2**62])
def test_a_label_of_any_size_takes_no_memory(label, tmp_path):
    report = write_report(tmp_path / "v.parquet", label)
    out, random = tmp_path / "s.parquet", tmp_path / "r.parquet"
    code, said, peak = run_measured("select", report, "--fraction", 0.5, "-o", out, "--write-random", random)
    assert code == 0 and peak < 0.5, (said, peak)
    for manifest in (out, random):
        kept = pq.read_table(manifest).filter(pa.compute.field("kept"))
        assert kept["label"].to_pylist().count(label) == kept["label"].to_pylist().count(0) == 10


@pytest.mark.parametrize("weight", [-1.0, np.inf, 1e300])
def test_weights_that_nothing_can_be_trained_with_are_told(weight, tmp_path):
    root = write_folder(tmp_path / "images", 4)
    assert invoke("value", root, *FAST, "-o", tmp_path / "v.parquet").exit_code == 0
    manifest = tmp_path / "m.parquet"
    assert invoke("select", tmp_path / "v.parquet", "--fraction", 1, "-q", "-o", manifest).exit_code == 0
    table = pq.read_table(manifest)
    weights = pa.array([1.0] * 7 + [weight])
    table = table.set_column(table.schema.get_field_index("weight"), "weight", weights)
    pq.write_table(table, manifest)
    result = invoke("train", root, *FAST, "--subset", manifest, "-o", tmp_path / "t")
    assert result.exit_code == 1 and "m.parquet: 'dog/003.png' has the weight" in result.stderr


@pytest.mark.parametrize("column", ["label", "id", "image"])
def test_text_that_is_no_utf8_is_an_error_of_one_line(column, tmp_path):
    """Parquet says that it is; nothing but a look at it tells."""
    files = sorted(write_folder(tmp_path / "images", 4).glob("*/*.png"))
    bad = pa.array([b"a\xff", *[f"b{number % 2}".encode() for number in range(7)]])
    texts = pa.Array.from_buffers(pa.string(), 8, bad.buffers())
    images = [file.read_bytes() for file in files]
    columns = {"image": pa.array(images), "label": pa.array([0, 1] * 4), "id": pa.array(list("abcdefgh"))}
    columns[column] = texts
    if column == "image":
        columns[column] = pa.StructArray.from_arrays([pa.array(images), texts], ["bytes", "path"])
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    result = invoke("value", tmp_path / "d.parquet", *FAST, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "Invalid UTF8" in result.stderr and f"reading {column}" in result.stderr.replace(
        "label, id", column
    )


def test_paths_that_are_no_text_are_no_images(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    images = pa.array([{"bytes": None, "path": number} for number in range(4)], kind)
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 2}), tmp_path / "d.parquet")
    result = invoke("value", tmp_path / "d.parquet", *FAST, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 1 and "no image column found" in result.stderr


def test_an_icon_is_no_image(tmp_path):
    """Pillow decodes what an ICO file holds, a PNG of any size, before it tells how large that is."""
    png, icon = io.BytesIO(), io.BytesIO()
    Image.new("1", (3000, 3000)).save(png, "PNG")
    Image.new("RGB", (16, 16)).save(icon, "ICO")
    data = icon.getvalue()[:14] + len(png.getvalue()).to_bytes(4, "little") + (22).to_bytes(4, "little")
    with pytest.raises(UnreadableImageError, match="not an image in a known format"):
        decode_centre(data + png.getvalue(), 8, 1_000_000)


def test_a_class_that_a_report_suggests_and_the_dataset_has_not(tmp_path):
    root, report = write_folder(tmp_path / "images", 6), tmp_path / "v.parquet"
    assert invoke("value", root, *FAST, "-o", report).exit_code == 0
    table = pq.read_table(report)
    for name, column in (("suggested_label", [99] * 12), ("suggested_probability", [1.0] * 12)):
        column = pa.array(column, table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    pq.write_table(table, report)
    result = invoke("detect-noise", report, "--threshold", 0, "--cleaned", tmp_path / "clean", "--relabel", 0,
                    "-o", tmp_path / "s.parquet")  # fmt: skip
    assert result.exit_code == 1 and "suggests class 99 where there are 2" in result.stderr
    assert not (tmp_path / "clean").exists()


def test_a_report_names_no_machine_to_fetch_from(tmp_path):
    """Only the user does: --dataset says where the dataset is, which may also have moved."""
    root, report = write_folder(tmp_path / "images", 6), tmp_path / "v.parquet"
    assert invoke("value", root, *FAST, "-o", report).exit_code == 0
    table = pq.read_table(report)
    metadata = json.loads(table.schema.metadata[b"chgval"])
    metadata["settings"]["data"]["source"] = "s3://bucket/data?endpoint_override=localhost:9&scheme=http"
    evil = table.replace_schema_metadata({"chgval": json.dumps(metadata)})
    pq.write_table(evil, tmp_path / "evil.parquet")
    args = ["select", tmp_path / "evil.parquet", "--fraction", 0.5, "-o", tmp_path / "s.parquet"]
    with socket.create_server(("localhost", 0)) as server:
        server.settimeout(0.5)
        address = f"localhost:{server.getsockname()[1]}"
        evil = metadata["settings"]["data"]["source"].replace("localhost:9", address)
        metadata["settings"]["data"]["source"] = evil
        pq.write_table(table.replace_schema_metadata({"chgval": json.dumps(metadata)}), args[1])
        for command in (
            [*args, "--materialize", tmp_path / "pruned.parquet"],
            ["detect-noise", args[1], "--cleaned", tmp_path / "pruned.parquet", "-o", tmp_path / "n.csv"],
        ):
            result = invoke(*command)
            assert result.exit_code == 1 and "nothing is fetched because a report says so" in result.stderr
        with pytest.raises(TimeoutError):
            server.accept()
    moved = root.rename(tmp_path / "moved")
    result = invoke(*args, "--materialize", tmp_path / "pruned", "--dataset", moved)
    assert result.exit_code == 0 and len(list((tmp_path / "pruned").glob("*/*.png"))) == 6
    result = invoke("select", report, "--fraction", 0.5, "--materialize", tmp_path / "again",
                    "-o", tmp_path / "t.parquet")  # fmt: skip
    assert result.exit_code == 1 and "pass --dataset if it has moved" in result.stderr
    for wrong, said in (
        ([*args[:-1], tmp_path / "u.parquet", "--dataset", moved], "pass that too"),
        (["select", moved, "--fraction", 0.5, "--materialize", tmp_path / "again", "--dataset", moved],
         "is for a report"),
    ):  # fmt: skip
        result = invoke(*wrong)
        assert result.exit_code == 2 and said in result.stderr


def tell_the_peak():
    """Let a command say at its end how much memory it took at most, as KiB."""

    def tell():
        sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    Finalize(None, tell, exitpriority=0)


def run_measured(*args):
    """Run a command; return its exit code, what it said, and its peak resident memory in GiB."""
    result = run(*args, before=tell_the_peak)
    return result.returncode, result.stderr, int(result.stdout) / 2**20


def with_a_huge_page(data, offset):
    """Claim in the header of the last page, which is a Thrift struct, two gigabytes of content."""
    # Field 1 is the kind; fields 2 and 3 are the sizes before and after compression, as zigzag varints.
    assert data[offset] == 0x15 and data[offset + 2] == 0x15
    end = next(at for at in range(offset + 3, len(data)) if data[at] < 0x80) + 1
    return data[: offset + 3] + b"\xfe\xff\xff\xff\x0f" + data[end:]


@pytest.mark.parametrize(
    "what", ["rows", "page", "page size", "footer size", "dictionary", "nested", "half of it"]
)
def test_parquet_files_that_lie_are_an_error_of_one_line(what, tmp_path):
    """Counts and sizes in headers are overwritten; nothing is allocated by them, and nothing crashes."""
    path = tmp_path / "d.parquet"
    labels = pa.array(["cat", "dog"] * 50)
    table = pa.table({"image": pa.array([b"x" * 40] * 100, pa.binary()), "label": labels})
    if what == "nested":
        kind = pa.binary()
        for _ in range(150):
            kind = pa.list_(kind)
        table = pa.table({"image": pa.nulls(100, kind), "label": labels})
    compression = "snappy" if what == "page size" else "none"
    pq.write_table(table, path, compression=compression, use_dictionary=what == "dictionary")
    data = bytearray(path.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little")
    rng = np.random.default_rng(0)
    match what:
        case "rows":  # 100 as a zigzag varint, wherever it stands in the footer
            start = len(data) - 8 - footer
            data[start:-8] = bytes(data[start:-8]).replace(b"\xc8\x01", b"\xfe\x7f")
        case "page size":
            data = with_a_huge_page(data, pq.read_metadata(path).row_group(0).column(1).data_page_offset)
        case "page":
            data[4:24] = bytes(rng.integers(128, 256, 20, dtype=np.uint8))
        case "footer size":
            data[-8:-4] = (2**31 - 1).to_bytes(4, "little")
        case "dictionary":  # indices into the dictionary that are not there
            start = bytes(data).rindex(b"dog") + 3
            data[start + 20 : len(data) - 8 - footer] = b"\xff" * (len(data) - 8 - footer - start - 20)
        case "half of it":
            del data[len(data) // 2 :]
    path.write_bytes(bytes(data))
    code, said, peak = run_measured("value", path, *FAST, "-o", tmp_path / "v.parquet")
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 1, (code, said[-2000:])
    assert peak < 1.5 and not (tmp_path / "v.parquet").exists()


def forbid_connections():
    """Forbid every connection and every lookup of a name by the interpreter's audit events."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    forbidden = {"connect", "getaddrinfo", "gethostbyname", "gethostbyaddr", "sendto", "sendmsg", "bind"}

    def forbid(event, args):
        library, _, what = event.partition(".")
        # What is named by a text is a socket in a file.
        if library == "socket" and what in forbidden and not isinstance(args[1], str | bytes):
            raise RuntimeError(f"network: {event} {args}")

    sys.addaudithook(forbid)


def connect():
    socket.create_connection(("192.0.2.1", 9), timeout=600)


def forbid_and_connect():
    forbid_connections()
    connect()


def commands_of_all_kinds(images, folder):
    return [
        ["value", images, *FAST, "-o", folder / "v.parquet"],
        ["detect-noise", folder / "v.parquet", "--cleaned", folder / "c", "-o", folder / "t.parquet"],
        ["select", folder / "v.parquet", "--fraction", 0.5, "-o", folder / "m.parquet"],
        ["train", images, *FAST, "--subset", folder / "m.parquet", "-o", folder / "trained"],
    ]


def test_python_asks_for_no_connection(image_folder, tmp_path):
    for args in commands_of_all_kinds(image_folder, tmp_path):
        result = run(*args, before=forbid_connections)
        assert result.returncode == 0, result.stderr
    # It is noticed if somebody does.
    assert "network: socket." in run("--version", before=forbid_and_connect).stderr


def test_nothing_needs_a_network(image_folder, tmp_path):
    """Whoever would reach for it."""
    prefix = ["unshare", "--user", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a test take the network away")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    for args in commands_of_all_kinds(image_folder, tmp_path):
        command = [*prefix, *command_line(*args)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert result.returncode == 0, result.stderr
    code = f"from {__name__} import connect; connect()"
    result = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True)
    assert "Network is unreachable" in result.stderr
