"""A model as a graph of the few kinds of maps that bounds are made of.

:func:`read` traces an ``nn.Module`` once and returns a :class:`Network`: nodes in the order of computation, each with its
name, its map (a *layer*, below), the nodes it reads and the shape of its value for one sample. What a layer means for
boxes, Lipschitz constants or Jacobians is said in those analyses, one rule per layer kind.

    affine        Linear, Conv, Scale (normalisation, batch norm, constants), AveragePool, Pad, Rearrange, Sum
    elementwise   Elementwise, with the range of its slopes
    pairing       MaxMin
    other         MaxPool, L2Pool

The graph holds the model's own parameters, so gradients reach them; reading again after an optimiser step is cheap.
"""

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lipfast.bounds import _reading
from lipfast.bounds.layers import Input, Layer, Rearrange, Scale, Sum, Unsupported


@dataclass(frozen=True)
class Node:
    name: str  # the layer's name in the model, or the traced function's
    layer: Layer
    inputs: tuple[int, ...]  # positions in Network.nodes
    shape: tuple[int, ...]  # of one sample


@dataclass(frozen=True)
class Network:
    nodes: tuple[Node, ...]  # nodes[0] is the input, nodes[-1] the output

    def readers(self) -> list[list[int]]:
        """For each node the positions of the nodes that read it, ascending: after the last an analysis may drop its value."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for position, node in enumerate(self.nodes):
            for i in node.inputs:
                readers[i].append(position)
        return readers

    def until(self, position: int) -> "Network":
        """The part that computes the node at ``position``, which becomes the output."""
        return Network(self.nodes[: position + 1])


def read(model: nn.Module, input_shape: tuple[int, ...]) -> Network:
    """The graph of ``model`` for samples of ``input_shape`` (without the batch dimension).

    Raises ValueError, naming the layer and what is supported, for a layer without a rule, batch norm or dropout in training
    mode, a forward that branches on data, or several inputs or outputs.
    """
    graph, values = _trace(model, tuple(input_shape))
    nodes: list[Node] = []
    place: dict[torch.fx.Node, int] = {}

    def add(name: str, layer: Layer, inputs: tuple[int, ...], shape) -> int:
        nodes.append(Node(name, layer, inputs, tuple(shape)))
        return len(nodes) - 1

    for fx in graph.nodes:
        value = values.get(fx)
        if fx.op == "placeholder":
            if nodes:
                raise ValueError(f"model: one input expected, forward also takes {fx.name!r}")
            place[fx] = add(fx.name, Input(), (), input_shape)
        elif fx.op == "output":
            if not isinstance(fx.args[0], torch.fx.Node) or fx.args[0] not in place:
                raise ValueError("model: forward must return one tensor that depends on its input")
            if place[fx.args[0]] != len(nodes) - 1:  # something after the output is computed and never used
                nodes = nodes[: place[fx.args[0]] + 1]
        elif any(a in place for a in fx.all_input_nodes) and (isinstance(value, Tensor) or fx.op == "call_module"):
            name = str(fx.target) if fx.op == "call_module" else fx.name
            if not isinstance(value, Tensor):
                raise Unsupported(name, f"{type(model.get_submodule(name)).__name__}, which returns several tensors,")
            tensors = [a for a in fx.all_input_nodes if a in place]
            at = tuple(place[a] for a in tensors)
            layers = _layers_of(model, fx, name, values, place)
            for layer in layers[:-1]:  # a padded convolution is two maps
                at = (add(name, layer, at, layer.shape_after(nodes[at[0]].shape)),)
            if isinstance(layers[-1], Sum):
                at = tuple(place[a] for a in fx.args[:2])
            elif isinstance(layers[-1], Rearrange) and value.shape[0] != _BATCH:
                raise ValueError(f"layer {name!r}: the batch dimension must stay first, got {tuple(value.shape)}")
            place[fx] = add(name, layers[-1], at, value.shape[1:])
    if not isinstance(nodes[0].layer, Input):
        raise ValueError("model: forward must take one tensor")
    return Network(tuple(nodes))


_BATCH = 3  # of the traced shapes: a size that a layer seldom has, so that a lost batch dimension shows


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return _reading.knows(m) or super().is_leaf_module(m, qualified_name)


_traced: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()


def _trace(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[torch.fx.Graph, dict]:
    """The traced graph and each node's value for fake inputs; remembered until the model's modules change."""
    signature = (input_shape, tuple((name, id(m), m.training) for name, m in model.named_modules()))
    known = _traced.setdefault(model, {})
    if known.get("signature") != signature:
        root = nn.Sequential(model) if _reading.knows(model) else model  # a bare layer has no inside to trace
        try:
            graph = _Tracer().trace(root)
        except Exception as error:  # fx raises many kinds for what it cannot trace
            raise ValueError(f"model: forward cannot be traced: {error}".splitlines()[0]) from error
        known.update(signature=signature, graph=graph, values=_fake_values(root, graph, input_shape))
    return known["graph"], known["values"]


def _fake_values(root: nn.Module, graph: torch.fx.Graph, input_shape: tuple[int, ...]) -> dict:
    interpreter = _Recorder(torch.fx.GraphModule(root, graph))
    like = next((t for t in chain(root.parameters(), root.buffers()) if t.is_floating_point()), None)
    dtype, device = (like.dtype, like.device) if like is not None else (torch.float32, torch.device("cpu"))
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a traceback beside what is raised
    level = log.level
    log.setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            interpreter.run(torch.empty(_BATCH, *input_shape, dtype=dtype, device=device))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"layer {interpreter.at!r}: does not accept samples of shape {input_shape}: {error}".splitlines()[0]
            ) from error
        finally:
            log.setLevel(level)
    return interpreter.values


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module):
        super().__init__(module)
        self.values: dict = {}
        self.at = ""

    def run_node(self, n):
        self.at = str(n.target)
        self.values[n] = super().run_node(n)
        return self.values[n]


def _layers_of(model: nn.Module, fx: torch.fx.Node, name: str, values: dict, place: dict) -> list[Layer]:
    if fx.op == "call_module":
        module = model.get_submodule(str(fx.target)) if not _reading.knows(model) else model
        layers = _reading.of_module(module, name)
        return (
            [_along_lines(layer) for layer in layers] if isinstance(module, nn.BatchNorm1d) and values[fx].ndim == 3 else layers
        )
    function: Callable | str = fx.target
    if function in _SUMS and len(fx.args) >= 2 and fx.kwargs.get("alpha", 1) == 1:
        return [_sum(model, fx, name, values, place)]
    if function in _PRODUCTS:
        return [_product(model, fx, name, place)]
    constants = {a: _constant(model, a) for a in fx.all_input_nodes if a not in place and a.op == "get_attr"}
    resolve = lambda a: constants.get(a, values.get(a)) if isinstance(a, torch.fx.Node) and a not in place else a
    args = torch.fx.node.map_arg(fx.args[1:], resolve)
    kwargs = torch.fx.node.map_arg({k: v for k, v in fx.kwargs.items() if k != "input"}, resolve)
    return _reading.of_function(function, name, args, kwargs, tuple(values[fx].shape[1:]))


def _along_lines(layer: Layer) -> Layer:
    """Batch norm of vectors (C,) as that of lines (C, W)."""
    assert isinstance(layer, Scale), layer
    column = lambda t: None if t is None else t[:, None]
    return Scale(column(layer.shift), column(layer.factor), column(layer.offset))


_SUMS = {operator.add: 1, operator.iadd: 1, torch.add: 1, "add": 1, "add_": 1, operator.sub: -1, torch.sub: -1, "sub": -1}
_PRODUCTS = {operator.mul: 1, torch.mul: 1, "mul": 1, operator.truediv: -1, torch.div: -1, "div": -1}


def _sum(model, fx, name, values, place) -> Layer:
    sign = float(_SUMS[fx.target])
    left, right = fx.args[:2]
    if left in place and right in place:
        if values[left].shape != values[right].shape:
            raise ValueError(
                f"layer {name!r}: a sum must be of equal shapes, got {values[left].shape} and {values[right].shape}"
            )
        return Sum((1.0, sign))
    if left in place:
        return Scale(offset=sign * _constant(model, right))
    return Scale(factor=torch.as_tensor(sign), offset=_constant(model, left))


def _product(model, fx, name, place) -> Layer:
    left, right = fx.args[:2]
    if (left in place) == (right in place) or (_PRODUCTS[fx.target] < 0 and right in place):
        raise Unsupported(name, "a product or quotient of two values that both depend on the input")
    factor = _constant(model, right if left in place else left)
    return Scale(factor=1 / factor.double() if _PRODUCTS[fx.target] < 0 else factor)


def _constant(model: nn.Module, value) -> Tensor:
    """A number or a parameter or buffer of the model."""
    if isinstance(value, torch.fx.Node):
        if value.op != "get_attr":
            raise Unsupported(str(value.name), "a value computed from parameters inside forward")
        *path, last = str(value.target).split(".")
        return getattr(model.get_submodule(".".join(path)), last)
    return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
