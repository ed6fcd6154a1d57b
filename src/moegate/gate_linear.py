"""`GateLinear`: the GEMM of a router with its tensors, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moegate import arguments, ops
from moegate.choice.dispatch import Options, for_gemm
from moegate.choice.plan import check_names
from moegate.noticing import requires_grad, warn_of_no_grad
from moegate.plain import META, are_plain, is_compiling
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec
from moegate.spec_values import LogitsDtype
from moegate.takes_note import TakesNote


class GateLinear(TakesNote):
    """The GEMM of one layer's router: `hidden @ weight.T + bias`, by the kernels of `moegate.router_gemm`.

    For engines whose gate and selection are apart. A `Gate` computes both at once, and faster. How calls notice that a
    tensor changed, and what `frozen` declares, is the same as of `Gate`.

    Args:
        weight: [N, K] bfloat16, float16 or float32, N from 1 to 1024.
        bias: [N] in any of these dtypes, on the same device, added before the rounding; None: no bias.
        out_dtype: The dtype of the logits, torch.float32 or torch.bfloat16.
        frozen: The tensors seldom change, and never while a call reads them.
        pdl: See `Gate`.
        backend: See `Gate`.
        policy: See `Gate`.

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride, device or `out_dtype` that is not allowed; an unknown backend or policy, or a
            backend that cannot run here.
    """

    spec: RouterSpec
    """A router of one choice with these logits."""
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.float32,
        frozen: bool = False,
        pdl: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> None:
        check_names(policy, backend)
        rows, hidden_size = arguments.check_gate_linear(weight, bias, out_dtype)
        logits_dtype: LogitsDtype = "bfloat16" if out_dtype == torch.bfloat16 else "float32"
        # A router with these logits; of its plan only the GEMMs run.
        spec = RouterSpec(hidden_size, rows, 1, linear_bias=bias is not None, logits_dtype=logits_dtype)
        super().__init__(spec, weight, RouterTensors(bias), Options(frozen, pdl, backend, policy), half="gemm")

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return getattr(torch, self.spec.logits_dtype)  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits of M tokens.

        Args:
            hidden: [M, K] bfloat16, float16 or float32, on the gate's device; M may be 0.

        Returns:
            The logits [M, N] in `out_dtype`. No gradient flows through them.

        Raises:
            TypeError: Not a tensor, or a dtype that is not allowed.
            ValueError: A wrong shape, stride or device.
            RuntimeError: Tensors of the gate changed, and a CUDA graph is being captured.
        """
        if is_compiling() or not are_plain((hidden,)):
            return self._unlooked(hidden)
        noted = self._noted
        if noted is not None and noted.holds(self._parameters, self._buffers):
            weight: Tensor = self._parameters["weight"]  # type: ignore[assignment] # None would have failed the look
        else:
            noted, weight = self._notice()
        arguments.check_hidden(hidden, self.spec, noted.device)
        if torch.is_grad_enabled() and requires_grad((hidden, weight, *noted.learned)):
            warn_of_no_grad()
        with torch.no_grad():
            return noted.dispatch.router_gemm(hidden, weight, noted.tensors, noted.prepared)

    def _unlooked(self, hidden: Tensor) -> Tensor:
        """A call without a look: one operator for compilers; PyTorch's operations for wrappers, modes and tracers."""
        weight, tensors = arguments.check_gate(self._given(), self.spec)
        arguments.check_hidden(hidden, self.spec, weight.device)
        if torch.is_grad_enabled() and requires_grad((hidden, weight, *tensors)):
            warn_of_no_grad()
        bias = None if tensors.bias is None else tensors.bias.detach()
        if is_compiling():
            options = Options(self.frozen, self.pdl, self.backend, self.policy)
            return ops.router_gemm(hidden.detach(), weight.detach(), bias, self.out_dtype, options)
        with torch.no_grad():
            dispatch = for_gemm(META, weight, bias, self.out_dtype, Options())
            return dispatch.router_gemm(hidden, weight, RouterTensors(bias), {})

    def warmup(self, *hidden_dtypes: torch.dtype) -> None:
        """Multiplies one token in each of these dtypes of `hidden`, so that later calls compile nothing.

        Args:
            hidden_dtypes: bfloat16, float16 or float32.

        Raises:
            TypeError: Another dtype.
        """
        for hidden_dtype in hidden_dtypes:
            self(torch.zeros((1, self.spec.hidden_size), dtype=hidden_dtype, device=self.weight.device))

    def extra_repr(self) -> str:
        """The gate's size and options in one line."""
        rows, hidden_size = self.weight.shape
        dtype = str(self.out_dtype).removeprefix("torch.")
        backend = None if self._noted is None else self._noted.dispatch.name
        return f"{hidden_size} -> {rows}, out_dtype={dtype}, backend={backend!r}, frozen={self.frozen}"
