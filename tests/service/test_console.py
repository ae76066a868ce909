"""The page in headless Chromium, with a real service, ranks, sampler, and Tinker's client.

Whatever a test does, nothing may be asked of another origin, and the browser may have no complaint:
not of a script, not of the content security policy.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker

from tests.fixtures.small_model import make_small_model
from tests.service.page import CHROMIUM, FLAGS, WAIT_MS, Seen, Trained, expect, playwright
from tests.service.sdk_clients import client, close_clients
from tests.service.server import NAME, Server

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
STEPS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    model = make_small_model(tmp_path_factory.mktemp("model"))
    server = Server(model, tmp_path_factory.mktemp("service"))
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def service(server: Server) -> tinker.ServiceClient:
    return client(server)


@pytest.fixture(scope="module")
def trained(server: Server, service) -> Trained:
    run = Trained(server, service, "the first")
    for _ in range(STEPS):
        run.step()
    run.training.save_state("state").result()
    run.training.save_weights_for_sampler("drawn").result()
    run.training.save_weights_and_get_sampling_client()
    return run


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def seen(browser, server: Server, trained: Trained) -> Iterator[Seen]:
    seen = Seen(browser, server)
    seen.sign_in(server.key)
    yield seen
    seen.close()


def values_along(chart) -> list[tuple[int, float]]:
    """Return steps and values of a chart, by the keyboard, as a screen reader tells them."""
    chart.focus()
    chart.press("Home")
    told: list[tuple[int, float]] = []
    while True:
        words = chart.get_attribute("aria-valuetext").removeprefix("step ").split(": ")
        step, value = int(words[0]), float(words[1].replace(",", ""))
        if told and told[-1][0] == step:
            return told
        told.append((step, value))
        chart.press("ArrowRight")


def test_a_run_is_shown_while_it_trains_with_the_values_that_its_client_was_told(
    server, service, seen
) -> None:
    run = Trained(server, service, "while it trains")
    line = seen.page.get_by_role("button", name="while it trains")
    for _ in range(2):
        run.step()
    line.click()
    for _ in range(3):
        run.step()
    for curve, values in (
        ("Loss of a step, summed", run.losses),
        ("Loss per token", [loss / 12 for loss in run.losses]),
        ("Gradient norm", run.norms),
        ("Reward", run.rewards),
    ):
        chart = seen.page.get_by_role("slider", name=f"{curve}, by step")
        expect(chart).to_have_attribute("aria-valuemax", "5", timeout=WAIT_MS)
        expect(chart.locator("circle.dot")).to_have_count(5)
        found = values_along(chart)
        assert [step for step, _ in found] == [1, 2, 3, 4, 5]
        assert [value for _, value in found] == pytest.approx(values, rel=1e-3), curve
    expect(seen.page.locator("tr[data-current] .number").first).to_have_text("5")


def test_curves_outlive_the_page_and_are_saved_as_a_table(seen, trained) -> None:
    seen.page.get_by_role("button", name="the first").click()
    expect(seen.page.locator("[data-curve=reward]")).to_be_visible()
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Save CSV").click()
    lines = Path(download.value.path()).read_text().splitlines()
    names = lines[0].split(",")
    sums = [float(line.split(",")[names.index("loss:sum")]) for line in lines[1:]]
    assert names[:3] == ["step", "loss", "reward"]
    assert sums == pytest.approx(trained.losses, rel=1e-12)


def test_two_runs_are_compared_in_one_chart(server, service, seen) -> None:
    other = Trained(server, service, "another")
    other.step()
    seen.page.get_by_role("button", name="the first").click()
    seen.page.get_by_label("Plot another").check()
    chart = seen.page.get_by_role("slider", name="Loss per token, by step")
    expect(chart.locator("path.line")).to_have_count(2)
    chart.focus()
    chart.press("Home")
    told = chart.get_attribute("aria-valuetext")
    assert "the first" in told
    assert "another" in told


def test_base_and_adapter_answer_side_by_side(seen, trained) -> None:
    page = seen.page
    page.get_by_role("tab", name="Playground").click()
    expect(page.get_by_role("combobox", name="Left model")).to_have_value(NAME)
    expect(page.get_by_role("combobox", name="Right model")).to_have_value(f"{trained.id}/latest")
    page.get_by_label("Prompt").fill("Who are you?")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Control+Enter")
    done = page.locator(".ask [role=status]")
    expect(done).to_contain_text("token", timeout=WAIT_MS)
    for side in ("Left model", "Right model"):
        region = page.get_by_role("region", name=side)
        expect(region.locator(".stats")).to_contain_text("tok/s")
        expect(region.locator(".stats")).to_contain_text("mean log p")
        answer = region.get_by_role("group", name="Answer")
        answer.focus()
        answer.press("ArrowRight")
        expect(region.locator(".token-info")).to_contain_text("log p")
    first = page.locator(".side .tokens").all_inner_texts()
    assert len(first) == 2
    page.get_by_role("combobox", name="Right model").select_option(label="drawn of the first")
    page.get_by_role("button", name="Sample").click()
    expect(done).to_contain_text("token", timeout=WAIT_MS)
    assert page.locator(".side .tokens").all_inner_texts() == first  # the same weights, saved


def test_a_conversation_goes_on(seen) -> None:
    page = seen.page
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("Chat", exact=True).check()
    page.get_by_label("Max tokens").fill("4")
    for turn in (1, 2):
        page.get_by_label("Message").fill(f"message {turn}")
        page.get_by_role("button", name="Sample").click()
        expect(page.get_by_label("Message")).to_have_value("", timeout=WAIT_MS)
        expect(page.get_by_role("region", name="Left model").locator(".said")).to_have_count(turn)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".said")).to_have_count(0)


def test_a_checkpoint_is_downloaded_published_and_deleted(server, seen, trained) -> None:
    trained.training.save_weights_for_sampler("to-delete", ttl_seconds=7200).result()
    page = seen.page
    page.get_by_role("tab", name="Checkpoints").click()
    page.get_by_label("Find").fill("to-delete")
    line = page.locator("#checkpoints tbody tr")
    expect(line).to_have_count(1)
    expect(line).to_contain_text("in 2 hr.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download to-delete").click()
    with tarfile.open(fileobj=io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.getnames())
    assert download.value.suggested_filename.endswith("_sampler_weights_to-delete.tar")
    page.get_by_role("button", name="Publish to-delete").click()
    dialog = page.get_by_role("dialog", name="Publish this checkpoint?")
    dialog.get_by_role("button", name="Publish").click()
    expect(line).to_contain_text("all keys")
    page.get_by_role("button", name="Delete to-delete").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(line).to_have_count(1)
    page.get_by_role("button", name="Delete to-delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(line).to_have_count(0)
    with server.http() as http:
        left = http.get("/checkpoints").json()["checkpoints"]
    assert not [each for each in left if "to-delete" in each["tinker_path"]]


def test_health_tells_of_ranks_sampler_versions_and_their_mismatch(seen) -> None:
    page = seen.page
    page.get_by_role("tab", name="Health").click()
    card = page.get_by_role("article", name=NAME)
    expect(card.locator(".title .pill")).to_have_text("ready")
    ranks = card.locator("section", has=page.get_by_role("heading", name="Ranks"))
    expect(ranks.locator("tbody .pill")).to_have_text(["idle"])
    expect(card).to_contain_text("transformers, ready")
    versions = card.locator("section", has=page.get_by_role("heading", name="Versions"))
    expect(versions.locator("tbody tr", has_text="the first").first).to_contain_text("live")
    mismatch = card.locator("section", has=page.get_by_role("heading", name="Sampler against"))
    greatest = mismatch.locator("tbody tr").first.locator("td").nth(4)
    expect(greatest).to_have_attribute("data-tone", "good")
    assert float(greatest.inner_text()) < 1e-3


def focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


def test_all_of_it_is_reached_by_the_keyboard(seen) -> None:
    page = seen.page
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to content"
    page.keyboard.press("Tab")
    walk = []
    for _ in range(5):
        walk.append(focused(page))
        panel = page.locator("[role=tabpanel]:visible")
        assert panel.get_attribute("aria-labelledby") == focused(page)
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.keyboard.press("ArrowRight")
    assert walk == ["tab-runs", "tab-checkpoints", "tab-playground", "tab-health", "tab-runs"]
    page.keyboard.press("End")
    assert focused(page) == "tab-health"
    page.keyboard.press("Home")
    seen_stops = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen_stops.add(
            page.evaluate(
                "document.activeElement.getAttribute('role') || document.activeElement.type"
            )
        )
    assert {"checkbox", "button", "range", "slider"} <= seen_stops


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_light_and_in_dark(browser, server, trained, scheme) -> None:
    seen = Seen(browser, server, color_scheme=scheme, reduced_motion="reduce")
    seen.sign_in(server.key)
    page = seen.page
    for tab in ("Runs", "Checkpoints", "Playground", "Health"):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator("[role=tabpanel]:visible")).to_have_count(1)
        low = page.evaluate(CONTRASTS)
        assert low == [], (scheme, tab)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    other = "dark" if scheme == "light" else "light"
    for _ in range(3):
        if page.evaluate("document.documentElement.dataset.theme") == other:
            break
        page.get_by_role("button", name="Theme").click()
    assert page.evaluate(ground) != before
    page.reload()
    expect(page.locator("#connection")).to_have_text("live", timeout=WAIT_MS)
    assert page.evaluate("document.documentElement.dataset.theme") == other
    seen.close()


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color, under) => {
    canvas.fillStyle = `rgb(${under})`;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (color) => {
    const [r, g, b] = color.map((byte) => {
      const v = byte / 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const under = element.parentElement ? ground(element.parentElement) : [255, 255, 255];
    return rgb(getComputedStyle(element).backgroundColor, under);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const left_out = element.closest(":disabled, dialog, .hidden, .skip, option");
    if (!own || left_out || !element.checkVisibility()) continue;
    const under = ground(element);
    const style = getComputedStyle(element);
    const color = element.closest("svg") ? style.fill : style.color;
    const [one, two] = [light(rgb(color, under)), light(under)];
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    const said = element.textContent.trim().slice(0, 30);
    if (contrast < 4.5) found.push(`${element.tagName} ${said} ${contrast.toFixed(2)}`);
  }
  return found;
}"""
"""Texts whose contrast to what is below them is less than WCAG's AA asks for."""


