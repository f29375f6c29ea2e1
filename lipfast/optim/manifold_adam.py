"""Adam on orthogonal matrices (LipNeXt, Hu et al. 2026, https://arxiv.org/abs/2601.18513, section 3.1).

For an orthogonal X with Euclidean gradient G the direction of steepest descent is X g with the skew g = skew(X^T G): the
Riemannian gradient, seen from X. Skew matrices are one space for all X, so Adam's moments live there and need no transport:

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,    D = -lr m^ / (sqrt(v^) + eps),    X <- X FastExp(D)

v is symmetric as g is skew, so D is skew. Rounding and the series take X slowly off the manifold; every ``retraction`` steps
the nearest orthogonal matrix takes its place. Lookahead's average of matrices would leave the manifold: its slow weights Y move
along the sum of the steps instead, Y <- Y FastExp(alpha sum D), and the fast ones restart from them.

Every other parameter takes AdamW's step and, with lookahead, the ordinary average.
"""

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

from lipfast.ops._matrices import transposed
from lipfast.ops.polar import polar
from lipfast.optim._matrices import (
    Part,
    any_process,
    buckets,
    check_matrix,
    distance,
    exact_products,
    matrices,
    named,
    parts,
    together,
    whole,
)
from lipfast.optim.fast_exponential import less_identity

_LEAST_EPS = 1e-30  # a skew gradient has a zero diagonal, so the step divides by eps
_OFF = 0.01  # root mean square of the eigenvalues of X^T X - I from which X is not taken for an orthogonal matrix


def parameter_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """The parameters of ``model`` as ManifoldAdam's groups: orthogonal matrices and the others, with their names.

    Orthogonal are those that a module lists in its attribute ``orthogonal_parameters``, a tuple of names, as
    :class:`lipfast.nn.LipNeXtBlocks` does. ``settings`` (``lr`` and so on) go into both groups.
    """
    listed = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in getattr(module, "orthogonal_parameters", ())
    }
    split = [[(n, p) for n, p in model.named_parameters() if (n in listed) == orthogonal] for orthogonal in (True, False)]
    return [
        {"params": part, "orthogonal": orthogonal, **settings}
        for part, orthogonal in zip(split, (True, False), strict=True)
        if part
    ]


