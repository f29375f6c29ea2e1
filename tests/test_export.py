import re
import sys
from fractions import Fraction

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import checkpoint, export, models
from lipfast.cli import main
from lipfast.grafting import graft
from lipfast.nn import ClippedReLU, GraftedReLU, MaxMin, Normalize
from tests.checks import assert_near
from tests.networks import jacobian

SHAPE = (3, 8, 8)


def grafted(model: nn.Module) -> nn.Module:
    """A third of the units are lines, each its own."""
    for layer in model.modules():
        if isinstance(layer, GraftedReLU):
            layer.mask.bernoulli_(1 / 3)
            layer.slope.data.uniform_(-0.5, 1.5)
            layer.intercept.data.uniform_(-0.2, 0.2)
    return model


def every_kind() -> nn.Module:
    body = [nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(3, 4, 3, 2, 1, groups=1), nn.BatchNorm2d(4), GraftedReLU((4, 5, 5))]
    tail = [nn.AvgPool2d(2, 1), MaxMin(), nn.Flatten(), nn.Dropout(), lipfast.nn.orthogonal(nn.Linear(36, 6)), ClippedReLU(0.1)]
    return nn.Sequential(Normalize([0.4] * 3, [0.2] * 3), *body, nn.MaxPool2d(2, 1), *tail, nn.Linear(6, 3))


NETWORKS = {
    "residual": lambda: models.resnet2b(SHAPE, activation="grafted_relu"),
    "all grafted": lambda: graft(models.mlp((192, 9, 3)), {"2": torch.ones(9, dtype=torch.bool)}, input_shape=SHAPE),
    "none grafted": lambda: models.mlp((192, 9, 3), "grafted_relu"),
    "every kind": every_kind,
}


def evaluated(path, x):
    from onnx.reference import ReferenceEvaluator

    return torch.from_numpy(ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})[0])


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    return pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NETWORKS)
def test_an_onnx_file_computes_what_the_model_computes(name, onnx, tmp_path, capfd):
    model = NETWORKS[name]() if name == "none grafted" else grafted(NETWORKS[name]())
    before = str(model)
    export.onnx(model, SHAPE, tmp_path / "model.onnx")
    assert str(model) == before
    assert model.training
    assert capfd.readouterr() == ("", "")
    x = torch.rand(7, *SHAPE)
    for images in (x, x[:1]):
        assert_near(evaluated(tmp_path / "model.onnx", images), model.eval()(images), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_file_holds_standard_operators_only_and_nothing_of_this_computer(onnx, tmp_path):
    for model, more in ((grafted(NETWORKS["residual"]()), {"Conv", "Add", "Mul"}), (NETWORKS["none grafted"](), set())):
        export.onnx(model, SHAPE, tmp_path / "model.onnx")
        found = onnx.load(tmp_path / "model.onnx")
        assert [(entry.domain, entry.version) for entry in found.opset_import] == [("", 18)]
        assert {node.op_type for node in found.graph.node} == {"Relu", "Reshape", "Gemm"} | more
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()


def test_leaves_the_precisions_of_the_process_alone(onnx, tmp_path):
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.conv.fp32_precision
    assert (before, cudnn.rnn.fp32_precision) == ("ieee", "tf32")  # conftest.py's, of which torch.export makes nothing
    export.onnx(models.mlp((192, 3)), SHAPE, tmp_path / "model.onnx")
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")


def refusing(*args, **options):
    raise RuntimeError("no such operator\nand more") from TypeError("the cause\nand more")


def foreign(*args, **options):
    import onnx

    node = onnx.helper.make_node("Graft", ["input"], ["output"], domain="custom")
    graph = onnx.helper.make_graph([node], "graph", [], [])
    return type("Program", (), {"model_proto": onnx.helper.make_model(graph)})


def test_refuses_what_it_cannot_write_and_leaves_no_file(onnx, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="layer '1': LayerNorm is not supported"):
        export.onnx(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), (2,), path)
    for exporter, message in ((refusing, "torch cannot export the model: the cause$"), (foreign, "got custom.Graft")):
        monkeypatch.setattr(torch.onnx, "export", exporter)
        with pytest.raises(ValueError, match=f"onnx: .*{message}"):
            export.onnx(models.mlp((2, 3)), (2,), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be written"):
        export.onnx(models.mlp((2, 3)), (2,), tmp_path / "none" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript are needed \(pip install lipfast\[onnx\]\)"):
        export.onnx(models.mlp((2, 3)), (2,), path)
    assert not list(tmp_path.iterdir())


def test_stock_crown_bounds_grafted_units_exactly():
    lirpa = pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not installed")
    model = graft(models.mlp((6, 9, 3)), {"2": torch.ones(9, dtype=torch.bool)}, input_shape=(6,)).eval()
    x = torch.rand(1, 6)
    plain = export._with_lines(model)
    bounded = lirpa.BoundedModule(plain, x)
    ball = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=float("inf"), eps=0.1))
    lower, upper = bounded.compute_bounds(x=(ball,), method="CROWN")
    matrix = jacobian(plain, (6,))
    assert_near(((upper - lower) / 2)[0], 0.1 * matrix.abs().sum(1), torch.float32)


