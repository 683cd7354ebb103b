"""The review page in a browser, from disk: what people see, press and download."""

import csv
import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

import chgval
from chgval.config import DataConfig
from chgval.reports.files import with_metadata
from chgval.reports.tables import VALUES_SCHEMA
from tests.commands import invoke, run
from tests.pictures import make_blobs, make_image, write_folder

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

SCRIPT = "<script>alert(1)</script>"
BREAKING = '"><img src=x onerror=alert(1)>.png'
CLASSES = [SCRIPT, "cat", "dog"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page in a fresh profile; whatever it logs, asks for or pops up is an error."""
    contexts = []

    def open_page(path, **options):
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("dialog", lambda dialog: page.faults.append(dialog.message))
        page.on("request", lambda request: page.faults.append(request.url))
        page.goto(path.resolve().as_uri())
        page.faults = [fault for fault in page.faults if fault != path.resolve().as_uri()]
        page.faults = [fault for fault in page.faults if not fault.startswith("data:")]
        return page

    yield open_page
    for context in contexts:
        faults = [fault for page in context.pages for fault in getattr(page, "faults", [])]
        assert not [fault for fault in faults if not fault.startswith(("data:", "file:"))]
        context.close()


def write_report(path, source, ids, labels, names, scores, suggested):
    """A values report as of a run, with these noise scores and suggestions."""
    rows = len(ids)
    columns = {field.name: pa.nulls(rows, field.type) for field in VALUES_SCHEMA}
    columns |= {"index": range(rows), "id": ids, "label": labels, "noise_score": scores}
    columns |= {"label_name": [names[label] for label in labels], "value": np.linspace(-1, 1, rows)}
    columns |= {
        "percentile": np.linspace(0, 100, rows),
        "num_epochs": [1] * rows,
        "status": ["valued"] * rows,
    }
    columns |= {"noise_score_std": np.full(rows, 0.01), "suggested_probability": np.full(rows, 0.9)}
    columns |= {"suggested_label": suggested, "suggested_name": [names[label] for label in suggested]}
    data = dataclasses.asdict(DataConfig(source=str(source)))
    metadata = {"class_names": names, "settings": {"data": data}, "fingerprint": "f"}
    table = pa.table(columns, schema=VALUES_SCHEMA)
    pq.write_table(with_metadata(table, metadata), path)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A page of a table with names that would run as a script or a tag, were they not escaped."""
    root = tmp_path_factory.mktemp("strange")
    labels = np.arange(60) % 3
    ids = [f"{n:02d}.png" for n in range(59)] + [BREAKING]
    for n, name in enumerate(ids):
        make_blobs(n, 32).save(root / name, "PNG")
    with (root / "t.csv").open("w", newline="") as file:
        rows = [(name, CLASSES[label]) for name, label in zip(ids, labels, strict=True)]
        csv.writer(file).writerows([("file_name", "label"), *rows])
    scores = np.where(np.arange(60) >= 30, 0.9 + np.arange(60) / 1000, 0.01)
    write_report(root / "v.parquet", root / "t.csv", ids, labels, CLASSES, scores, (labels + 1) % 3)
    result = invoke("report", root / "v.parquet", "-o", root / "r.html")
    assert result.exit_code == 0 and "60 pictures" in result.stderr, result.stderr
    return root


def test_names_are_shown_and_never_run(strange, opened):
    page = opened(strange / "r.html")
    first = page.locator(".card").first
    assert first.get_attribute("title") == BREAKING
    assert first.locator("span").first.text_content() == f"dog → {SCRIPT}"
    assert page.locator("#given option").all_text_contents() == ["all", *CLASSES]
    page.click("#tab-numbers")
    assert SCRIPT in page.locator("#confusion th").all_text_contents()
    assert page.evaluate("document.scripts.length") == 2 and page.evaluate("document.images.length") < 100


def test_nothing_is_asked_for_and_a_script_of_others_would_not_run(strange, opened):
    page = opened(strange / "r.html")
    page.evaluate("""() => { const s = document.createElement("script"); s.textContent = "window.ran = 1";
                     document.body.append(s); }""")
    assert page.evaluate("window.ran") is None
    page.faults.clear()  # the browser says that it refused
    assert "http" not in (strange / "r.html").read_text().replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )


