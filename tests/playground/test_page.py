"""The page itself: asked by programs and by a browser, by several visitors at once, and ended by Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from typer.testing import CliRunner

from foveate.commands.app import app
from foveate.playground import serving
from foveate.playground.table import Table

gradio = pytest.importorskip("gradio")
uvicorn = pytest.importorskip("uvicorn")

# Those of gradio's own parts are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FRAMES = [f"examples/clip/{number}.png" for number in range(1, 7)]
PHONE = 390  # pixels


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A playground in this process, until the tests are over."""
    folder = tmp_path_factory.mktemp("playground")
    with pytest.MonkeyPatch.context() as patch, serving.listen("127.0.0.1", 0) as listener:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        config = uvicorn.Config(serving.application(Table(), folder), log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        running = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        running.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        running.join(20)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from foveate.playground.page import Page

    return Page(Table(), tmp_path_factory.mktemp("page"))


# -- what happens behind the page -------------------------------------------------------------------------------------


def test_a_clip_goes_to_the_model_that_sees_clips_and_a_picture_back(page):
    assert page.fitting_model(FRAMES, True, "glimpse") == "glimpse-video"
    assert page.fitting_model(["film.mp4"], False, "glimpse") == "glimpse-video"
    assert page.fitting_model(FRAMES[:1], False, "glimpse-video") == "glimpse"
    assert page.fitting_model(FRAMES, True, "owner/name") == gradio.skip()


def test_methods_change_with_the_model_and_keep_with_the_method(page):
    methods, keep = page.offer("glimpse-cross", ["fopru"], 0.9)
    assert methods["value"] == ["trimmed_llama"] and keep == 0.25
    assert [name for _, name in methods["choices"]] == ["trimmed_llama", "random_cross"]
    methods, keep = page.offer("glimpse-video", ["fopru", "sgl"], 0.9)
    assert methods["value"] == ["fopru"] and keep == 0.9
    assert page.usual_keep("glimpse", ["plphp"], 0.9) == 0.4
    assert page.usual_keep("glimpse", ["plphp", "fopru"], 0.9) == 0.9, "beside each other all keep as many"
    with pytest.raises(gradio.Error, match="not on this table"):
        page.offer("owner/name", ["fopru"], 0.25)


def test_what_was_dropped_is_shown_and_what_is_no_picture_is_said(page, tmp_path):
    (tmp_path / "text.png").write_text("none")
    assert page.look(FRAMES, True, "glimpse-video")[page.seen].size == (4 * 220 + 18, 2 * 220 + 6)
    assert "text.png holds no picture" in page.look([str(tmp_path / "text.png")], False, "glimpse")[page.answers]
    assert page.seen not in page.look(["examples/clip.mp4"], False, "glimpse"), (
        "a film is opened when it is asked about"
    )
    assert page.seen not in page.look(None, False, "glimpse")


def test_an_answer_that_was_forgotten_is_said(page):
    assert "ask again" in page.draw(None, "fopru keep 0.25", 0, "all")[page.caption]
    assert "ask again" in page.choose(None, "fopru keep 0.25")[page.caption]


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def visitor(url):
    """Makes visitors, each with a session of its own."""
    client = pytest.importorskip("gradio_client")

    def make():
        visiting = client.Client(url, verbose=False, httpx_kwargs={"timeout": 120})

        def ask(files, question, model="glimpse", method="fopru", keep=0.25, one_clip=False):
            handled = [client.handle_file(file) for file in files]
            words = (handled, question, model, [method], keep, one_clip, 64, False)
            return visiting.submit(*words, api_name="/ask")

        return ask

    return make


def said(html: str) -> list[str]:
    return re.findall(r'class="said">(.*?)<', html)


def answers(job) -> str:
    return job.result(timeout=120)[0]


def test_two_visitors_at_once_get_their_own_answers(visitor):
    one, other = visitor(), visitor()
    jobs = [
        (one(["examples/demo.png"], "Where is the owl?"), "bottom left"),
        (other(FRAMES, "Which way does the dog move?", "glimpse-video", "divprune", 0.5, True), "right"),
        (one(["examples/demo.png"], "What is at the top right?"), "sunflower"),
        (other(["examples/demo.png"], "What is at the top right?", method="plphp"), "sunflower"),
    ]
    assert [said(answers(job)) for job, _ in jobs] == [[answer] * 2 for _, answer in jobs]


def test_keep_of_one_is_everything(visitor):
    assert "144 of 144" in answers(visitor()(["examples/demo.png"], "Where is the owl?", keep=1)).split("<article>")[2]


def test_a_mistake_is_a_sentence_on_the_page(visitor, tmp_path):
    (tmp_path / "text.png").write_text("<b>no</b>")
    ask = visitor()
    assert 'role="alert">no picture: drop one' in answers(ask([], "What?"))
    html = answers(ask([str(tmp_path / "text.png")], "What?"))
    sentence = "text.png holds no picture that Pillow can read: convert it to PNG or JPEG"
    assert html == f'<p class="mistake" role="alert">{sentence}</p>'
    assert said(answers(ask(["examples/demo.png"], "Where is the owl?"))), "and it goes on"


def test_nothing_is_fetched_for_a_visitor(url):
    client = pytest.importorskip("gradio_client")
    address = {"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="this is a web address"):
        client.Client(url, verbose=False, httpx_kwargs={"timeout": 120}).predict(
            [address], "What?", "glimpse", ["fopru"], 0.25, False, 64, False, api_name="/ask"
        )


def test_the_browser_is_told_to_stay_here(url):
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        page = answer.read().decode()
    assert "fonts.googleapis" not in page
    assert json.loads(urllib.request.urlopen(f"{url}/config").read())["analytics_enabled"] is False


# -- a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["desktop", "phone"])
def browser(request):
    """Chromium without a window, at either width."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "SEVERE"})
    if request.param == "phone":
        metrics = {"width": PHONE, "height": 844, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield opened
    opened.quit()


def wait(look, seconds=90):
    """What `look` finds, as soon as it finds something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)
    return found


def test_a_browser_takes_the_example_asks_and_looks_closer(url, browser):
    def find(selector):
        return browser.find_elements("css selector", selector)

    def button(text):
        return next((each for each in find("button") if each.text.strip() == text), None)

    def caption():
        return find("#caption")[0].text

    def pictures():
        """Both, when they have been loaded, which waits until one scrolls there."""
        found = find(".picture img")
        for each in found:
            browser.execute_script("arguments[0].scrollIntoView()", each)
        return len(found) == 2 and all(each.is_displayed() for each in found) and found

    def tick(name):
        next(label for label in find(".methods label") if label.text.startswith(f"{name}:")).click()

    browser.get(url)
    wait(lambda: button("an example picture")).click()
    wait(lambda: find("textarea")[0].get_attribute("value"))
    wait(lambda: [image for image in find(".picture img") if image.is_displayed()])
    tick("plphp")
    button("Ask").click()
    wait(lambda: len(find(".answers .said")) == 3)
    untouched, *pruned = (each.text for each in find(".answers .said"))
    assert "elephant bottom left" in untouched and all("elephant" in each for each in pruned)
    before, after = wait(pictures)
    beside = before.location["y"] == after.location["y"]
    width = browser.execute_script("return innerWidth")
    assert beside is (width > PHONE), "pictures stand below each other on a phone"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "nothing is cut off"

    assert caption() == "Every layer keeps 36 of 144 image tokens; the others never reached it."
    next(label for label in find("label") if label.text.strip() == "plphp keep 0.25").click()
    wait(lambda: "6 layers x 2 heads" in caption())
    layer = [slider for slider in find("input[type=range]") if slider.is_displayed()][-1]
    layer.send_keys("\ue012")  # left
    wait(lambda: caption().startswith("Layer 4 keeps"))
    find("input[aria-label='what is kept by']")[0].click()
    next(each for each in wait(lambda: find("[role=option]")) if "head 1" in each.text).click()
    wait(lambda: caption().startswith("Layer 4, head 1 keeps"))

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    assert asked and [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
    assert browser.get_log("browser") == []


# -- the command ------------------------------------------------------------------------------------------------------


def hears_ctrl_c():
    """What runs in the background may have been told to ignore it, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_it_without_a_traceback():
    command = [sys.executable, "-m", "foveate", "playground", "--port", "0"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c
    )
    try:
        line = started.stdout.readline()
        address = re.fullmatch(r"the playground is at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
        assert address, line + started.stderr.read()
        assert b"foveate playground" in urllib.request.urlopen(address[1]).read()
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert (started.returncode, out, err) == (130, "", "")


def complaint(*words: str) -> str:
    result = CliRunner().invoke(app, ["playground", *words])
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    return result.output


def test_a_taken_port_is_said_in_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert complaint("--port", str(port)) == f"foveate: port {port} is taken: give another by --port\n"


def test_other_mistakes_are_said_in_one_sentence_too(monkeypatch, tmp_path):
    assert "cannot listen on nowhere.invalid" in complaint("--host", "nowhere.invalid")
    assert "no config.json" in complaint("--model", str(tmp_path), "--port", "0")
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert complaint() == 'foveate: the playground needs the package gradio: pip install "foveate[playground]"\n'


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_it_is_known_who_may_come(host, own):
    with serving.listen(host, 0) as listener:
        assert serving.is_loopback(listener) is own
