"""The tab with the layers, in a real browser: what it reads out is what torch measures."""

import re
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")

import numpy as np
import torch
from live_page import OpenPage, shot
from playwright.sync_api import Locator, Page, expect

from offloop.callbacks import GradientMonitor, LayerStatistics
from offloop.dashboard import Dashboard
from offloop.engine import Callback, StepPoint, Trainer, in_step

BINS = 8
STEPS = 6
MINUS = "\N{MINUS SIGN}"


class Keeper(Callback):
    """Keeps what the layers are in each step."""

    def __init__(self) -> None:
        self.weights: list[np.ndarray[Any, Any]] = []
        self.gradients: list[np.ndarray[Any, Any]] = []
        self.after: list[np.ndarray[Any, Any]] = []

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        weight = point.model.get_parameter("mlp.0.weight")
        assert weight.grad is not None
        self.weights.append(weight.detach().double().numpy().copy())
        self.gradients.append(weight.grad.double().numpy().copy())

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.after.append(point.model.get_parameter("mlp.0.weight").detach().double().numpy().copy())


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.head = torch.nn.Linear(1, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(inputs))  # type: ignore[no-any-return]


def tree_row(page: Page, name: str) -> Locator:
    return page.locator(f'[role=treeitem][data-name="{name}"]').last


def chooser(page: Page, label: str) -> Locator:
    return page.locator(".layer-choice", has_text=label).locator("select")


def picture(page: Page, title: str) -> Locator:
    return page.locator(".layer-picture", has=page.locator("figcaption", has_text=title))


def reading(page: Page, title: str) -> Locator:
    return picture(page, title).locator(".layer-reading")


@pytest.fixture
def measured(open_page: OpenPage, tmp_path: Path) -> Any:
    """A run of six steps that is over, each step measured, and its page with the layers."""
    keeper = Keeper()
    model = Model()
    callbacks = [keeper, GradientMonitor(every_n_steps=1), LayerStatistics(every_n_steps=1, bins=BINS)]
    torch.manual_seed(1)
    batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(STEPS)]
    with Dashboard(port=0, quiet=True) as dashboard:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        trainer = Trainer(
            model, optimizer, loss=torch.nn.functional.mse_loss, callbacks=[dashboard, *callbacks]
        )
        # Playwright has an event loop in this thread.
        thread = threading.Thread(target=trainer.train, args=(batches,), kwargs={"epochs": 1})
        thread.start()
        thread.join()
        page = open_page(dashboard.url)
        page.get_by_role("tab", name="Layers").click()
        expect(page.get_by_role("treeitem").first).to_be_visible()
        yield page, keeper


def test_a_bin_is_read_out_as_torch_counts_it(measured: tuple[Page, Keeper]) -> None:
    page, keeper = measured
    tree_row(page, "mlp.0.weight").click()
    title = "Values of the weights"
    canvas = picture(page, title).locator("canvas").last
    canvas.focus()
    read: dict[tuple[str, str, str], tuple[str, str]] = {}
    for _ in range(STEPS):
        canvas.press("ArrowLeft")
    for _ in range(60):
        canvas.press("ArrowUp")
    for _ in range(96):
        text = reading(page, title).inner_text()
        found = re.fullmatch(r"Step (\d+): (\S+) to (\S+) has (\S+) %, (\d+) of (\d+) elements", text)
        if found is not None:
            step, low, high, _, elements, total = found.groups()
            read[step, low, high] = elements, total
        canvas.press("ArrowDown")
    weights = torch.from_numpy(keeper.weights[0])
    expected = torch.histc(weights.float(), BINS).int().tolist()
    assert {step for step, _, _ in read} == {"1"}
    assert [int(elements) for elements, _ in read.values()] == expected[::-1]
    assert {total for _, total in read.values()} == {"64"}
    (top, *_, bottom) = read
    assert float(top[2]) == pytest.approx(float(weights.max()), rel=1e-3)
    assert float(bottom[1].replace(MINUS, "-")) == pytest.approx(float(weights.min()), rel=1e-3)


