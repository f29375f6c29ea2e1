import json

import pytest
import torch

from bench import lipnext

SMALL = lipnext.TINY[1]


def test_every_row_says_what_was_measured_and_fits_a_record(device, capsys):
    rows = list(lipnext.large(device, repeats=2, quick=True))
    assert json.loads(json.dumps(rows, allow_nan=False)) is not None
    passes, billion, wide, *steps = rows
    assert all(above > 0 for above in passes["above_the_floor"].values())
    assert sum(passes["of_a_block"].values()) == pytest.approx(1)
    assert billion["in_matrices"] == 2**30
    assert wide["in_matrices"] == pytest.approx(2**30, rel=1e-3)
    for row in steps:
        total = sum(row["seconds"][phase][1] for phase in ("forward", "backward", "clip", "optimizer", "retraction"))
        assert row["images_per_second"] == pytest.approx(2 / total)
        assert 0 < row["optimizer_share"] < 1
        assert row["off_manifold"] < 1e-5
        assert (row["peak_bytes"] is not None) == (device == "cuda")
    assert capsys.readouterr().out.count("images/s") == len(lipnext.TINY)


def test_what_does_not_fit_is_said_and_the_next_setting_runs(device, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 140 << 30))
    monkeypatch.setattr(lipnext, "_images", full)
    row = lipnext.run(SMALL, device, 1)
    assert "out of memory" in row["failed"]
    assert "seconds" not in row
    assert "LipNeXt L2W16, batch 2, bfloat16: out of memory" in capsys.readouterr().out
    monkeypatch.undo()
    assert "failed" not in lipnext.run(SMALL, device, 1)


def test_only_a_compiler_may_fail(device, capsys, monkeypatch):
    def broken(model, what):
        raise torch._dynamo.exc.Unsupported("no such operation\nand a page of hints")

    monkeypatch.setattr(lipnext, "_compile", broken)
    row = lipnext.run(lipnext.Setting(2, 16, 2, compiled="model"), device, 1)
    assert row["failed"] == "torch.compile: Unsupported: no such operation"
    with pytest.raises(torch._dynamo.exc.Unsupported):
        lipnext.run(SMALL, device, 1)


def test_the_size_of_a_step_is_that_of_the_matrices_tangent(device):
    torch.manual_seed(0)
    model = lipnext.models.lipnext(depth=1, width=16).to(device)
    plan = lipnext.dataclasses.replace(lipnext._RECIPE, lookahead=0)
    optimizer = plan.make_optimizer(model)
    before = {p: p.detach().clone() for p in (model[2].rotation, model[2].mixing)}
    lipnext._step(plan, model, optimizer, lipnext._images(2, device), lipnext._Watch(device))
    moved = max((p.detach() - X).norm().item() for p, X in before.items())  # X FastExp(D) - X, for a small D
    assert lipnext._step_norm(optimizer) == pytest.approx(moved, rel=1e-2)
