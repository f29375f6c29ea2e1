import os

import pytest
import torch
from safetensors.torch import save_file

from lipfast import checkpoint, models


def saved(tmp_path, name="cnn_small", **arguments):
    path = tmp_path / "model.safetensors"
    model = models.build(name, **arguments)
    checkpoint.save(path, model, name, arguments, {"note": [1, 2]})
    return path, model


def test_a_checkpoint_gives_back_the_model(tmp_path):
    path, model = saved(tmp_path, shape=(1, 8, 8), classes=3)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(checkpoint.load(path)(x), model.eval()(x))
    assert checkpoint.read(path) == {
        "model": "cnn_small",
        "arguments": {"shape": [1, 8, 8], "classes": 3},
        "metadata": {"note": [1, 2]},
    }
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 9, 200, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path, _ = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: (truncated|not a safetensors file)") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    path, model = saved(tmp_path)
    about = {"model": "cnn_small", "arguments": {}, "metadata": {}}
    for spoil, fault in [
        (lambda t: t.pop("0.weight"), "checkpoint from another model: '0.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "checkpoint from another model: 'extra' is not among"),
        (
            lambda t: t.update({"0.bias": torch.zeros(3)}),
            r"checkpoint from another model: '0.bias' must be \(16,\), got \(3,\)",
        ),
    ]:
        tensors = model.state_dict()
        spoil(tensors)
        checkpoint.write_tensors(path, tensors, about)
        with pytest.raises(ValueError, match=fault):
            checkpoint.load(path)
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match="not a checkpoint of lipfast"):
        checkpoint.load(path)
    path.write_text("weights, honestly")
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="cannot read a checkpoint: No such file"):
        checkpoint.load(tmp_path / "absent.safetensors")
    checkpoint.write_tensors(path, {"0.exp_avg": torch.zeros(1)}, {"epoch": 3})
    with pytest.raises(ValueError, match="no model checkpoint: 'model' is not recorded"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="cannot be written"):
        checkpoint.save(tmp_path / "no" / "folder", model, "cnn_small")
