"""The playground in a browser: ``python browser_client.py ADDRESS CHROMIUM`` asserts what a person would see."""

import json
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

PATIENT_MS = 60_000


def answers(page: Page) -> None:
    """A width is chosen, an answer streams, and says which width wrote it."""
    page.locator("#width").select_option("tiny:int4")
    page.locator("#open").click()
    page.locator("#max_tokens").fill("24")
    page.locator("#box").fill("Tell me about the dog.")
    page.locator("#box").press("Enter")
    answer = page.locator(".message.assistant").last
    expect(answer.locator(".badge")).to_contain_text("int4")
    expect(answer.locator(".facts")).to_contain_text("tokens ·")
    expect(page.locator("#send")).to_have_text("Send")
    assert answer.locator(".text").inner_text()


def stops(page: Page) -> None:
    page.locator("#max_tokens").fill("400")
    page.locator("#box").fill("Once upon a time")
    page.locator("#send").click()
    expect(page.locator(".message.assistant").last.locator(".text")).not_to_be_empty()
    page.locator("#send").click()
    expect(page.locator("#send")).to_have_text("Send")


def compares(page: Page) -> None:
    """The same prompt at every width, side by side."""
    page.locator("#new").click()
    page.locator("#max_tokens").fill("4")
    page.locator("#compare").click()
    page.locator("#box").fill("The cat")
    page.locator("#send").click()
    expect(page.locator(".columns > div")).to_have_count(5)
    expect(page.locator("#send")).to_have_text("Send")
    page.locator("#compare").click()


def colours(page: Page) -> None:
    page.locator("#colours").check()
    page.locator("#box").fill("The bird")
    page.locator("#send").click()
    spans = page.locator(".message.assistant").last.locator(".text span")
    expect(spans.first).to_be_visible()
    assert (spans.first.get_attribute("title") or "").endswith("%")
    expect(page.locator("#send")).to_have_text("Send")


def keeps(page: Page) -> None:
    """Export, reload, and start anew; an error is shown."""
    with page.expect_download() as waiting:
        page.locator("#export").click()
    kept = json.loads(Path(waiting.value.path()).read_text())
    roles = [message["role"] for message in kept["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    page.reload()
    expect(page.locator(".message")).to_have_count(len(roles))
    page.locator("#new").click()
    expect(page.locator(".message")).to_have_count(0)
    page.locator("#open").click()
    page.locator("#temperature").fill("-1")
    page.locator("#box").fill("Hi")
    page.locator("#send").click()
    expect(page.locator("#toast")).to_contain_text("temperature")
    expect(page.locator("#box")).to_have_value("Hi")


def main() -> None:
    address, chromium = sys.argv[1:]
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENT_MS)
        expect.set_options(timeout=PATIENT_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        expect(page.locator("#width option")).to_have_count(6)
        for part in (answers, stops, compares, colours, keeps):
            part(page)
        browser.close()
    assert not problems, problems


main()
