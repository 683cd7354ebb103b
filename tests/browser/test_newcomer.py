"""From a folder of pictures with wrong labels to a better model, as the README says it."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.browser.test_review_page import CHROMIUM
from tests.commands import run

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

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


def chgval(*args):
    result = run(*args)
    assert result.returncode == 0, (args, result.stderr)
    [following] = re.findall(r"^next: chgval (.*)$", result.stderr, re.MULTILINE) or [""]
    return result, following.split()


def test_from_a_folder_of_pictures_to_a_better_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth = write_pictures(tmp_path)
    _, following = chgval("train", "photos/", "--test", "test/", "-o", "before")
    _, following = chgval("value", "photos/")
    assert following == ["report", "photos.values.parquet"]
    result, following = chgval(*following)
    [address] = re.findall(r"open it in a browser: (\S+)", result.stderr)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(accept_downloads=True).new_page()
        page.goto(address)
        # Looks at each of the most suspicious pictures, and corrects the label where it is wrong.
        for place in range(page.locator(".card").count()):
            if (
                sum("relabel" in text for text in page.locator(".card span.relabel").all_text_contents())
                == 10
            ):
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
        browser.close()
    assert following[:2] == ["apply", "photos.decisions.csv"]
    with Path("photos.decisions.csv").open(newline="") as file:
        decided = list(csv.DictReader(file))
    relabelled = [row for row in decided if row["decision"] == "relabel"]
    assert len(relabelled) == 10 and len(decided) < 30  # wrong ones are found among the first
    _, following = chgval(*following)
    assert following == ["value", "photos.corrected"]
    chgval("train", "photos.corrected", "--test", "test/", "-o", "after")
    accuracies = [
        json.loads(Path(name, "training.json").read_text())["test"]["accuracy"]
        for name in ("before", "after")
    ]
    assert accuracies[1] > accuracies[0] + 0.03
    result, _ = chgval("compare", "before", "after")
    assert all(f"{accuracy:.2%}" in result.stderr for accuracy in accuracies)
    assert len(list(Path("photos.corrected").glob("*/*.png"))) == PER_CLASS * len(DIGITS)
    shutil.rmtree("photos.corrected")
