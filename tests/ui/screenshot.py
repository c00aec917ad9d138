"""Takes the picture in the documentation from a running endpoint of the demo.

``python -m tests.ui.screenshot http://127.0.0.1:8000 docs/img/ui.png``

Asks a few questions side by side, so that the charts have a load to show, then
one in the page itself, and waits with the pointer on a token.
"""

from __future__ import annotations

import sys
import threading
from importlib import resources

import httpx
from playwright.sync_api import expect, sync_playwright

from tests.ui.conftest import find_chromium

OTHERS = tuple(
    f"Customer: {said}\nReply:"
    for said in (
        "How do I change the delivery address of my subscription?",
        "I was charged twice for the same bag of beans.",
        "The grinder of my Brew makes a loud noise since yesterday.",
        "When is my refund paid out?",
    )
)
QUESTION = "Customer: My Orvelo Brew was due on Monday and has not arrived. Can you find out where it is?\nReply:"


def ask(url: str, model: str, system: str, question: str) -> None:
    """One whole answer."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0}
    httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 110}, timeout=300).raise_for_status()


def main(url: str, file: str, scheme: str = "light") -> None:
    """Take the picture.

    Args:
        url: Root of the endpoint.
        file: Where to write the PNG.
        scheme: ``light`` or ``dark``.
    """
    system = (resources.files("draftline.workloads") / "support_desk" / "system_prompt.txt").read_text().strip()
    model = httpx.get(f"{url}/ui/load").json()["model"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(
            viewport={"width": 1280, "height": 760},
            device_scale_factor=1.5,
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        page = context.new_page()
        page.set_default_timeout(300_000)
        page.goto(f"{url}/ui")
        page.get_by_text("Settings").click()
        page.locator("#system").fill(system)
        page.get_by_text("Settings").click()
        page.wait_for_timeout(8_000)
        threads = [threading.Thread(target=ask, args=(url, model, system, other)) for other in OTHERS]
        for thread in threads:
            thread.start()
            page.wait_for_timeout(2_500)
        for thread in threads:
            while thread.is_alive():
                page.wait_for_timeout(200)
        page.locator("#message").fill(QUESTION)
        page.locator("#message").press("Enter")
        expect(page.locator(".figures")).to_be_visible(timeout=300_000)
        page.wait_for_timeout(2_000)
        page.locator("#turns .token.draft").nth(24).hover()
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
