"""All ways to route that a plan can choose among, each with one predicate of what it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moegate.backends import cuda
from moegate.backends.cuda import gemm as cuda_gemm
from moegate.backends.cuda import product
from moegate.backends.cuda.tiling import MAX_DECODE_TOKENS, MAX_GEMM_TOKENS
from moegate.backends.flashinfer import known_failure, limits
from moegate.choice.facts import Facts

Reason = Callable[[Facts, int], "str | None"]


@dataclass(frozen=True)
class Candidate:
    """One way: the kernels that a backend runs for some numbers of tokens."""

    backend: str
    kernel_of: Callable[[Facts], str]
    """What runs, by name; the name of FlashInfer's product has the shape in it."""
    supports: Reason
    """(facts, number of tokens) -> None, or why it cannot run."""
    breaks: Reason
    """(facts, number of tokens) -> None, or the promise of docs/contract.md that would not be kept."""

    def key(self, facts: Facts) -> str:
        """Its name in cost tables."""
        return f"{self.backend}:{self.kernel_of(facts)}"


def _cuda(facts: Facts) -> str | None:
    """None, or why the cuda backend cannot run; beside the device, what `CudaBackend.unsupported` asks."""
    machine = facts.machine
    if machine.capability is None:
        return f"{machine.name} is no NVIDIA GPU"
    return cuda.unsupported_capability(machine.capability) or machine.no_nvrtc


def _router_gemm(facts: Facts, num_tokens: int) -> str | None:
    if num_tokens > MAX_GEMM_TOKENS:
        return f"its product takes up to {MAX_GEMM_TOKENS} tokens"
    return _cuda(facts) or cuda_gemm.unsupported(facts.spec.hidden_size)


def _is_decode(facts: Facts, num_tokens: int) -> bool:
    """True where router_gemm is promised."""
    return num_tokens <= MAX_DECODE_TOKENS and _router_gemm(facts, num_tokens) is None


def _cublas(facts: Facts, num_tokens: int) -> str | None:
    if _is_decode(facts, num_tokens):
        return f"up to {MAX_DECODE_TOKENS} tokens router_gemm runs, so that a token's bits do not depend on M"
    return _cuda(facts)


def plain_product(facts: Facts) -> str | None:
    """None, or why PyTorch's operations make the logits in cuBLAS's place."""
    has_norm = facts.spec.input_norm_eps is not None
    return product.unsupported(facts.hidden, facts.weight, facts.spec.hidden_size, has_norm=has_norm)


def _torch_breaks(facts: Facts, num_tokens: int) -> str | None:
    if _is_decode(facts, num_tokens):
        return f"a token's bits would depend on M up to {MAX_DECODE_TOKENS}"
    return None


def _never(facts: Facts, num_tokens: int) -> str | None:
    return None


def _flashinfer(facts: Facts, function: limits.Function) -> str | None:
    """None, or why FlashInfer cannot run one of its functions on the machine."""
    machine = facts.machine
    if machine.capability is None:
        return f"{machine.name} is no NVIDIA GPU"
    reason = limits.missing(function, machine.capability, machine.flashinfer) or machine.no_nvcc
    if reason is None and machine.device is not None:
        reason = known_failure(function, machine.device)
    return reason


def _gemm(facts: Facts, num_tokens: int) -> str | None:
    reason = limits.gemm_refuses(facts.spec, facts.weight) or limits.dtype_refuses(facts.hidden)
    if reason is None and num_tokens > limits.MAX_TOKENS:
        reason = f"its router GEMMs take up to {limits.MAX_TOKENS} tokens"
    return reason or _flashinfer(facts, limits.GEMMS[facts.spec.hidden_size, facts.spec.num_gate_rows])


def _top_k(facts: Facts, num_tokens: int) -> str | None:
    return limits.top_k_refuses(facts.spec) or _flashinfer(facts, limits.TOP_K)


def _tinygemm(facts: Facts, num_tokens: int) -> str | None:
    refused = limits.tinygemm_refuses(facts.spec, facts.weight, facts.bias) or limits.dtype_refuses(facts.hidden)
    return refused or _flashinfer(facts, limits.TINYGEMM)


def _product_breaks(facts: Facts, num_tokens: int) -> str | None:
    return "FlashInfer does not promise a token the same bits at every M"


def _top_k_breaks(facts: Facts, num_tokens: int) -> str | None:
    return "FlashInfer leaves the order of equal keys and NaN undefined"


def _named(name: str) -> Callable[[Facts], str]:
    return lambda facts: name


def _gemm_name(facts: Facts) -> str:
    function = limits.GEMMS.get((facts.spec.hidden_size, facts.spec.num_gate_rows))
    return "mm_M1_16" if function is None else function.name


ROUTER_GEMM = Candidate("cuda", _named("router_gemm+select"), _router_gemm, _never)
"""The product and the selection of the cuda backend."""
CUBLAS = Candidate("cuda", _named("cublas+select"), _cublas, _never)
"""cuBLAS's product, for more tokens, and the selection of the cuda backend."""
TORCH = Candidate("torch", _named("mm+ops"), _never, _torch_breaks)
"""PyTorch's matrix product, then its tensor operations."""
FLASHINFER_GEMM = Candidate("flashinfer", _gemm_name, _gemm, _product_breaks)
"""FlashInfer's router GEMM for the shape, and our selection."""
FLASHINFER_PAIR = Candidate(
    "flashinfer",
    lambda facts: f"{_gemm_name(facts)}+{limits.TOP_K.name}",
    lambda facts, num_tokens: _gemm(facts, num_tokens) or _top_k(facts, num_tokens),
    lambda facts, num_tokens: f"{_product_breaks(facts, num_tokens)}, and leaves ties and NaN undefined",
)
FLASHINFER_TOP_K = Candidate("flashinfer", _named(f"cublas+{limits.TOP_K.name}"), _top_k, _top_k_breaks)
FLASHINFER_TINYGEMM = Candidate("flashinfer", _named(limits.TINYGEMM.name), _tinygemm, _product_breaks)
"""FlashInfer's product for bfloat16 logits, and our selection."""

CANDIDATES = (ROUTER_GEMM, CUBLAS, TORCH, FLASHINFER_GEMM, FLASHINFER_PAIR, FLASHINFER_TOP_K, FLASHINFER_TINYGEMM)
"""In the order in which they are taken where nothing is known of their times."""