def test_filters_and_order(strange, opened):
    page = opened(strange / "r.html")

    def ids():
        return [card.get_attribute("title") for card in page.locator(".card").all()]

    everything = ids()
    assert len(everything) == 60 and everything[0] == BREAKING
    page.select_option("#given", label="dog")
    assert len(ids()) == 20 and all(name == BREAKING or int(name[:2]) % 3 == 2 for name in ids())
    page.select_option("#suggested", label="cat")
    assert ids() == [] and "change the filters" in page.locator("#sheet").text_content()
    page.select_option("#given", "")
    page.select_option("#suggested", "")
    page.fill("#least", "0.95")
    assert len(ids()) == 10
    page.fill("#least", "0")
    page.fill("#search", "07.")
    assert ids() == ["07.png"]
    page.fill("#search", "")
    page.select_option("#flagged", "no")
    assert len(ids()) == 30 and max(ids()) == "29.png"
    page.select_option("#flagged", "")
    page.select_option("#sort", "value")
    assert page.get_attribute("#sheet", "aria-label") == "Samples by lowest value"
    assert ids()[:3] == ["00.png", "01.png", "02.png"]
    page.click("#tab-numbers")
    page.locator("#confusion button").first.click()
    assert page.locator("#given").input_value() == "0" and len(ids()) == 20


def test_neighbours_are_shown_beside_the_selected_sample(strange, opened, tmp_path):
    features = np.eye(3)[np.arange(60) % 3] + np.random.default_rng(0).normal(0, 0.01, (60, 3))
    np.save(tmp_path / "f.npy", features)
    result = invoke(
        "report", strange / "v.parquet", "--features", tmp_path / "f.npy", "-o", tmp_path / "r.html"
    )
    assert result.exit_code == 0, result.stderr
    page = opened(tmp_path / "r.html")
    assert page.locator("#detail h3").all_text_contents() == [
        "Surely dog, and most alike",
        f"Surely {SCRIPT}, and most alike",
    ]
    shown = page.locator("#detail figcaption").all_text_contents()
    assert [int(name[:2]) % 3 for name in shown] == [2, 2, 2, 0, 0, 0] and max(shown) < "30.png"
    assert page.locator("#detail .row img").count() == 6


def test_the_threshold_says_what_its_scores_say(strange, opened):
    page = opened(strange / "r.html")
    page.click("#tab-numbers")
    assert "from 0.930: 30 flagged" in page.text_content("#cut-text")  # the cut itself, not one near it
    thresholds = page.evaluate("JSON.parse(document.getElementById('data').textContent).curve.thresholds")
    place = thresholds.index(0.95)
    page.locator("#cut").fill(str(place))
    scores = 0.9 + np.arange(30, 60) / 1000
    flagged = scores[scores >= 0.95]
    assert f"{len(flagged)} flagged, about {flagged.sum():.0f} of them wrong" in page.text_content(
        "#cut-text"
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "photos", 15)
    (root / "photos/cow").mkdir()
    make_image(0, 5).save(root / "photos/cow/=1+1.png")
    ids = [path.removeprefix(f"{root}/photos/") for path, _ in ImageFolder(root / "photos").samples]
    labels = np.array([label for _, label in ImageFolder(root / "photos").samples])
    names = ["cat", "cow", "dog"]
    suggested = np.where(labels == 0, 2, 0)
    scores = np.linspace(0.999, 0.9, len(ids))
    write_report(root / "v.parquet", root / "photos", ids, labels, names, scores, suggested)
    result = invoke("report", root / "v.parquet", "-o", root / "r.html")
    assert result.exit_code == 0, result.stderr
    return root


def test_twenty_decisions_by_keyboard_survive_a_reload_and_are_applied(photos, opened, tmp_path):
    page = opened(photos / "r.html")
    page.fill("#by", 'Ada "A." Lovelace')
    page.press("#by", "Escape")
    keys = "rdkur" * 4
    for key in keys:
        page.keyboard.press(key)
    assert page.text_content("#progress") == "20 of 31 decided"
    page.keyboard.press("z")
    assert page.text_content("#progress") == "19 of 31 decided"
    page.keyboard.press("d")
    page.reload()
    assert page.text_content("#progress") == "20 of 31 decided"
    with page.expect_download() as download:
        page.click("#download")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "photos.decisions.csv"
    ids = [path.removeprefix(f"{photos}/photos/") for path, _ in ImageFolder(photos / "photos").samples]
    words = {"r": "relabel", "d": "drop", "k": "keep", "u": "unsure"}
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["id"] for row in rows] == ids[:20]
    assert [row["decision"] for row in rows] == [words[key] for key in keys[:19] + "d"]
    assert {row["by"] for row in rows} == {'Ada "A." Lovelace'}
    applied = chgval.apply(file, photos / "photos", output=tmp_path / "new", labels_only=False)
    assert applied.counts == {"keep": 4, "relabel": 7, "drop": 5, "unsure": 4} and applied.num_written == 26
    corrected = ImageFolder(tmp_path / "new")
    counts = Counter(corrected.classes[label] for _, label in corrected.samples)
    dropped, moved = [*ids[:20][1::5], ids[19]], [*ids[:20][0::5], *ids[4:19:5]]
    assert len(moved) == 7
    expected = {"cat": 15, "cow": 1, "dog": 15}
    for name in dropped:
        expected[name.split("/")[0]] -= 1
    for name in moved:
        given = name.split("/")[0]
        expected[given] -= 1
        expected["dog" if given == "cat" else "cat"] += 1
    assert counts == Counter(expected)


