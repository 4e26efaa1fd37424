"""The report: its numbers, its pictures, its page, and going on after an interruption."""

import json
import re
from dataclasses import replace

import pytest
import torch

import symflow
from symflow.errors import FileFormatError
from symflow.evaluate import accuracy, nearest
from symflow.report import StudySettings, demo, study
from symflow.report.figures import COLOURS, draw
from symflow.report.page import networks_table, page
from symflow.report.study import AVERAGE, HELD_OUT, NOISE, PRESETS, TRAINING
from symflow.zoo import Zoo, breast_cancer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the report of a miniature demo."""
    folder = tmp_path_factory.mktemp("demo")
    demo(folder / "report.html", fast=True, progress=False)
    return folder


@pytest.fixture(scope="module")
def data(place):
    return place / "report-data" / "fast-seed-0"


@pytest.fixture(scope="module")
def results(data):
    return json.loads((data / "results.json").read_text())


def test_every_set_of_networks_is_there_with_one_number_for_each_network(results):
    settings = StudySettings.small()
    networks = results["networks"]
    assert set(networks) == {TRAINING, HELD_OUT, *PRESETS, NOISE, AVERAGE} == set(COLOURS)
    for name, found in networks.items():
        count = {TRAINING: settings.runs, HELD_OUT: settings.held_out}.get(name, settings.samples)
        for key in ("accuracy", "loss", "train loss", "nearest", "plane"):
            assert len(found[key]) == count, (name, key)
        assert all(0 <= value <= 1 for value in found["accuracy"])


def test_the_figures_are_those_of_the_stored_networks(results, data):
    """Measured again from what the folder holds, apart from the study."""
    settings, task = StudySettings.small(), breast_cancer()
    zoo = Zoo.load(data / "zoo")
    known, unseen = zoo.final[: settings.runs], zoo.final[settings.runs :]
    held_out = results["networks"][HELD_OUT]
    assert held_out["accuracy"] == pytest.approx(accuracy(zoo.arch, unseen, task).tolist())
    assert held_out["loss"] == pytest.approx(
        zoo.metrics["test_loss"][settings.runs :].tolist(), rel=1e-4
    )
    quotient = symflow.Quotient(zoo.arch)
    distance = nearest(quotient, unseen, known).distance
    assert held_out["nearest"] == pytest.approx(distance.tolist(), rel=1e-4)
    flow = symflow.flows.geometric(
        zoo.arch, width=settings.width, depth=settings.depth, bridge=settings.bridge
    )
    flow.fit(
        zoo.select(slice(settings.runs)),
        validation=zoo.select(slice(settings.runs, None)),
        steps=settings.steps,
        lr=settings.flow_lr,
        log_every=1,
        checkpoint_every=5,
        folder=data / "geometric",  # already at its end: the stored flow is taken as it is
    )
    drawn = flow.sample(settings.samples, steps=settings.sampling_steps, seed=settings.seed + 1)
    expected = accuracy(zoo.arch, drawn, task).tolist()
    assert results["networks"]["Geometric"]["accuracy"] == pytest.approx(expected)


def test_noise_has_the_size_that_parts_independent_networks(results):
    """Distance from the network that noise was added to: close to the held-out median."""
    far = torch.tensor(results["networks"][NOISE]["nearest"]).median()
    typical = torch.tensor(results["networks"][HELD_OUT]["nearest"]).median()
    assert 0.6 < far / typical <= 1.1  # projecting and matching bring it closer


def test_checks_say_what_was_got(results):
    barriers, networks = results["barriers"], results["networks"]
    middle = torch.tensor(barriers["aligned"]["train midpoint"]).mean()
    accuracies = [torch.tensor(networks[k]["accuracy"]).mean() for k in (HELD_OUT, "Geometric")]
    first, _, third, *_ = results["checks"]
    assert first["got"] == pytest.approx(float(middle), rel=1e-6)
    assert first["met"] == (first["got"] <= 0.02)
    assert third["got"] == pytest.approx(float((accuracies[0] - accuracies[1]).abs()), abs=1e-6)
    # A flow of twenty steps has learned nothing yet, and the report says so.
    assert not third["met"]


def test_the_page_holds_everything_and_loads_nothing(place, results):
    text = (place / "report.html").read_text()
    pictures = re.findall(r"src='(data:image/png;base64,[^']{1000,})'", text)
    assert len(pictures) == len(draw(results)) == 6
    assert not re.search(r"(?:src|href)=['\"](?!data:)", text)
    assert "Permutation(size=16) @ PositiveScale(size=16)" in text
    assert text.count("class='missed'") == sum(not c["met"] for c in results["checks"])
    for name in results["networks"]:
        assert name in text


def test_pictures_are_drawn_from_results_alone(results, data):
    again = draw(results)
    for name, picture in again.items():
        assert picture.startswith(PNG)
        assert (data / f"{name}.png").read_bytes() == picture


def test_the_table_follows_the_numbers(results):
    networks = {k: dict(v) for k, v in results["networks"].items()}
    count = len(networks["Balanced"]["accuracy"])
    networks["Balanced"] |= {"accuracy": [0.125] * count}
    assert "0.1250 ± 0.0000" in networks_table(networks)
    assert "0.1250 ± 0.0000" not in networks_table(results["networks"])
    assert "0.1250 ± 0.0000" in page({**results, "networks": networks}, draw(results))


def test_a_second_call_takes_what_is_stored_and_ends_the_same(place, data, results):
    stamp = (data / "geometric" / "flow.safetensors").stat().st_mtime_ns
    demo(place / "report.html", fast=True, progress=False)
    again = json.loads((data / "results.json").read_text())
    assert (data / "geometric" / "flow.safetensors").stat().st_mtime_ns == stamp
    for name, found in results["networks"].items():
        assert again["networks"][name]["accuracy"] == found["accuracy"]
        assert again["networks"][name]["nearest"] == found["nearest"]


def test_other_settings_in_the_same_folder_are_refused(data):
    with pytest.raises(FileFormatError, match=r"epochs: there 4, now 5.*another folder"):
        study(replace(StudySettings.small(), epochs=5), folder=data)