def test_the_tree_and_the_table_have_the_numbers_of_the_layer(measured: tuple[Page, Keeper]) -> None:
    page, keeper = measured
    row = tree_row(page, "mlp.0.weight")
    expect(row.locator("span").nth(1)).not_to_be_empty()
    norm, ratio, _, change = (
        float(row.locator("span").nth(place).inner_text() or 0) for place in range(1, 5)
    )
    assert norm == pytest.approx(np.linalg.norm(keeper.weights[-1]), rel=5e-3)
    moved = np.linalg.norm(keeper.after[-1] - keeper.weights[-1]) / np.linalg.norm(keeper.weights[-1])
    assert ratio == pytest.approx(moved, rel=2e-2)
    now, then = keeper.weights[-1], keeper.weights[0]
    size = max(np.sqrt((each**2).mean()) for each in (now, then))
    expected = np.hypot(now.mean() - then.mean(), now.std() - then.std()) / size
    assert change == pytest.approx(expected, rel=2e-2)

    row.click()
    page.get_by_role("button", name="gradients").click()
    page.get_by_text("Values of this layer as a table").click()
    expect(page.locator(".layer-table tbody tr")).to_have_count(STEPS)
    cells = page.locator(".layer-table tbody tr").last.locator("th, td").all_inner_texts()
    gradient = keeper.gradients[0]
    assert cells[0] == "1"
    numbers = [float(each.replace(MINUS, "-")) for each in cells[1:]]
    expected_row = [np.linalg.norm(gradient), gradient.mean(), gradient.std(), gradient.min(), gradient.max()]
    assert numbers == pytest.approx(expected_row, rel=1e-3)


def test_pictures_have_colours_where_there_are_elements(measured: tuple[Page, Keeper]) -> None:
    page, _ = measured
    painted = """
        canvas => {
          const {data} = canvas.getContext('2d').getImageData(62, 6, canvas.width - 80, canvas.height - 40);
          return new Set(new Uint32Array(data.buffer)).size;
        }
    """
    for title in ("norm of the weights", "Values of the weights"):
        canvas = picture(page, title).locator("canvas").last
        expect(canvas).to_have_attribute("aria-label", re.compile("Heatmap of"))
        assert canvas.evaluate(painted) > 5
    shot(page, "layers")


def test_layers_are_chosen_by_keys_search_and_order(measured: tuple[Page, Keeper]) -> None:
    page, _ = measured
    first = page.get_by_role("treeitem").first
    expect(first).to_contain_text("mlp")
    first.focus()
    first.press("ArrowLeft")
    expect(first).to_have_attribute("aria-expanded", "false")
    expect(tree_row(page, "mlp.0.weight")).to_have_count(0)
    first.press("ArrowRight")
    first.press("End")
    page.keyboard.press("Enter")
    expect(page.locator(".layer-pictures h2")).to_have_text("head.bias")
    expect(tree_row(page, "head.bias")).to_have_attribute("aria-selected", "true")

    page.get_by_label("Filter layers").fill("0.w")
    expect(page.get_by_role("treeitem")).to_have_count(1)
    page.get_by_label("Filter layers").fill("")
    chooser(page, "Order").select_option("norm")
    expect(page.get_by_role("treeitem").first).not_to_have_attribute("aria-expanded", re.compile(".*"))
    norms = [float(row.locator("span").nth(1).inner_text()) for row in page.get_by_role("treeitem").all()]
    assert norms == sorted(norms, reverse=True)


def test_another_kind_has_its_own_layers_and_the_dead_units(measured: tuple[Page, Keeper]) -> None:
    page, _ = measured
    tree_row(page, "mlp.0.weight").click()
    page.get_by_role("button", name="activations").click()
    expect(page.locator(".layer-pictures h2")).to_have_text("mlp.0")
    expect(tree_row(page, "mlp.1").locator("span").nth(3)).to_have_text(re.compile(r"\d+ %"))
    chooser(page, "Colour").select_option("dead")
    expect(picture(page, "dead units of the activations")).to_be_visible()


def test_new_measurements_appear_while_the_tab_is_open(
    training: Any, open_page: OpenPage, tmp_path: Path
) -> None:
    run = training(tmp_path, callbacks=[LayerStatistics(every_n_steps=1, activations=False)]).begin()
    run.step(loss=1.0)
    page = open_page(run.dashboard.url)
    page.get_by_role("tab", name="Layers").click()
    expect(reading(page, "norm of the weights")).to_contain_text(re.compile("^1 measurement"))
    run.step(loss=1.0)
    expect(reading(page, "norm of the weights")).to_contain_text("2 measurements")
    expect(picture(page, "Values of the weights")).to_be_visible()


def test_a_run_without_layers_has_no_tab_for_them(started: Any) -> None:
    _, page = started
    expect(page.get_by_role("tab", name="Layers")).to_be_hidden()
