"""Launches select.cuh: logits, or the products that they are made of, to experts and weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moegate.backends.cuda import jit
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.sources import SelectDtypes, select_source
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec

_FIELDS = "PPPPPPPPPPPPPqqqiii0q"  # SelectArguments of select.cuh, with the padding at its end
# A token is a warp. Few are in blocks of two, up to so many in blocks of one; more are cheaper to start in larger ones.
_MOST_SPREAD = 1024


class SelectKernels:
    """The kernels for one spec and set of dtypes, loaded for a device; `select_kernels` makes them."""

    def __init__(
        self,
        spec: RouterSpec,
        dtypes: SelectDtypes,
        device: torch.device,
        *,
        aligned: bool,
        frozen: bool,
        pdl: bool,
        weight_parts: int = 0,
        arch: str | None = None,
    ) -> None:
        self._spec = spec
        self._weights_dtype = getattr(torch, spec.topk_weights_dtype)
        text = select_source(spec, dtypes, aligned=aligned, frozen=frozen, weight_parts=weight_parts)
        module = jit.load(text, device, arch)
        words = shared_words(spec)

        def in_blocks_of(warps: int, name: str, *, least_shared: bool = False) -> tuple[int, jit.Kernel]:
            size = 4 * words * warps
            kernel = module.kernel(name, _FIELDS, 32 * warps, shared_bytes=size, least_shared=least_shared, pdl=pdl)
            return warps, kernel

        # A multiprocessor that is to have another share of its cache as shared memory must be empty first. The few want
        # no more of it than a block has, as most kernels in front do, so that they start beside these. With so little,
        # a multiprocessor has room for one block: few are what fills one on each.
        self._few = in_blocks_of(2, "select_few", least_shared=True)
        self._most_few = self._few[0] * torch.cuda.get_device_properties(device).multi_processor_count
        self._some = in_blocks_of(1, "select_some" if weight_parts else "select_many")
        self._many = in_blocks_of(8, "select_many")

    def outputs(self, logits: Tensor, num_tokens: int, out: Routing | None = None) -> Routing:
        """The tensors for the routing of these logits, to be filled: those of `out`, if that is given.

        New ones are on the current device.
        """
        if out is not None:
            return out if out.logits is logits else out._replace(logits=logits)
        spec = self._spec
        dtype, shared = self._weights_dtype, spec.num_shared_gates
        return Routing(
            empty((num_tokens, spec.top_k), torch.int32),
            empty((num_tokens, spec.top_k), dtype),
            logits,
            empty((num_tokens, shared), dtype) if shared else None,
            empty((num_tokens,), dtype) if spec.num_zero_experts else None,
        )

    def launch(
        self,
        routing: Routing,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        num_tokens: int,
        stream: int,
        *,
        products: Tensor | None = None,
        norm_factors: Tensor | None = None,
        holds_dependents: bool = False,
    ) -> None:
        """Fills the routing from its logits [M, R], whose rows may be apart, on the stream; M is at least 1.

        `products`: [S, M, C], of which kernels for a weight in so many parts make the logits, too, with `norm_factors`
        [M] if the spec has an input norm: see `product.Products`.
        `holds_dependents`: what is launched after it starts only when the kernel before it has ended.
        """
        logits, table = routing.logits, tensors.tid2eid
        assert logits is not None
        source = logits if products is None else products
        if num_tokens <= self._most_few:
            warps, kernel = self._few
        else:
            warps, kernel = self._some if num_tokens <= _MOST_SPREAD else self._many
        kernel.launch(
            (-(-num_tokens // warps), 1),
            stream,
            source.data_ptr(),
            _address(tensors.e_score_correction_bias),
            _address(tensors.per_expert_scale),
            _address(tensors.global_scale),
            _address(table),
            _address(input_ids),
            _address(tensors.bias),
            _address(norm_factors),
            logits.data_ptr(),
            routing.topk_ids.data_ptr(),
            routing.topk_weights.data_ptr(),
            _address(routing.shared_weights),
            _address(routing.identity_weight),
            source.stride()[-2],
            0 if table is None else table.stride(0),
            0 if table is None else table.shape[0],
            num_tokens,
            0 if products is None else products.shape[0],
            holds_dependents,
        )


select_kernels = cache(SelectKernels)


def shared_words(spec: RouterSpec) -> int:
    """A warp's shared memory: Select::kWords of select.cuh, or more."""
    words = spec.top_k + (2 if spec.n_group > 1 else 1) * spec.num_selectable + spec.n_group + 6
    return words + 2 * spec.top_k if spec.select_per_group else words


def select_dtypes(logits: torch.dtype, tensors: RouterTensors, input_ids: torch.dtype | None) -> SelectDtypes:
    """The dtypes that a kernel for these tensors is compiled for."""
    scale, factor, table = tensors.per_expert_scale, tensors.global_scale, tensors.tid2eid
    return SelectDtypes(
        logits,
        None if scale is None else scale.dtype,
        None if factor is None else factor.dtype,
        None if table is None else table.dtype,
        input_ids,
    )


def can_read_four(logits: Tensor, bias: Tensor | None) -> bool:
    """True if four logits of any row of [M, R], and four biases, can be read at once, as far as their place decides."""
    rows_apart = logits.stride(0) if logits.shape[0] > 1 else 0
    places = (logits.data_ptr() | rows_apart * logits.element_size()) % (4 * logits.element_size())
    return places == 0 and (bias is None or bias.data_ptr() % 16 == 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
