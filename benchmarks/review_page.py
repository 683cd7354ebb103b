"""How fluid a review page is: the longest time between two frames while all of it scrolls by.

python benchmarks/review_page.py photos.report.html
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SCROLL = """async () => {
  const gaps = [];
  let before = performance.now();
  for (let y = 0; y < document.documentElement.scrollHeight; y += 120) {
    window.scrollTo(0, y);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - before);
    before = now;
  }
  gaps.sort((a, b) => b - a);
  return gaps;
}"""


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page.goto(Path(sys.argv[1]).resolve().as_uri())
        page.wait_for_timeout(1000)
        gaps = page.evaluate(SCROLL)
        cards = page.locator(".card").count()
        print(f"{cards} samples, {len(gaps)} frames; longest {gaps[0]:.0f}, {gaps[1]:.0f}, {gaps[2]:.0f} ms")
        print(f"median {gaps[len(gaps) // 2]:.0f} ms; over 100 ms: {sum(gap > 100 for gap in gaps)}")
        browser.close()


if __name__ == "__main__":
    main()
