"""The exported page in a real browser, from a file and without a network: its images are those of the command, by mouse and by keyboard."""

from __future__ import annotations

import base64
import functools
import gzip
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.device import ComputeDevice
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.export import html_page
from ddpmctl.export.card import Card
from ddpmctl.export.exporting import export
from ddpmctl.iclevr import ICLEVR
from ddpmctl.sampling.requests import requests_for
from ddpmctl.sampling.trajectory import RecordedFrame, record
from ddpmctl.task import Task

from .browser import needs_chromium
from .browser import opened as opened_as
from .conftest import ddpmctl
from .exports import HOSTILE, finished, random_checkpoint

pytestmark = [pytest.mark.slow, needs_chromium]

opened = functools.partial(opened_as, own=("file:", "data:", "blob:"))  # the page's worker has an address that begins with blob:

PIXELS = "() => [...document.querySelectorAll('.pair canvas')].map(canvas => canvas.toDataURL())"
OTHER = Task(("door, red", "дом", "b c"), 32, ("test",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def iclevr(folder: Path) -> tuple[Checkpoint, Path]:
    """A page of a network that names objects, with the labels of i-CLEVR."""
    settings = {"sampler": "dpm++2m", "spacing": "karras", "steps": 6, "particles": 3, "retry_from": 0.9, "guidance": 1.5, "guidance_to": 0.8}
    checkpoint = random_checkpoint(folder / "i.pth", ICLEVR, **settings)
    return checkpoint, page_of(folder / "i.html", checkpoint)


@pytest.fixture(scope="module")
def other(folder: Path) -> tuple[Checkpoint, Checkpoint, Path]:
    """A page of two models with other labels, whose sampler draws noise at each step."""
    settings = {"net": "unet", "sampler": "ddpm", "timesteps": 20, "steps": 5, "guidance": 0.5}
    one, two = (random_checkpoint(folder / f"{name}.pth", OTHER, objective=name, **settings) for name in ("eps", "v"))
    return one, two, page_of(folder / "two.html", one, two)


def page_of(file: Path, *checkpoints: Checkpoint) -> Path:
    finished(export([(one, Card(one.path.stem)) for one in checkpoints], "page", file))
    return file


def wait_done(page: Any) -> None:
    page.wait_for_selector("#status:has-text('Done'), #failure:not([hidden])", timeout=60_000)  # the page's policy allows no wait_for_function
    assert page.locator("#failure").is_hidden(), page.locator("#failure").inner_text()


def expected(checkpoint: Checkpoint, labels: tuple[str, ...], *, seed: int = 0, **sampling: Any) -> list[RecordedFrame]:
    """The frames of ``denoise-grid``."""
    pipeline = pipeline_for(checkpoint, {"particles": 1, **sampling}, ComputeDevice(torch.device("cpu"), "fp32"))
    requests = finished(pipeline.choose(requests_for("sample", [labels], seed=seed)))
    return finished(record(pipeline, requests))  # type: ignore[return-value, arg-type]


def require_frames(page: Any, *frames: list[RecordedFrame]) -> None:
    """Check that the slider shows, for each model, these frames: at most 2 of 255 levels from them."""
    last = int(page.locator("#frame").get_attribute("max"))
    assert {len(one) for one in frames} == {last + 1}
    for index in range(last + 1):
        page.locator("#frame").evaluate("(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", index)
        shown = page.evaluate(PIXELS)
        for model, one in enumerate(frames):
            for name, pixels in zip(("x_t", "x0_hat"), shown[2 * model : 2 * model + 2], strict=True):
                made, wanted = np.asarray(Image.open(io.BytesIO(base64.b64decode(pixels.partition(",")[2])))), getattr(one[index], name)
                if wanted is None:
                    assert not made.any(), "there is no x0 of pure noise"
                else:
                    assert difference(made[..., :3], wanted[0]) <= 2, (index, name)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_the_frames_are_those_of_denoise_grid(browser: Any, iclevr: tuple[Checkpoint, Path]) -> None:
    checkpoint, file = iclevr
    with opened(browser, file) as page:
        wait_done(page)
        require_frames(page, expected(checkpoint, ("red cube", "blue sphere")))
        page.get_by_role("button", name="blue sphere").click()
        page.locator("#seed").fill("123456789012345678")
        page.locator("#steps").select_option("16")
        page.locator("summary", has_text="More settings").click()
        page.locator("#particles").fill("6")
        page.locator("#guidance").fill("2.5")
        page.locator("#guidance-from").fill("0.25")
        page.get_by_role("button", name="Denoise").click()
        wait_done(page)
        settings = {"steps": 16, "particles": 6, "guidance": 2.5, "guidance_from": 0.25}
        require_frames(page, expected(checkpoint, ("red cube",), seed=123456789012345678, **settings))


def test_a_noise_that_is_accepted_ends_the_search(browser: Any, folder: Path) -> None:
    settings = {"sampler": "dpm++2m", "steps": 6, "particles": 8}
    checkpoint = random_checkpoint(folder / "a.pth", ICLEVR, accept=1e-300, **settings)
    likeliest, first = (expected(checkpoint, ("red cube", "blue sphere"), particles=8, accept=accept)[-1].x_t for accept in (1.0, 1e-300))
    assert difference(likeliest, first) > 0, "otherwise nothing is tested"
    with opened(browser, page_of(folder / "a.html", checkpoint)) as page:
        wait_done(page)
        page.locator("summary", has_text="More settings").click()
        page.locator("#particles").fill("8")
        page.get_by_role("button", name="Denoise").click()
        wait_done(page)
        require_frames(page, expected(checkpoint, ("red cube", "blue sphere"), particles=8))


def test_two_models_of_other_labels_stand_side_by_side_on_the_same_noise(browser: Any, other: tuple[Checkpoint, Checkpoint, Path]) -> None:
    one, two, file = other
    with opened(browser, file) as page:
        wait_done(page)
        assert page.locator("h2").all_inner_texts() == ["eps", "v"]
        page.get_by_role("button", name="дом").click()
        page.locator("#steps").select_option("8")
        page.get_by_role("button", name="Denoise").click()
        wait_done(page)
        require_frames(page, *(expected(each, ("door, red", "дом"), steps=8) for each in (one, two)))


def test_the_shown_command_makes_the_image_that_is_saved(browser: Any, iclevr: tuple[Checkpoint, Path], folder: Path) -> None:
    checkpoint, file = iclevr
    with opened(browser, file) as page:
        wait_done(page)
        with page.expect_download() as image:
            page.get_by_role("button", name="Save image").click()
        with page.expect_download() as frames:
            page.get_by_role("button", name="Save frames").click()
        with Image.open(image.value.path()) as saved:
            made, texts = np.asarray(saved.convert("RGB")), saved.text
        command = page.locator("#command").text_content()
        assert texts == {"Description": f"red cube, blue sphere | {command}"}
        assert image.value.suggested_filename == "i-red-cube-blue-sphere-seed-0.png"
        with Image.open(frames.value.path()) as saved:
            assert saved.width > 7 * 128
            assert saved.text == texts
    words = re.findall(r"'[^']*'|\S+", command)
    arguments = [checkpoint.path if word == "i" else word.strip("'") for word in words[2:]]
    done = ddpmctl("sample", *arguments, "--out", folder / "images")
    assert done.exit_code == 0, done.stderr
    (written,) = (folder / "images").glob("00*.png")
    with Image.open(written) as image:
        assert difference(made, np.asarray(image)) <= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1000])