def test_decisions_are_loaded_again_and_those_about_others_are_kept(photos, opened, tmp_path):
    file = tmp_path / "d.csv"
    rows = [
        ("id", "label_name", "decision", "new_label_name", "by"),
        ("cat/000.png", "cat", "drop", "", "Ada"),
        ("cow/=1+1.png", "cow", "relabel", "dog", "'=Ada"),
        ("elsewhere.png", "cat", "keep", "", "Ada"),
        ("cat/001.png", "dog", "drop", "", "Ada"),
    ]
    with file.open("w", newline="") as text:
        csv.writer(text).writerows(rows)
    page = opened(photos / "r.html")
    page.set_input_files("#load", file)
    kept = "2 decisions loaded, 1 about samples that are not on this page kept, 1 left out"
    sync_api.expect(page.locator("#message")).to_contain_text(kept)
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "again.csv")
    with (tmp_path / "again.csv").open(newline="") as text:
        again = [
            (r["id"], r["label_name"], r["decision"], r["new_label_name"], r["by"])
            for r in csv.DictReader(text)
        ]
    assert again == rows[1:4]


def decisions_of(page, folder):
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(folder / "downloaded.csv")
    with (folder / "downloaded.csv").open(newline="") as text:
        return list(csv.DictReader(text))


def test_another_class_is_chosen_by_name_and_then_confirmed(photos, opened, tmp_path):
    page = opened(photos / "r.html")
    page.keyboard.press("c")
    page.keyboard.type("dog")  # a select takes letters as the start of a name; k, r, d and u are none there
    assert page.text_content("#progress") == "0 of 31 decided"
    page.keyboard.press("Enter")
    assert page.text_content("#progress") == "1 of 31 decided"
    page.select_option("#other", label="cow")
    page.get_by_text("Relabel (Enter)").click()
    rows = decisions_of(page, tmp_path)
    assert [(row["decision"], row["new_label_name"]) for row in rows] == [
        ("relabel", "dog"),
        ("relabel", "cow"),
    ]


def test_keys_decide_once_and_only_where_samples_are(photos, opened):
    page = opened(photos / "r.html")
    for _ in range(5):
        page.keyboard.down("d")  # all but the first are repeats of a key that is held
    page.keyboard.up("d")
    assert page.text_content("#progress") == "1 of 31 decided"
    page.focus("#theme")
    page.keyboard.press("k")
    page.focus("#download")
    page.keyboard.press("d")
    assert page.text_content("#progress") == "1 of 31 decided"
    page.locator("#filters summary").click()  # what folds the filters takes no letters
    page.keyboard.press("u")
    assert page.text_content("#progress") == "2 of 31 decided"
    page.keyboard.press("z")
    page.keyboard.press("/")
    page.keyboard.type("kdru")
    assert page.input_value("#search") == "kdru" and page.text_content("#progress") == "1 of 31 decided"
    page.fill("#search", "")
    assert page.locator(".card[tabindex='0']").count() == 1


def test_pages_of_one_report_share_decisions_and_so_do_tabs(photos, opened, tmp_path):
    for top in (5, 12):
        args = ("report", photos / "v.parquet", "--top", str(top), "-o", tmp_path / f"{top}.html")
        assert invoke(*args).exit_code == 0
    few = opened(tmp_path / "5.html")
    for key in "kdr":
        few.keyboard.press(key)
    many = few.context.new_page()
    many.goto((tmp_path / "12.html").resolve().as_uri())
    assert many.text_content("#progress") == "3 of 12 decided"
    many.locator(".card").last.click()
    many.keyboard.press("u")
    progress = "3 of 5 decided, and 1 that are not on this page"
    sync_api.expect(few.locator("#progress")).to_have_text(progress)
    few.locator(".card").nth(3).click()
    few.keyboard.press("d")
    sync_api.expect(many.locator("#progress")).to_have_text("5 of 12 decided")
    expected = [card.get_attribute("title") for card in many.locator(".card").all()]
    words = ["keep", "drop", "relabel", "drop", "unsure"]
    for page in (few, many):
        rows = decisions_of(page, tmp_path)
        assert [row["id"] for row in rows] == [*expected[:4], expected[11]]
        assert [row["decision"] for row in rows] == words


