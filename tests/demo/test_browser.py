"""The page of demo/sampling.py in a real Chromium, with a model of random weights."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from streamlit.testing.v1 import AppTest

from gm.textual_inversion.embedding_file import Embedding, write_embedding
from gm.training.args import VERSIONS
from tests.tiny import CONFIGS, write_tiny_weights

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds: the first picture waits for MindSpore to start and compile
REDRAWN = [StaleElementReferenceException]  # the page was drawn anew between finding an element and reading it
PAGE = """
import sys
sys.path.insert(0, {root!r})
from demo import sampling
spec = dict(H=64, W=64, C=4, f=4, is_legacy=False, config={config!r}, textual_inversion_weight=None)
models = dict(micro=dict(spec, ckpt={weights!r}), absent=dict(spec, ckpt="absent.safetensors"))
sampling.main(models, runs={runs!r})
"""
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --window-size=1400,1200"
)


class Site:
    """A person at the page."""

    def __init__(self, driver, url, downloads):
        self.driver, self.url, self.downloads = driver, url, downloads

    def open(self):
        """The page anew, with nothing chosen yet; few steps, so that drawing is fast."""
        self.driver.get(self.url)
        self.write("Steps", "2")

    def wait(self, found, what):
        wait = WebDriverWait(self.driver, PATIENCE, 0.2, REDRAWN)
        return wait.until(lambda _: found(), f"{what}; the page says: {self.text()}")

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self):
        return " ".join(element.text for element in self.all("body"))

    def labelled(self, label):
        return self.wait(lambda: next(iter(self.all(f'[aria-label="{label}"]')), None), f"no field {label}")

    def write(self, label, text):
        self.labelled(label).send_keys(Keys.CONTROL, "a")
        self.labelled(label).send_keys(text)

    def find(self, text, kind):
        def found():
            return next((e for e in self.all(kind) if text in e.text and e.is_displayed()), None)

        return self.wait(found, f"no {kind} {text}")

    def click(self, text, kind="button"):
        self.find(text, kind).click()

    def press(self, text):
        """Press a button by the keyboard: while the page still moves, a mouse may miss it."""
        self.settle()
        self.find(text, "button").send_keys(Keys.ENTER)

    def choose(self, label, option):
        """Open a list and pick the entry that contains a text."""
        self.labelled(label).click()
        self.click(option, '[role="option"]')
        self.labelled(label).send_keys(Keys.ESCAPE, Keys.TAB)  # the list is closed, the field left
        self.wait(lambda: not self.all('[role="option"]'), "the list stays open")
        self.settle()

    def at_rest(self):
        return self.all('[data-test-script-state="notRunning"]') and not self.all('[data-stale="true"]')

    def settle(self):
        time.sleep(0.5)  # until the server knows what was done
        self.wait(self.at_rest, "the page never comes to rest")

    def pictures(self):
        return [image.get_attribute("src") for image in self.all('[data-testid="stMain"] img')]

    def draw(self):
        """Press Draw -> the pictures, other ones than before, as PIL images with their metadata."""
        before = self.pictures()
        self.press("Draw")

        def are_new():
            return "Settings (JSON)" in self.text() and self.pictures() != before and self.at_rest()

        self.wait(are_new, "no new pictures")
        return [Image.open(io.BytesIO(self.fetch(source))) for source in self.pictures()]

    def refuses(self, text):
        """Press Draw and wait for an error with this text, and no picture."""
        self.press("Draw")
        self.shows_error(text)
        assert not self.pictures()

    def shows_error(self, text):
        boxes = '[data-testid="stAlertContentError"]'
        self.wait(
            lambda: any(text in box.text for box in self.all(boxes)) and self.at_rest(), f"no error '{text}'"
        )
        assert not self.all('[data-testid="stException"]'), self.text()

    def fetch(self, source):
        with urllib.request.urlopen(source) as answer:
            return answer.read()

    def upload(self, path):
        self.click("a picture", "label")
        self.wait(lambda: self.all('input[type="file"]'), "no place for a picture")[0].send_keys(str(path))
        self.settle()

    def downloaded(self, name):
        path = self.downloads / name
        self.wait(path.is_file, f"{name} does not arrive")
        return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page finds: a model, learned words of which one is another model's, and a link outside."""
    folder = tmp_path_factory.mktemp("site")
    weights = write_tiny_weights(folder / "micro.safetensors", kind="micro")
    rng = np.random.default_rng(0)
    for token, step, width in (("<cat-toy>", 300, 16), ("<robot>", 200, 16), ("<wide>", 100, 32)):
        run = folder / "runs" / token.strip("<>")
        run.mkdir(parents=True)
        rows = rng.normal(size=(2, 2, width)).astype(np.float32)
        word = Embedding(token, *rows, step=step)
        write_embedding(run / f"SD-XL-small_{step}_ti.ckpt", word, format="ckpt")
    outside = folder / "outside.safetensors"
    write_embedding(outside, Embedding("<secret>", *rows), format="webui")
    (folder / "runs" / "link.safetensors").symlink_to(outside)
    Image.effect_noise((90, 70), 60).save(folder / "picture.png")
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:300])
    runs = str(folder / "runs")
    page = PAGE.format(root=str(ROOT), config=str(CONFIGS["micro"]), weights=str(weights), runs=runs)
    (folder / "page.py").write_text(page)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(folder / "page.py"), "--server.headless", "true"]
    command += ["--server.port", str(port)]
    environment = {**os.environ, "GLOG_v": "3"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    try:
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def site(folder, server):
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and chromedriver, "apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(server):
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield Site(driver, server, folder / "downloads")
    finally:
        driver.quit()


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/_stcore/health").status == 200
    except OSError:
        return False


def test_a_seed_decides_the_picture_of_a_learned_word(site):
    site.open()
    site.choose("Learned words", "<cat-toy>")
    site.write("Prompt", "a <cat-toy> in the snow")
    (first,) = site.draw()
    site.write("Seed", "7")
    (other,) = site.draw()
    site.write("Seed", "42")
    (again,) = site.draw()
    assert first.text["prompt"] == "a <cat-toy> in the snow"
    assert [picture.text["seed"] for picture in (first, other, again)] == ["42", "7", "42"]
    assert json.loads(first.text["settings"])["words"] == ["SD-XL-small_300_ti.ckpt"]
    assert first.size == (64, 64) and np.array_equal(first, again) and not np.array_equal(first, other)

    site.click("Settings (JSON)")
    settings = json.loads(site.downloaded("settings.json").read_text())
    assert [(entry["seed"], entry["settings"]["steps"]) for entry in settings] == [("42", 2)]
    site.click("PNG")
    assert Image.open(site.downloaded("01_seed42.png")).text == first.text


def test_only_words_in_the_folder_are_offered(site):
    site.open()
    site.labelled("Learned words").click()
    site.wait(lambda: "<wide>" in site.text(), "no words")
    offered = [option.text for option in site.all('[role="option"]') if "·" in option.text]
    assert offered == [
        "<cat-toy> · step 300 · cat-toy/SD-XL-small_300_ti.ckpt",
        "<robot> · step 200 · robot/SD-XL-small_200_ti.ckpt",
        "<wide> · step 100 · wide/SD-XL-small_100_ti.ckpt",
    ]


def test_two_words_with_and_without(site):
    site.open()
    site.choose("Learned words", "<robot>")
    site.choose("Learned words", "<cat-toy>")
    site.click("Compare with and without", "label")
    site.wait(lambda: len(site.all('input[placeholder^="nothing"]')) == 2, "no place for other words")
    site.all('input[placeholder^="nothing"]')[0].send_keys("dog")
    site.write("Prompt", "a <robot> and a <cat-toy>")
    pictures = site.draw()
    assert [picture.text["prompt"] for picture in pictures] == ["a <robot> and a <cat-toy>", "a dog and a"]
    assert [picture.text["seed"] for picture in pictures] == ["42", "42"]
    assert not np.array_equal(*pictures)


def test_pictures_start_from_an_upload_unless_it_is_broken(site, folder):
    site.open()
    site.write("Prompt", "snow")
    site.upload(folder / "broken.png")
    site.shows_error("broken.png cannot be used")
    site.refuses("Choose a picture to start from")

    site.upload(folder / "picture.png")
    (picture,) = site.draw()
    settings = json.loads(picture.text["settings"])
    assert (settings["task"], settings["strength"]) == ("img2img", 0.75)


def test_what_cannot_be_drawn_is_said(site):
    site.open()
    site.write("Prompt", "snow " * 301)
    site.refuses("The prompt is too long")

    site.write("Prompt", "snow")
    site.choose("Learned words", "<wide>")
    site.refuses("it was learned for another model")

    site.choose("Model", "absent")
    site.refuses("There are no weights absent.safetensors")


def test_the_shipped_page_offers_the_models_of_training():
    page = AppTest.from_file(str(ROOT / "demo" / "sampling.py"), default_timeout=60).run()
    assert not page.exception
    assert page.selectbox[0].options == list(VERSIONS)