class ManifoldAdam(Optimizer):
    """Adam for orthogonal matrices and, beside them, for ordinary parameters.

    Args:
        params: parameter groups as torch's optimisers take them, named parameters too; a group with ``"orthogonal": True``
            holds square matrices (d, d) or stacks of them (N, d, d), float32 or float64, orthogonal when the first step is
            taken. A stack is one batched update, and so are parameters of equal d together. :func:`parameter_groups` makes
            the groups of a model.
        lr, betas, eps: Adam's, for all parameters; each group may have its own. eps of orthogonal ones is at least 1e-30.
        weight_decay: decoupled, of ordinary parameters only.
        lookahead: steps between two moves of the slow weights; 0 for none, which saves two further copies of the matrices.
        alpha: how far along the slow weights move.
        retraction: steps between two projections onto the manifold; 0 for none.
        process_group: processes with equal parameters and gradients (as DDP leaves them) that share the work: each updates an
            equal part of the matrices, keeps moments for these alone and receives the others. ``state_dict`` is then of
            this process's part.

    Works with gradient clipping, learning rate schedulers, ``GradScaler`` and autocast (the matrices stay float32: a half type
    cannot hold an orthogonal matrix) and ``torch.compile``. Under FSDP2 stack the matrices as (N, d, d): shards of dimension
    0 are whole matrices, and each process updates its own.

    A step waits for the device twice: to see that the gradients are finite, and for the orders of the series.

    Raises: ValueError, naming the parameter, before anything is changed: for a gradient with NaN or Inf, and for a matrix
        that is not orthogonal (root mean square of the eigenvalues of ``X^T X - I`` above 0.01), which is looked at on the
        first step and whenever something else has written to it (not through ``.data``, which leaves no trace). On
        construction: for matrices that are not square or are sharded inside, another dtype, a setting out of range, no
        orthogonal group, a process group that does not divide.

    >>> X = nn.Parameter(torch.eye(3))
    >>> optimizer = ManifoldAdam([{"params": [X], "orthogonal": True}], lr=0.1)
    >>> (X @ torch.tensor([1.0, 2.0, 3.0])).norm(p=4).backward()
    >>> optimizer.step()
    >>> torch.testing.assert_close(X.T @ X, torch.eye(3), atol=1e-3, rtol=0.0)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lookahead: int = 6,
        alpha: float = 0.5,
        retraction: int = 50,
        process_group: "dist.ProcessGroup | None" = None,
    ):
        self._group = process_group
        self._seen: dict[Tensor, int] = {}  # matrices known to be orthogonal, and their version then
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"lookahead": lookahead, "alpha": alpha, "retraction": retraction, "orthogonal": False}
        super().__init__(params, defaults)
        if not any(group["orthogonal"] for group in self.param_groups):
            raise ValueError(
                "ManifoldAdam: params must have a group with 'orthogonal': True, got none; parameter_groups(model) makes them"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:  # also when a state is loaded, which may be corrupt
        super().__setstate__(state)
        self.__dict__.setdefault("_group", None)
        self._seen = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            if group["orthogonal"]:
                for name, p in named(group):
                    check_matrix(name, p)
                for bucket in buckets(group["params"]):
                    self._shares(bucket)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.compiler.disable  # it decides by numbers: a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` computes the loss anew, as for every optimiser of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with exact_products():
            self._check_gradients()
            self._check_orthogonal()
            for group in self.param_groups:
                if group["orthogonal"]:
                    self._step_matrices(group)
                else:
                    self._step_ordinary(group)
        return loss

    @torch.no_grad()
    def retract(self) -> None:
        """Replaces every orthogonal matrix, slow ones too, by the nearest that is: to do before weights are kept."""
        with exact_products():
            for bucket in (b for group in self.param_groups if group["orthogonal"] for b in buckets(group["params"])):
                for part in parts(self._shares(bucket)):
                    self._retract(part)
                self._exchange(bucket)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for bucket in buckets(group["params"]):
            live = [(p, own) for p, own in self._shares(bucket) if p.grad is not None]
            for p, own in live:
                self._start(p, own, group["lookahead"])
            step_of = lambda share: int(self.state[share[0]]["step"])
            for step, shares in groupby(sorted(live, key=step_of), step_of):
                for part in parts(list(shares)):
                    self._move(group, part, step + 1)
            for p, _ in live:
                self.state[p]["step"] += 1
            self._exchange(bucket)

    def _start(self, p: Tensor, own: slice, lookahead: int) -> None:
        state = self.state[p]
        here = p.detach() if self._group is None else matrices(p)[own]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(here), torch.zeros_like(here)
        if lookahead and "slow" not in state:
            state["slow"], state["travelled"] = here.clone(), torch.zeros_like(here)

    def _move(self, group: dict[str, Any], part: Part, step: int) -> None:
        """The step numbered ``step`` of some matrices, and what falls due with it."""
        X = self._read(part, None)
        D = self._direction(group, part, X, step)
        X.add_(X @ less_identity(D))
        if group["lookahead"]:
            travelled = self._read(part, "travelled").add_(D)
            if step % group["lookahead"] == 0:
                slow = self._read(part, "slow")
                X = slow.add_(slow @ less_identity(group["alpha"] * travelled))
                self._write(part, "slow", X)
                travelled.zero_()
            self._write(part, "travelled", travelled)
        self._write(part, None, X)
        if group["retraction"] and step % group["retraction"] == 0:
            self._retract(part)

    def _direction(self, group: dict[str, Any], part: Part, X: Tensor, step: int) -> Tensor:
        """D, and the moments behind it: the step of Adam from zero, in one pass over memory."""
        gradient = together([matrices(p.grad)[rows] for p, rows, _ in part if p.grad is not None]).to(X.dtype)
        half = torch.baddbmm(X, X.mT, gradient, beta=0, alpha=0.5)
        g, m, v = half - transposed(half), self._read(part, "exp_avg"), self._read(part, "exp_avg_sq")
        D, before = half.zero_(), torch.full((), step - 1.0, device=X.device)
        adam(
            [D], [g], [m], [v], [], [before], fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=float(group["lr"]), eps=group["eps"],
        )  # fmt: skip
        self._write(part, "exp_avg", m)
        self._write(part, "exp_avg_sq", v)
        return D

    def _retract(self, part: Part) -> None:
        for name in (None, "slow"):
            if name is None or all(name in self.state.get(p, {}) for p, _, _ in part):
                self._write(part, name, polar(self._read(part, name)))

    def _step_ordinary(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if group["lookahead"] and "slow" not in state:
                state["slow"] = p.clone()
        kept = lambda name: [self.state[p][name] for p in params]
        steps, (b1, b2) = kept("step"), group["betas"]
        adam(
            params, [p.grad for p in params], kept("exp_avg"), kept("exp_avg_sq"), [], steps, decoupled_weight_decay=True,
            amsgrad=False, maximize=False, beta1=b1, beta2=b2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"],
        )  # fmt: skip
        for p, step in zip(params, steps, strict=True):
            if group["lookahead"] and int(step) % group["lookahead"] == 0:
                p.copy_(self.state[p]["slow"].lerp_(p, group["alpha"]))

    def _shares(self, bucket: list[Tensor]) -> list[tuple[Tensor, slice]]:
        """Which matrices of each parameter this process updates."""
        counts = [len(matrices(p)) for p in bucket]
        if self._group is None:
            return [(p, slice(0, n)) for p, n in zip(bucket, counts, strict=True)]
        N, world, rank = sum(counts), dist.get_world_size(self._group), dist.get_rank(self._group)
        if N % world:
            d = bucket[0].shape[-1]
            raise ValueError(
                f"ManifoldAdam: process_group must have a size that divides the number of {d} x {d} matrices, {N}, got {world}"
            )
        shares, before = [], 0
        for p, n in zip(bucket, counts, strict=True):
            first, last = (min(max(i * N // world - before, 0), n) for i in (rank, rank + 1))
            shares.append((p, slice(first, last)))
            before += n
        return shares

    def _exchange(self, bucket: list[Tensor]) -> None:
        """Gives every process the matrices that the others have updated, exactly: all but one add zeros."""
        for p, own in self._shares(bucket) if self._group is not None else ():
            stack = matrices(p)
            stack[: own.start].zero_()
            stack[own.stop :].zero_()
            dist.all_reduce(stack, group=self._group)
        for p in bucket:
            self._seen[p] = matrices(p)._version

    def _read(self, part: Part, name: str | None) -> Tensor:  # (B, d, d)
        """Parameters (None) or an entry of their state."""
        return together(self._views(part, name))

    def _write(self, part: Part, name: str | None, values: Tensor) -> None:
        views = self._views(part, name)
        for view, value in zip(views, values.split([len(view) for view in views]), strict=True):
            if view.data_ptr() != value.data_ptr():  # not written in place already
                view.copy_(value)

    def _views(self, part: Part, name: str | None) -> list[Tensor]:
        if name is None:
            return [matrices(p)[rows] for p, rows, _ in part]
        return [matrices(self.state[p][name])[slice(rows.start - o, rows.stop - o)] for p, rows, o in part]

    def _check_gradients(self) -> None:
        grads = [(name, p.grad) for group in self.param_groups for name, p in named(group) if p.grad is not None]
        for kind in (True, False):
            of_kind = [(name, g) for name, g in grads if hasattr(g, "full_tensor") == kind]
            total = whole(nn.utils.get_total_norm([g for _, g in of_kind])) if of_kind else torch.zeros(())
            for name, g in () if total.isfinite() else of_kind:
                if not whole(torch.linalg.vector_norm(g, dtype=torch.float32)).isfinite():
                    raise ValueError(
                        f"ManifoldAdam: the gradient of {name} must be finite, got NaN, Inf or overflow: no step taken"
                    )

    def _check_orthogonal(self) -> None:
        known = [entry for group in self.param_groups if group["orthogonal"] for entry in named(group)]
        unknown = [entry for entry in known if self._seen.get(entry[1]) != matrices(entry[1])._version]
        sharded = [p for _, p in known if hasattr(p, "device_mesh")]
        if sharded and any_process(sharded[0], bool(unknown)):  # then all look, for they must raise together
            unknown = known
        for name, p in unknown:
            slow = self.state.get(p, {}).get("slow")
            for what, t in (("", p), (" (state slow)", slow)) if slow is not None else (("", p),):
                off = torch.stack([distance(X) for X in matrices(t)]).cpu() if len(matrices(t)) else torch.zeros(1)
                if any_process(p, not bool((off <= _OFF).all())):
                    worst = int(off.nan_to_num(math.inf).argmax())
                    at = f"matrix {worst} of {name}" if p.ndim == 3 else name
                    raise ValueError(
                        f"ManifoldAdam: {at}{what} must be orthogonal: |X^T X - I|_F / sqrt(d) must be at most {_OFF}, "
                        f"got {off[worst]:.3g}; lipfast.polar gives the nearest orthogonal matrix; no step taken"
                    )
            self._seen[p] = matrices(p)._version


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"ManifoldAdam: {name} must be at least 0 and finite, got {group[name]}")
    if group["orthogonal"] and group["eps"] < _LEAST_EPS:
        raise ValueError(f"ManifoldAdam: eps must be at least {_LEAST_EPS} for orthogonal matrices, got {group['eps']}")
    if len(group["betas"]) != 2 or not all(0 <= b < 1 for b in group["betas"]):
        raise ValueError(f"ManifoldAdam: betas must be two numbers from 0 to below 1, got {group['betas']}")
    for name in ("lookahead", "retraction"):
        if group[name] != int(group[name]) or group[name] < 0:
            raise ValueError(f"ManifoldAdam: {name} must be a number of steps, 0 for none, got {group[name]}")
    if not 0 < group["alpha"] <= 1:
        raise ValueError(f"ManifoldAdam: alpha must be above 0 and at most 1, got {group['alpha']}")
