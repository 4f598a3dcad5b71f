"""The playground in a browser: ``python browser_client.py ADDRESS CHROMIUM FOLDER`` asserts what a person would see.

Pictures of the page go to FOLDER.
"""

import json
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

PATIENT_MS = 60_000
WIDTHS = ["int8", "int6", "int4", "int3", "int2"]


def answers(page: Page) -> None:
    """A width is chosen, an answer streams, and says which width wrote it."""
    page.locator("#width").select_option("tiny:int4")
    page.locator("#open").click()
    page.locator("#max_tokens").fill("24")
    page.locator("#box").fill("Tell me about the dog.")
    page.locator("#box").press("Enter")
    answer = page.locator(".message.assistant").last
    expect(answer.locator(".badge")).to_contain_text("int4")
    expect(answer.locator(".facts")).to_contain_text("24 tokens · ")
    expect(page.locator("#send")).to_have_text("Send")
    assert answer.locator(".text").inner_text()


def instructs(page: Page) -> None:
    """A system prompt goes before the conversation."""
    page.locator("#system").fill("You are brief.")
    page.locator("#box").fill("Hello")
    with page.expect_request("**/v1/chat/completions") as waiting:
        page.locator("#send").click()
    assert waiting.value.post_data_json["messages"][0] == {"role": "system", "content": "You are brief."}
    expect(page.locator("#send")).to_have_text("Send")
    page.locator("#system").fill("")


def changes(page: Page) -> None:
    """An answer is given again, and a question is edited."""
    count = page.locator(".message").count()
    page.locator(".message.assistant").last.get_by_role("button", name="Again").click()
    expect(page.locator(".message.assistant").last.locator(".facts")).to_contain_text("24 tokens · ")
    expect(page.locator("#send")).to_have_text("Send")
    assert page.locator(".message").count() == count
    page.locator(".message.user").last.get_by_role("button", name="Edit").click()
    expect(page.locator("#box")).to_have_value("Hello")
    assert page.locator(".message").count() == count - 2


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
    assert [badge.split()[0] for badge in page.locator(".columns .badge").all_inner_texts()] == WIDTHS
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


def fits_a_phone(page: Page) -> None:
    """Nothing is wider than the window, and the settings open."""
    page.set_viewport_size({"width": 390, "height": 844})
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator("#open").click()
    expect(page.locator("#send")).to_be_in_viewport()


def main() -> None:
    address, chromium, folder = sys.argv[1:]
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENT_MS)
        expect.set_options(timeout=PATIENT_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        expect(page.locator("#width option")).to_have_count(6)
        shown = page.locator("#width option").all_inner_texts()
        assert [text.split()[0] for text in shown[1:]] == WIDTHS
        assert all("bits" in text and "tok/s" in text for text in shown[1:])
        for part in (answers, instructs, changes, stops, compares, colours, keeps, fits_a_phone):
            part(page)
            page.screenshot(path=Path(folder) / f"{part.__name__}.png")
        browser.close()
    assert not problems, problems


main()