def test_it_fits_a_telephone(browser, server, trained) -> None:
    seen = Seen(browser, server)
    seen.page.set_viewport_size({"width": 360, "height": 780})
    seen.sign_in(server.key)
    for tab in ("Runs", "Checkpoints", "Playground", "Health"):
        seen.page.get_by_role("tab", name=tab).click()
        wide = seen.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, tab
    seen.close()


def test_another_projects_key_sees_nothing_of_the_first(browser, server, trained) -> None:
    seen = Seen(browser, server)
    seen.sign_in(server.create_key("--project", "other"))
    expect(seen.page.get_by_role("heading", name="No runs yet")).to_be_visible()
    for tab in ("Checkpoints", "Playground", "Health"):
        seen.page.get_by_role("tab", name=tab).click()
    assert trained.id not in seen.page.content()
    assert "the first" not in seen.page.content()
    assert seen.page.locator("#model-right option").count() == 1
    seen.close()


def test_a_key_that_is_not_known_is_refused_and_forgotten(browser, server) -> None:
    seen = Seen(browser, server)
    page = seen.page
    page.get_by_label("API key").fill("tml-" + "0" * 43)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not known")
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0
    assert [each for each in seen.wrong if "401" not in each] == []
    seen.wrong.clear()  # a browser notes every answer that is none
    seen.close()


def test_the_policy_lets_nothing_inline_run(seen) -> None:
    answer = httpx.get(seen.page.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    seen.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); }"
    )
    assert seen.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in each for each in seen.wrong)
    seen.wrong.clear()


def test_the_page_waits_for_a_service_that_is_started_again(browser, server, trained) -> None:
    seen = Seen(browser, server)
    seen.sign_in(server.key)
    close_clients()
    server.kill()
    expect(seen.page.locator("#connection")).to_have_text("no connection", timeout=WAIT_MS)
    server.start()
    expect(seen.page.locator("#connection")).to_have_text("live", timeout=60_000)
    chart = seen.page.get_by_role("slider", name="Reward, by step")
    seen.page.get_by_role("button", name="the first").click()
    expect(chart).to_have_attribute("aria-valuemax", str(STEPS), timeout=WAIT_MS)
    assert [value for _, value in values_along(chart)] == trained.rewards
    seen.wrong.clear()  # that nothing answered for a while is what was done to it
    seen.close()