@pytest.mark.parametrize(
    ("encoding", "separator"), [("utf-8-sig", ";"), ("utf-16", "\t"), ("utf-8", ","), ("latin-1", ";")]
)
def test_decisions_that_a_spreadsheet_wrote_are_loaded_with_all_columns(
    photos, opened, tmp_path, encoding, separator
):
    lines = [
        "index;id;label_name;decision;new_label_name;note",
        "0;cat/000.png;cat;drop;;schön",
        ";;;;;",
        "77;gone.png;cat;relabel;dog;007",
        "78;gone2.png;cat;delete;;",
    ]
    text = "\r\n".join(lines).replace(";", separator)
    (tmp_path / "d.csv").write_bytes(text.encode(encoding))
    page = opened(photos / "r.html")
    page.set_input_files("#load", tmp_path / "d.csv")
    if encoding == "latin-1":
        sync_api.expect(page.locator("#message")).to_contain_text("save it as CSV UTF-8")
        return
    sync_api.expect(page.locator("#message")).to_contain_text(
        "1 decisions loaded, 1 about samples that are not on this page kept, 1 left out"
    )
    assert [row["note"] for row in decisions_of(page, tmp_path)] == ["schön", "007"]
    page.keyboard.press("z")  # what was loaded is nothing to undo
    assert page.text_content("#progress") == "1 of 31 decided, and 1 that are not on this page"