def parsed(path) -> tuple[dict[str, dict[str, Fraction]], list[tuple[str, str]], list[str]]:
    """Bounds of the inputs, pairs (a, b) of which one must have a >= b, and declared names; and nothing else is there."""
    text = re.sub(";.*", "", path.read_text())
    names = re.findall(r"\(declare-const (\w+) Real\)", text)
    bounds: dict[str, dict[str, Fraction]] = {">=": {}, "<=": {}}
    for sign, name, number in re.findall(r"\(assert \(([<>]=) (X_\d+) (-?[\d.]+)\)\)", text):
        bounds[sign][name] = Fraction(number)
    (cases,) = re.findall(r"\(assert \(or\s((?:\s*\(and \(>= Y_\d+ Y_\d+\)\)\s)+)\)\)", text)
    for found in (r"\(declare-const \w+ Real\)", r"\(assert \([<>]= X_\d+ -?[\d.]+\)\)", re.escape(cases)):
        text = re.sub(found, "", text)
    assert text.split() == ["(assert", "(or", "))"]
    return bounds, re.findall(r">= (Y_\d+) (Y_\d+)", cases), names


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), None])
@pytest.mark.parametrize("eps", [2 / 255, 1e-300])
def test_the_box_of_a_vnnlib_file_is_the_ball_rounded_outward(eps, pixel_range, dtype, tmp_path):
    noise = torch.rand(2, 3, 4)
    x = (255 * noise).to(dtype) if dtype == torch.uint8 else noise.to(dtype)
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    export.vnnlib(tmp_path / "x.vnnlib", x, 1, 3, eps, pixel_range)
    bounds, _, names = parsed(tmp_path / "x.vnnlib")
    pixels = (x.float() / 255 if dtype == torch.uint8 else x).flatten().tolist()
    assert names == [*(f"X_{i}" for i in range(24)), "Y_0", "Y_1", "Y_2"]
    assert list(bounds[">="]) == list(bounds["<="]) == names[:24]
    low, high = (Fraction(0), Fraction(1)) if pixel_range else (Fraction(-9), Fraction(9))
    for i, pixel in enumerate(map(Fraction, pixels)):
        least, greatest = max(pixel - Fraction(eps), low), min(pixel + Fraction(eps), high)
        assert least - Fraction(1, 10**12) < bounds[">="][f"X_{i}"] <= least
        assert greatest <= bounds["<="][f"X_{i}"] < greatest + Fraction(1, 10**12)


@pytest.mark.parametrize("label", range(4))
def test_the_property_is_that_another_class_is_as_likely(label, tmp_path):
    export.vnnlib(tmp_path / "x.vnnlib", torch.zeros(2), label, 4, 0.1)
    cases = parsed(tmp_path / "x.vnnlib")[1]
    assert cases == [(f"Y_{j}", f"Y_{label}") for j in range(4) if j != label]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 3}, "label must be from 0 to classes - 1 of at least two, got 3 of 3"),
        ({"label": -1}, "label must be"),
        ({"label": 0, "classes": 1}, "label must be"),
        ({"eps": -0.1}, "eps must be finite and not negative"),
        ({"eps": float("inf")}, "eps must be"),
        ({"x": torch.tensor([0.5, float("nan")])}, "pixels must be finite and from 0 to 1"),
        ({"x": torch.tensor([0.5, 1.5])}, "pixels must be finite and from 0 to 1, got 0.5 to 1.5"),
        ({"x": torch.tensor([1])}, "x must be an image, floating or uint8, got torch.int64"),
        ({"x": [0.5]}, "x must be an image, floating or uint8, got list"),
    ],
)
def test_vnnlib_names_the_wrong_argument(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"vnnlib: {message}"):
        export.vnnlib(tmp_path / "x.vnnlib", **{"x": torch.zeros(2), "label": 0, "classes": 3, "eps": 0.1} | changes)
    assert not list(tmp_path.iterdir())


def test_command_writes_what_a_verifier_reads(tmp_path, capsys):
    pytest.importorskip("sklearn")
    model = models.cnn_small((1, 8, 8), activation="grafted_relu")
    about = {"data": "digits", "root": None, "recipe": "graft", "settings": {"eps": 0.05}}
    run = tmp_path / "run.safetensors"
    checkpoint.save(run, model, "cnn_small", {"shape": (1, 8, 8), "activation": "grafted_relu"}, about)
    assert main(["export", str(run), str(tmp_path / "out"), "--limit", "3", "--timeout", "60"]) == 0
    assert "3 properties at l_inf eps 0.05" in capsys.readouterr().out
    rows = (tmp_path / "out" / "instances.csv").read_text().split()
    assert rows == [f"model.onnx,image{i}.vnnlib,60" for i in range(3)]
    assert all((tmp_path / "out" / name).exists() for row in rows for name in row.split(",")[:2])
    about |= {"recipe": "gloro", "settings": {"eps": 0.3}}  # a radius of l_2
    checkpoint.save(run, model, "cnn_small", {"shape": (1, 8, 8), "activation": "grafted_relu"}, about)
    for command in (["export", str(run), str(tmp_path / "other")], ["evaluate", str(run)]):
        assert main(command) == 2
        assert "names no l_inf radius" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
