"""The page against the scripted engine: every token it must show can be written down by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, expect

from tests.serving.scripted_engine import END_OF_TEXT, ScriptedEngine
from tests.serving.servers import Running, serve_scripted, wait_until

pytestmark = pytest.mark.slow


@contextmanager
def opened(page: Page, engine: ScriptedEngine | None = None, api_keys: tuple[str, ...] = ()) -> Iterator[Running]:
    """The page, open and connected to a server of its own."""
    with serve_scripted(engine, api_keys=api_keys) as server:
        page.goto(f"{server.url}/ui")
        expect(page.locator("#status")).to_have_text("connected")
        yield server


def says(text: str, **options: float) -> ScriptedEngine:
    return ScriptedEngine(lambda request: [*text.encode(), END_OF_TEXT], **options)  # type: ignore[arg-type]


def send(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def tokens(page: Page, kind: str = "") -> list[str]:
    return page.locator(f"#turns .token{kind}").all_text_contents()


def test_tokens_stream_in_and_say_where_they_came_from(page: Page) -> None:
    with opened(page, says("abcdefgh", step_s=0.05)) as server:
        server.engine.gate.clear()
        send(page, "hi")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        server.engine.gate.set()
        expect(page.locator(".figures")).to_contain_text("accepted length")
        # Steps of two drafts and the target's token; the last one ends after two tokens, one of them without text.
        assert tokens(page) == ["a", "b", "c", "d", "e", "f", "g", "h", ""]
        assert tokens(page, ".draft") == ["a", "b", "d", "e", "g", "h"]
        assert tokens(page, ".target") == ["c", "f", ""]
        figures = page.locator(".figures").inner_text()
        assert re.sub(r"\s+", " ", figures).startswith("accepted length 3.00 drafts accepted 100 % speed ")
        assert server.engine.seen[0].sampling.temperature == 0


def test_a_token_tells_its_place_and_the_targets_probability(page: Page) -> None:
    with opened(page, says("abcdef")):
        send(page, "hi")
        expect(page.locator(".figures")).to_be_visible()
        page.locator(".token", has_text="b").hover()
        tip = page.get_by_role("tooltip")
        expect(tip).to_contain_text("Drafted and accepted")
        expect(tip).to_contain_text("place 2 of 2 in the block")
        expect(tip).to_contain_text("log-probability \N{MINUS SIGN}0.50 (60.7 %)")
        page.locator(".token", has_text="c").hover()
        expect(tip).to_contain_text("all 2 drafts were accepted")
        # The same with the keyboard alone.
        page.locator(".answer .words").focus()
        page.keyboard.press("Home")
        expect(tip).to_contain_text("place 1 of 2")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".token.current")).to_have_text("b")
        page.keyboard.press("Escape")
        expect(tip).to_be_hidden()


def test_markup_in_an_answer_stays_text(page: Page) -> None:
    attack = '<script>document.title="owned"</script><img src=x onerror="document.title=1"><b>bold</b> & é 😀'
    with opened(page, says(attack)):
        send(page, "<i>hello</i>")
        expect(page.locator(".figures")).to_be_visible()
        assert page.locator(".answer .words").text_content() == attack
        assert page.locator(".user .words").text_content() == "<i>hello</i>"
        assert page.locator("#turns :is(script, img, b, i)").count() == 0
        assert page.title() == "Draftline"


def test_stopping_frees_the_slot_and_keeps_what_came(page: Page) -> None:
    with opened(page, ScriptedEngine(step_s=0.02)) as server:
        send(page, "count")
        expect(page.locator(".token").nth(5)).to_be_visible()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".figures .note")).to_have_text("stopped")
        wait_until(lambda: len(server.engine.cancelled_ids) == 1)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        # The next turn knows the half answer; Escape stops, too.
        said = page.locator(".answer .words").first.text_content()
        send(page, "more")
        expect(page.locator(".answer").nth(1).locator(".token").first).to_be_visible()
        page.keyboard.press("Escape")
        wait_until(lambda: len(server.engine.cancelled_ids) == 2)
        prompt = bytes(server.engine.seen[1].prompt_ids).decode()
        assert prompt == f"user:count\nassistant:{said}\nuser:more\n"


def test_controls_reach_the_engine_and_a_new_chat_forgets(page: Page) -> None:
    with opened(page, says("yes")) as server:
        page.get_by_text("Settings").click()
        page.locator("#system").fill("be brief")
        page.locator("#temperature").fill("0.7")
        page.locator("#max-tokens").fill("17")
        send(page, "one")
        expect(page.locator(".figures")).to_have_count(1)
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_role("heading", name="Ask something")).to_be_visible()
        send(page, "two")
        expect(page.locator(".figures")).to_have_count(1)
        request = server.engine.seen[1]
        assert bytes(request.prompt_ids).decode() == "system:be brief\nuser:two\n"
        assert (request.sampling.temperature, request.sampling.max_tokens) == (0.7, 17)


def test_errors_come_in_words_and_can_be_tried_again(page: Page) -> None:
    with opened(page, says("yes")) as server:
        page.get_by_text("Settings").click()
        page.locator("#max-tokens").fill("9999")
        send(page, "hello")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("This model's maximum context length is 512 tokens")
        page.locator("#max-tokens").fill("20")
        alert.get_by_role("button", name="Try again").click()
        expect(page.locator(".answer .words")).to_have_text("yes")
        expect(page.locator(".user")).to_have_count(1)
        expect(alert).to_have_count(0)
        server.engine.crash = RuntimeError("boom")
        send(page, "again")
        expect(alert).to_contain_text("The engine failed while answering")
        assert "boom" not in page.content()


def test_a_server_that_is_gone_is_said_so(page: Page) -> None:
    with opened(page):
        pass
    expect(page.locator("#status")).to_have_text("not reachable")
    send(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(page: Page) -> None:
    with opened(page, says("yes"), api_keys=("sesame",)):
        expect(page.get_by_label("API key")).to_be_visible()
        send(page, "hello")
        expect(page.get_by_role("alert")).to_contain_text("A valid API key is needed")
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".answer .words")).to_have_text("yes")
        assert page.evaluate("sessionStorage.getItem('draftline.api-key')") == "sesame"
        assert page.evaluate("localStorage.length") == 0
        assert page.evaluate("document.cookie") == ""
        page.reload()
        expect(page.get_by_label("API key")).to_have_value("sesame")


def test_charts_follow_the_load(page: Page) -> None:
    with opened(page, ScriptedEngine(step_s=0.05)) as server:
        load, length = page.locator(".chart svg").nth(0), page.locator(".chart svg").nth(1)
        expect(load).to_have_attribute("aria-label", "Load and budget: requests 0, budget unknown")
        send(page, "count")
        expect(load).to_have_attribute("aria-label", "Load and budget: requests 1, budget 2.0")
        expect(length).to_have_attribute("aria-label", "Accepted length: tokens a step 3.00")
        expect(page.locator("#tile-running")).to_have_text("1")
        speed = page.locator("#tile-speed")
        expect(speed).not_to_have_text("0")
        before = load.locator("path.line").first.get_attribute("d") or ""
        expect(load.locator("path.line").first).not_to_have_attribute("d", before)
        page.get_by_role("button", name="Stop").click()
        expect(load).to_have_attribute("aria-label", "Load and budget: requests 0, budget unknown")
        figures = httpx.get(f"{server.url}/ui/load").json()
        assert figures["totals"]["num_draft_tokens"] == 2 * figures["totals"]["num_steps"] > 0


def test_colours_follow_the_system_and_can_be_switched_off(browser: Browser) -> None:
    grounds, inks = {}, {}
    with serve_scripted(says("abc")) as server:
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
            page = context.new_page()
            page.goto(f"{server.url}/ui")
            send(page, "hi")
            expect(page.locator(".figures")).to_be_visible()
            grounds[scheme] = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            token = page.locator(".token.draft").first
            inks[scheme] = token.evaluate("it => getComputedStyle(it).backgroundColor")
            page.get_by_label("colour tokens").uncheck()
            assert token.evaluate("it => getComputedStyle(it).backgroundColor") == "rgba(0, 0, 0, 0)"
            context.close()
    assert grounds["light"] != grounds["dark"]
    assert inks["light"] != inks["dark"]


def test_nothing_is_asked_of_any_other_host_and_a_narrow_screen_will_do(page: Page) -> None:
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    page.set_viewport_size({"width": 360, "height": 640})
    with opened(page, says("abc")) as server:
        send(page, "hi")
        expect(page.locator(".figures")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.get_by_role("button", name="Live").click()
        expect(page.locator(".chart").first).to_be_visible()
        assert {request.url.startswith(server.url) for request in asked} == {True}


def test_the_browser_refuses_markup_and_inline_scripts(browser: Browser) -> None:
    with serve_scripted() as server:
        page = browser.new_page()
        page.goto(f"{server.url}/ui")
        probe = """() => {
            const script = Object.assign(document.createElement("script"), { id: "probe" });
            try { script.text = "document.title = 'owned'"; } catch {}
            script.append("document.title = 'owned'");
            document.body.append(script);
            try { document.body.innerHTML = "<b>x</b>"; } catch (error) { return error.name; }
        }"""
        assert page.evaluate(probe) == "TypeError"
        assert page.title() == "Draftline"
        page.close()