def test_issues_are_shown_filtered_and_told(photos, opened, tmp_path):
    for name in ("cat/014.png", "dog/000.png"):
        shutil.copy(photos / "photos/cat/003.png", photos / "photos" / name)
    ids = [path.removeprefix(f"{photos}/photos/") for path, _ in ImageFolder(photos / "photos").samples]
    labels = np.array([label for _, label in ImageFolder(photos / "photos").samples])
    scores = np.full(len(ids), 0.001)
    write_report(
        tmp_path / "v.parquet", photos / "photos", ids, labels, ["cat", "cow", "dog"], scores, 1 - labels % 2
    )
    found = invoke("detect-issues", tmp_path / "v.parquet", "-o", tmp_path / "i.csv")
    assert found.exit_code == 0, found.stderr
    args = ("--issues", tmp_path / "i.csv", "--top", "5", "-o", tmp_path / "r.html")
    assert invoke("report", tmp_path / "v.parquet", *args).exit_code == 0
    page = opened(tmp_path / "r.html")
    titles = {card.get_attribute("title") for card in page.locator(".card").all()}
    # Before what is not suspicious; the only cow is a picture of a cat, too.
    assert titles == {"cat/003.png", "cat/014.png", "dog/000.png", "cat/005.png", "cow/=1+1.png"}
    page.select_option("#issue", "copy with another label")
    page.locator(".card[title='dog/000.png']").click()
    assert "copy with another label" in page.text_content("#detail dl")
    assert page.locator("#detail h3").first.text_content() == "Copies of it"
    shown = page.locator("#detail figcaption").all_text_contents()
    assert sorted(shown) == ["cat: cat/003.png", "cat: cat/014.png"]
    page.select_option("#issue", "none")
    assert page.locator(".card").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(strange, opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = opened(strange / "r.html", color_scheme=scheme, bypass_csp=True)
    for tab in ("review", "numbers", "classes", "run"):
        page.click(f"#tab-{tab}")
        found = axe.Axe().run(page).response["violations"]
        assert not [
            (part["id"], part["impact"]) for part in found if part["impact"] in ("serious", "critical")
        ]


def test_pictures_of_a_thousand_samples_are_shown_as_they_scroll_in(tmp_path, opened):
    vectors = np.zeros((2000, 2)).tolist()
    labels = np.arange(2000) % 2
    images = [{"bytes": path.read_bytes(), "path": None} for path in [_png(tmp_path)]] * 2000
    pq.write_table(pa.table({"image": images, "label": labels, "v": vectors}), tmp_path / "t.parquet")
    scores = np.where(np.arange(2000) < 900, 0.99, 0.001)
    ids = [str(n) for n in range(2000)]
    write_report(tmp_path / "v.parquet", tmp_path / "t.parquet", ids, labels, ["a", "b"], scores, 1 - labels)
    result = invoke("report", tmp_path / "v.parquet", "-o", tmp_path / "r.html")
    assert result.exit_code == 0, result.stderr
    page = opened(tmp_path / "r.html")
    shown = "document.querySelectorAll('.card img[src]').length"
    page.wait_for_selector(".card img[src]")
    assert page.locator(".card").count() == 1000
    before = page.evaluate(shown)
    assert before < 150
    last = page.locator(".card").last
    last.scroll_into_view_if_needed()
    sync_api.expect(last.locator("img")).to_have_attribute("src", re.compile("^data:image/webp"))
    assert before < page.evaluate(shown) < 300


def _png(folder):
    make_blobs(0, 32).save(folder / "one.png")
    return folder / "one.png"


def test_without_its_dataset_the_page_says_that_it_has_no_pictures(photos, opened, tmp_path):
    shutil.copy(photos / "v.parquet", tmp_path)
    shutil.move(photos / "photos", photos / "moved")
    try:
        result = invoke("report", tmp_path / "v.parquet", "-o", tmp_path / "r.html")
    finally:
        shutil.move(photos / "moved", photos / "photos")
    assert result.exit_code == 0 and "no pictures: " in result.stderr
    page = opened(tmp_path / "r.html")
    assert "no pictures on this page" in page.text_content("header")
    assert page.locator(".card").count() == 31 and page.locator("img").count() == 0


# --- a newcomer's way, command by command

DIGITS, SIDE, PER_CLASS, NUM_WRONG = (0, 1, 4), 32, 40, 16


def write_pictures(root):
    """Scanned digits, enlarged, in class folders: to train on, some ones among the fours, and to test."""
    digits = load_digits()
    wrong = {}
    for label in DIGITS:
        for number, row in enumerate(np.flatnonzero(digits.target == label)):
            image = Image.fromarray((digits.images[row] * 15.9).astype(np.uint8))
            image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            folder, given = "photos" if number < PER_CLASS else "test", label
            if folder == "photos" and label == 1 and number < NUM_WRONG:
                given = 4
                wrong[f"{given}/{label}-{number}.png"] = str(label)
            path = root / folder / str(given) / f"{label}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return wrong


def typed(*args):
    result = run(*args)
    assert result.returncode == 0, (args, result.stderr)
    [following] = re.findall(r"^next: chgval (.*)$", result.stderr, re.MULTILINE) or [""]
    return result, following.split()


def test_from_a_folder_of_pictures_to_a_better_model(opened, tmp_path, monkeypatch):
    """As the README says it and a person does it: looks at the most suspicious, and corrects ten labels."""
    monkeypatch.chdir(tmp_path)
    truth = write_pictures(tmp_path)
    _, following = typed("train", "photos/", "--test", "test/", "-o", "before")
    _, following = typed("value", "photos/")
    assert following == ["report", "photos.values.parquet"]
    result, following = typed(*following)
    [address] = re.findall(r"open it in a browser: (\S+)", result.stderr)
    page = opened(Path(address.removeprefix("file://")))
    # Looks at each of the most suspicious pictures, and corrects the label where it is wrong.
    for place in range(page.locator(".card").count()):
        if sum("relabel" in text for text in page.locator(".card span.relabel").all_text_contents()) == 10:
            break
        card = page.locator(".card").nth(place)
        card.click()
        name = card.get_attribute("title")
        if name not in truth:
            page.keyboard.press("k")
        elif f"→ {truth[name]}" in page.text_content("#detail h2"):
            page.keyboard.press("r")
        else:
            page.keyboard.press("c")
            page.keyboard.type(truth[name])
            page.keyboard.press("Enter")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / download.value.suggested_filename)
    assert following[:2] == ["apply", "photos.decisions.csv"]
    with Path("photos.decisions.csv").open(newline="") as file:
        decided = list(csv.DictReader(file))
    relabelled = [row for row in decided if row["decision"] == "relabel"]
    assert len(relabelled) == 10 and len(decided) < 30  # wrong ones are found among the first
    _, following = typed(*following)
    assert following == ["value", "photos.corrected"]
    typed("train", "photos.corrected", "--test", "test/", "-o", "after")
    accuracies = [
        json.loads(Path(name, "training.json").read_text())["test"]["accuracy"]
        for name in ("before", "after")
    ]
    assert accuracies[1] > accuracies[0]
    result, _ = typed("compare", "before", "after")
    assert all(f"{accuracy:.2%}" in result.stderr for accuracy in accuracies)
    assert len(list(Path("photos.corrected").glob("*/*.png"))) == PER_CLASS * len(DIGITS)
    shutil.rmtree("photos.corrected")