def test_the_page_fits_the_window_and_is_accessible(
    browser: Any, iclevr: tuple[Checkpoint, Path], other: tuple[Any, Any, Path], width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for file in (iclevr[1], other[2]):
        with opened(browser, file, width, scheme) as page:
            wait_done(page)
            for summary in page.locator("summary").all():
                summary.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 22, 22)")
            page.evaluate("document.querySelector('meta[http-equiv]').remove()")
            found = axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_alone_does_everything(browser: Any, iclevr: tuple[Checkpoint, Path]) -> None:
    checkpoint, file = iclevr
    with opened(browser, file) as page:
        wait_done(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.title") == "gray cube"
        for key in ("ArrowRight", "Space", "ArrowDown", "ArrowRight", "Space", "ArrowDown", "Space"):
            page.keyboard.press(key)
        assert page.locator("#chosen").inner_text() == "blue cylinder"
        while page.evaluate("document.activeElement.id") != "seed":
            page.keyboard.press("Tab")
        page.keyboard.press("Control+a")
        page.keyboard.type("7")
        page.keyboard.press("Enter")
        wait_done(page)
        require_frames(page, expected(checkpoint, ("blue cylinder",), seed=7))
        page.locator("#frame").focus()
        page.keyboard.press("Home")
        assert page.locator("#where").inner_text().startswith("pure noise")
        page.keyboard.press("ArrowRight")
        assert page.locator("#where").inner_text().startswith("step 1 of 6")


def test_labels_are_only_text(browser: Any, folder: Path) -> None:
    checkpoint = random_checkpoint(folder / "hostile.pth", HOSTILE, net="unet")
    file = folder / "hostile.html"
    card = Card("</script><img src=x onerror=alert(2)>", data="</title><script>alert(3)</script>", licence="<b>")
    finished(export([(checkpoint, card)], "page", file))
    with opened(browser, file) as page:
        wait_done(page)
        assert [one.get_attribute("title") for one in page.locator(".names button").all()] == list(HOSTILE.classes)
        assert page.locator("img, b").count() == 0
        assert page.title() == "</script><img src=x onerror=alert(2)>"


def test_images_without_labels(browser: Any, folder: Path) -> None:
    checkpoint = random_checkpoint(folder / "plain.pth", Task((), 32, ("test",)), net="unet")
    file = page_of(folder / "plain.html", checkpoint)
    with opened(browser, file) as page:
        wait_done(page)
        assert page.locator("#objects").is_hidden()
        require_frames(page, expected(checkpoint, ()))
        assert " -n 1 " in page.locator("#command").text_content()


def test_what_cannot_be_done_is_said_in_words(browser: Any, iclevr: tuple[Checkpoint, Path], folder: Path) -> None:
    with opened(browser, iclevr[1], script="delete globalThis.WebAssembly") as page:
        assert "WebAssembly, which runs the network, is missing" in page.locator("#failure").inner_text()
        assert page.locator("#start").is_disabled()
    with opened(browser, iclevr[1]) as page:
        wait_done(page)
        for name in ("red cube", "blue sphere"):
            page.get_by_role("button", name=name).click()
        assert page.locator("#chosen").inner_text() == "Choose at least one."
        assert page.locator("#start").is_disabled()
    spoiled = folder / "spoiled.html"
    text = iclevr[1].read_text(encoding="utf-8")
    spoiled.write_text(re.sub(r'(id="weights-0"[^>]*>).{40}', r"\1" + "A" * 40, text), encoding="utf-8")
    with opened(browser, spoiled) as page:
        page.wait_for_selector("#failure:not([hidden])")
        assert "This did not work" in page.locator("#failure").inner_text()


def test_stop_ends_the_work_and_another_request_replaces_it(browser: Any, iclevr: tuple[Checkpoint, Path]) -> None:
    checkpoint, file = iclevr
    with opened(browser, file) as page:
        wait_done(page)
        page.locator("summary", has_text="More settings").click()
        page.locator("#particles").fill("64")
        page.locator("#steps").select_option("100")
        page.get_by_role("button", name="Denoise").click()
        page.wait_for_selector("#where:has-text('step')")
        page.get_by_role("button", name="Stop").click()
        assert page.locator("#status").inner_text() == "Stopped."
        before = page.locator("#where").inner_text()
        page.wait_for_timeout(500)
        assert page.locator("#where").inner_text() == before
        assert page.get_by_role("button", name="Save image").is_disabled()
        page.get_by_role("button", name="Denoise").click()
        page.wait_for_selector("#where:has-text('step')")
        page.locator("#particles").fill("1")
        page.locator("#steps").select_option("8")
        page.get_by_role("button", name="Denoise").click()
        wait_done(page)
        require_frames(page, expected(checkpoint, ("red cube", "blue sphere"), steps=8))


def test_nothing_but_the_page_may_run_and_nothing_may_be_loaded(browser: Any, iclevr: tuple[Checkpoint, Path]) -> None:
    with opened(browser, iclevr[1], problems=4, blocked=("https://example.org/x.png",)) as page:
        wait_done(page)
        ran = page.evaluate("""async () => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const refused = await fetch("https://example.org/").then(() => false, () => true);
            const blocked = await new Promise((done) => {
                const image = new Image();
                [image.onerror, image.onload] = [() => done(true), () => done(false)];
                image.src = "https://example.org/x.png";
            });
            return [window.ran === true, refused, blocked];
        }""")
        assert ran == [False, True, True]


@pytest.mark.skipif(shutil.which("npm") is None, reason="building the page needs npm")
def test_what_is_shipped_is_what_the_source_builds(tmp_path: Path) -> None:
    here = Path(html_page.__file__).parent
    project = tmp_path / "page"
    shutil.copytree(here / "page", project, ignore=shutil.ignore_patterns("node_modules"))
    for command in (["npm", "ci", "--no-audit", "--no-fund"], ["npm", "run", "build"]):
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        if done.returncode and command[1] == "ci" and re.search(r"ENOTFOUND|ECONNREFUSED|EAI_AGAIN|ETIMEDOUT", done.stderr):
            pytest.skip("npm has no registry here")
        assert done.returncode == 0, done.stderr
    made, shipped = tmp_path / "assets" / "page", here / "assets" / "page"
    assert {file.name for file in made.iterdir()} == {file.name for file in shipped.iterdir()}
    for file in made.iterdir():
        read = gzip.decompress if file.suffix == ".gz" else bytes  # versions of zlib compress to other bytes
        assert read(file.read_bytes()) == read((shipped / file.name).read_bytes()), file.name
