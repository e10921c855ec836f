"""The page in a real browser: it shows the model's words, their probabilities, and mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llm.generate import Engine, load_model
from llm.generate.scheduler import Scheduler
from tests.unit.generate.runs import write_run
from tests.unit.serve.browser import browser, fill, missing, point_at, wait_for_status
from tests.unit.serve.fakes import PacedScheduler, Served, served

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run: Path = write_run(tmp_path_factory.mktemp("runs") / "tiny")
    model, tokenizer, _ = load_model(run)
    with served(Scheduler(Engine(model, eos_id=tokenizer.eos_id)), tokenizer=tokenizer, context=48) as found:
        yield found


def complaints(driver: Any) -> list[str]:
    """What the browser has to say against the page, such as a violated security policy."""
    return [entry["message"] for entry in driver.get_log("browser") if "status of 4" not in entry["message"]]


def tokens(driver: Any) -> list[Any]:
    return driver.find_elements("css selector", "#output .token")


def test_a_prompt_is_continued(driver: Any, server: Served) -> None:
    driver.get(server.url)
    for name, value in (("prompt", "h\u00e9 [x]"), ("temperature", "0"), ("max_tokens", "20")):
        fill(driver, name, value)
    driver.find_element("id", "go").click()
    status = wait_for_status(driver, "ended by")
    body = {"prompt": "h\u00e9 [x]", "temperature": 0, "max_tokens": 20, "logprobs": 5}
    answer = server.json("/v1/completions", body)
    (choice,) = answer["choices"]
    assert f"ended by {choice['finish_reason']}: {answer['usage']['completion_tokens']} tokens" in status
    shown = tokens(driver)
    assert driver.find_element("css selector", "#output .prompt").text == "h\u00e9 [x]"
    text = "".join(token.get_property("textContent") for token in shown)
    assert text.rstrip("\ufffd") == choice["text"].rstrip("\ufffd") != ""
    logprobs = [driver.execute_script("return arguments[0].logprob", token) for token in shown]
    assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
    colours = {token.value_of_css_property("background-color") for token in shown}
    assert len(colours) > 1 and "rgba(0, 0, 0, 0)" not in colours
    assert driver.find_element("id", "model").text == "tiny"

    tip = driver.find_element("id", "tip")
    assert not tip.is_displayed()
    point_at(driver, shown[3])
    assert tip.is_displayed()
    rows = tip.find_elements("css selector", "tr")
    assert len(rows) == 5
    first = rows[0].find_elements("css selector", "td")
    assert float(first[2].text) == pytest.approx(max(choice["logprobs"]["top_logprobs"][3].values()), abs=1e-3)
    assert len(tip.find_elements("css selector", ".chosen")) == 1
    assert complaints(driver) == []


def test_mistakes_are_shown(driver: Any, server: Served) -> None:
    driver.get(server.url)
    fill(driver, "prompt", "a" * 100)
    driver.find_element("id", "go").click()
    assert "the prompt has 101 tokens" in wait_for_status(driver, "prompt")
    assert driver.find_element("id", "go").is_enabled()
    assert complaints(driver) == []


def test_a_key_is_asked_for_and_sent(driver: Any) -> None:
    with served(PacedScheduler(), api_key="k" * 20) as server:
        driver.get(server.url)
        fill(driver, "prompt", "abc")
        fill(driver, "max_tokens", "9")
        driver.find_element("id", "go").click()
        wait_for_status(driver, "wrong API key")
        fill(driver, "key", "k" * 20)
        driver.find_element("id", "go").click()
        wait_for_status(driver, "ended by stop: 4 tokens after 4")
        assert [token.text for token in tokens(driver)] == ["c", "b", "a"]


def test_stopping_frees_the_request(driver: Any) -> None:
    scheduler = PacedScheduler()
    scheduler.pace()
    with served(scheduler) as server:
        driver.get(server.url)
        fill(driver, "prompt", "abc")
        fill(driver, "max_tokens", "9")
        driver.find_element("id", "go").click()
        scheduler.wait_for("submit")
        scheduler.permit(2)
        driver.find_element("id", "stop").click()
        scheduler.wait_for("cancel")
        wait_for_status(driver, "stopped")


def test_markup_in_an_answer_is_text(driver: Any) -> None:
    with served(PacedScheduler()) as server:
        driver.get(server.url)
        fill(driver, "prompt", "<b>x</b>"[::-1])
        fill(driver, "max_tokens", "8")
        driver.find_element("id", "go").click()
        wait_for_status(driver, "ended by")
        assert "".join(token.get_property("textContent") for token in tokens(driver)) == "<b>x</b>"
        assert driver.find_elements("css selector", "#output b") == []
