"""One field for several architectures: batches are shared, networks do not see each other."""

from types import SimpleNamespace

import pytest
import torch

import symflow
from symflow.errors import FileFormatError, ShapeError, StateError
from symflow.flows import Gaussian, fit_together, geometric
from symflow.flows.fit import Trainer

FIELD = {"width": 8, "depth": 1, "heads": 2, "edge_width": 4}
WIDTHS = (4, 7)


def arch_of(n):
    return symflow.mlp([5, n, n, 3])


def zoo_of(arch, seed=0):
    start = Gaussian(0.3).sample(arch, 24, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(initial=start, final=0.5 * start + 0.1)


def flows_of(widths=WIDTHS, **options):
    return [geometric(arch_of(n), source=Gaussian(0.3), **{**FIELD, **options}) for n in widths]


def zoos_of(widths=WIDTHS):
    return [zoo_of(arch_of(n), n) for n in widths]


def parameters(one):
    return torch.cat([p.detach().flatten() for p in one.field.parameters()])


def test_the_loss_is_the_mean_of_those_of_each_architecture(monkeypatch):
    """So is the gradient: one step with a plain optimiser, against two backward passes by hand."""
    losses = []
    plain = Trainer.batch_loss

    def kept(self, step):
        loss = plain(self, step)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(Trainer, "batch_loss", kept)
    together = fit_together(flows_of(), zoos_of(), steps=1, log_every=1)
    alone = []
    for one, zoo in zip(flows_of(), zoos_of(), strict=True):
        alone.append(one.fit(zoo, steps=1, log_every=1).history[0]["loss"])
    # The first step sees the same initial parameters: every loss is what it is alone.
    assert losses[:2] == pytest.approx(alone)
    assert together[0].history[0]["loss"] == pytest.approx(sum(alone) / 2)
    assert together[1].history == together[0].history


def test_one_flow_together_is_that_flow_alone():
    (one,), (zoo,) = flows_of((4,)), zoos_of((4,))
    fit_together([one], [zoo], steps=5)
    other = flows_of((4,))[0].fit(zoo, steps=5)
    assert torch.equal(parameters(one), parameters(other))


def test_parameters_are_one_and_the_same_and_units_are_each_one_s_own():
    narrow, wide = fit_together(flows_of(), zoos_of(), steps=3)
    pairs = zip(narrow.field.parameters(), wide.field.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    pairs = zip(narrow.average.parameters(), wide.average.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert narrow.field.scale.shape != wide.field.scale.shape
    for one, n in ((narrow, 4), (wide, 7)):
        assert one.sample(2, steps=2).shape == (2, arch_of(n).dimension)


def test_both_learn_and_files_hold_each_of_them(tmp_path):
    flows, zoos = flows_of(), zoos_of()
    held_out = [zoo_of(arch_of(n), 100 + n) for n in WIDTHS]
    fit_together(flows, zoos, steps=200, lr=0.01, batch_size=16, validation=held_out, log_every=50)
    assert flows[0].history[-1]["validation"] < flows[0].history[0]["validation"]
    for k, (one, held) in enumerate(zip(flows, held_out, strict=True)):
        drawn = one.sample(8, steps=8, start=held.initial[:8])
        section = one.section
        wanted, before = (section.project(w[:8]) for w in (held.final, held.initial))
        got = section.project(drawn)
        assert (got - wanted).norm() < 0.5 * (before - wanted).norm()
        path = tmp_path / f"{k}.safetensors"
        one.save(path)
        again = symflow.flows.load(path)
        torch.testing.assert_close(again.sample(2, steps=2, seed=3), one.sample(2, steps=2, seed=3))


def test_an_interruption_changes_nothing(tmp_path, monkeypatch):
    whole = fit_together(flows_of(), zoos_of(), steps=8, folder=tmp_path / "whole")
    advance, calls = Trainer._advance, []

    def stopping(self):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Trainer, "_advance", stopping)
    options = {"steps": 8, "folder": tmp_path / "cut", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit_together(flows_of(), zoos_of(), **options)
    monkeypatch.setattr(Trainer, "_advance", advance)
    cut = fit_together(flows_of(), zoos_of(), **options)
    for a, b in zip(whole, cut, strict=True):
        assert torch.equal(parameters(a), parameters(b))
        assert torch.equal(a.sample(2, steps=2), b.sample(2, steps=2))
    with pytest.raises(FileFormatError, match="together 1"):
        zoos = zoos_of()
        zoos[1].final = zoos[1].final + 1
        fit_together(flows_of(), zoos, **options)


def test_what_cannot_be_trained_together_is_refused():
    one, two = flows_of()
    with pytest.raises(ShapeError, match="one entry for each of 2 flows"):
        fit_together([one, two], zoos_of()[:1], steps=1)
    with pytest.raises(ShapeError, match="at least one"):
        fit_together([], [], steps=1)
    with pytest.raises(ShapeError, match=r"flows\[1\] is flows\[0\]"):
        fit_together([one, one], zoos_of(), steps=1)
    with pytest.raises(ShapeError, match=r"flows\[2\] is flows\[1\]"):
        fit_together([one, two, two], [*zoos_of(), zoos_of()[1]], steps=1)
    wider = flows_of()[1]
    wider.field.double()
    with pytest.raises(ShapeError, match="float64"):
        fit_together([one, wider], zoos_of(), steps=1)
    with pytest.raises(ShapeError, match=r"flows\[1\] must have a field with the parameters"):
        fit_together([one, flows_of(depth=2)[1]], zoos_of(), steps=1)
    deeper = geometric(symflow.mlp([5, 4, 3]), source=Gaussian(0.3), **FIELD)
    with pytest.raises(ShapeError, match=r"flows\[1\] must have a field with the parameters"):
        fit_together([one, deeper], [zoos_of()[0], zoo_of(deeper.arch)], steps=1)
    with pytest.raises(StateError, match="one by one"):
        fit_together(flows_of(conditions=1), zoos_of(), steps=1)
    with pytest.raises(ShapeError, match=r"zoos\[1\]"):
        fit_together([one, two], [zoos_of()[0], torch.zeros(3, 4)], steps=1)
