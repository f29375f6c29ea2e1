"""beta-Abs as a layer."""

from torch import Tensor, nn

from lipfast.ops.beta_abs import beta_abs, check_beta


class BetaAbs(nn.Module):
    """Absolute value of the first ``floor(beta C)`` channels of (B, C, ...): :func:`lipfast.beta_abs`.

    Raises: ValueError if ``beta`` is not in [0, 1].
    """

    def __init__(self, beta: float = 0.5):
        super().__init__()
        check_beta("BetaAbs", beta)
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return beta_abs(x, self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"
