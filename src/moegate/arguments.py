"""Checks of what users pass, before anything runs: each error names the argument, what it got and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moegate.plain import can_be_asked
from moegate.routing import FLOATS, INTEGERS, LOGITS, PADDINGS, Output, RouterTensors, Routing, inputs_of
from moegate.spec import MAX_GATE_ROWS, RouterSpec

_STRIDED = torch.strided


def check_tensor(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None = None,
) -> Tensor:
    """Returns `value` if it is a dense tensor of one of the dtypes, of the shape, on the device.

    A name in `shape` stands for any size. The last dimension must be contiguous; rows may be apart.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: a torch.Tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {_short(value.dtype)}; allowed: {', '.join(map(_short, dtypes))}")
    if not _fits(value.shape, shape):
        raise ValueError(f"{name}: got shape {list(value.shape)}; allowed: {_words(shape)}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: got layout {value.layout}; allowed: torch.strided")
    if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {list(value.stride())}; allowed: 1 in the last dimension")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}; allowed: {device}, where the other arguments are")
    return value


def _words(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _fits(got: Sequence[int], allowed: Sequence[int | str]) -> bool:
    if len(got) != len(allowed):
        return False
    # A loop, not all(): this runs in every call.
    for size, wanted in zip(got, allowed, strict=True):  # noqa: SIM110
        if size != wanted and not isinstance(wanted, str):
            return False
    return True


def check_gemm(hidden: object, weight: object, bias: object, out_dtype: object) -> None:
    """Checks the arguments of `router_gemm`."""
    hidden = check_tensor("hidden", hidden, FLOATS, ("M", "K"))
    if hidden.shape[1] == 0:
        raise ValueError("hidden: got shape [M, 0]; allowed: a K of at least 1")
    check_gate_linear(weight, bias, out_dtype, hidden.shape[1], hidden.device)


def check_gate_linear(
    weight: object, bias: object, out_dtype: object, hidden_size: int | str = "K", device: torch.device | None = None
) -> tuple[int, int]:
    """Checks what `GateLinear` is made of, for hidden states if their K and device are given; returns N and K."""
    weight = check_tensor("weight", weight, FLOATS, ("N", hidden_size), device)
    rows, columns = weight.shape
    if not 1 <= rows <= MAX_GATE_ROWS:
        raise ValueError(f"weight: got {rows} rows; allowed: 1 to {MAX_GATE_ROWS}")
    if columns == 0:
        raise ValueError("weight: got shape [N, 0]; allowed: a K of at least 1")
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (rows,), weight.device)
    if out_dtype not in LOGITS:
        raise ValueError(f"out_dtype: got {out_dtype}; allowed: {', '.join(map(_short, LOGITS))}")
    return rows, columns


def check_spec(spec: object) -> None:
    """Checks that a spec is one."""
    if not isinstance(spec, RouterSpec):
        raise TypeError(f"spec: got {type(spec).__name__}; allowed: a moegate.RouterSpec, as moegate.get_spec returns")


def check_weight(weight: object, spec: RouterSpec) -> Tensor:
    """Checks the weight of a gate against its spec."""
    wanted = inputs_of(spec)[0]
    return check_tensor(wanted.name, weight, wanted.dtypes, wanted.shape)


def check_gate(given: Sequence[Tensor | None], spec: RouterSpec) -> tuple[Tensor, RouterTensors]:
    """Checks the tensors that a gate has by now, its weight first; returns them."""
    weight = given[0]
    if spec.weight_dtype == "float32" and isinstance(weight, Tensor) and weight.dtype in FLOATS[1:]:
        raise TypeError(
            f"weight: got dtype {_short(weight.dtype)}; allowed: float32, to which the spec pins it. It was cast "
            "outside of the gate: by FSDP's mixed precision (give the gate a fully_shard of its own, with mp_policy="
            "MixedPrecisionPolicy(param_dtype=torch.float32)), through another module that has the same Parameter "
            "(give the gate one of its own), or by an assignment. Then assign or load the float32 values again"
        )
    weight, tensors = check_weight(weight, spec), RouterTensors(*given[1:])
    check_tensors(spec, tensors, weight.device)
    return weight, tensors


def check_hidden(hidden: object, spec: RouterSpec, device: torch.device) -> Tensor:
    """Checks the hidden states."""
    # The usual ones pass at once: this runs in every call.
    if isinstance(hidden, Tensor) and hidden.dtype in FLOATS and hidden.layout is _STRIDED:
        shape = hidden.shape
        if len(shape) == 2 and shape[1] == spec.hidden_size and hidden.device == device and hidden.is_contiguous():
            return hidden
    return check_tensor("hidden", hidden, FLOATS, ("M", spec.hidden_size), device)


def check_logits(logits: object, spec: RouterSpec) -> Tensor:
    """Checks the logits of `select`."""
    return check_tensor("logits", logits, LOGITS, ("M", spec.num_gate_rows))


def check_tensors(spec: RouterSpec, tensors: RouterTensors, device: torch.device | None, *, gemm: bool = True) -> None:
    """Checks that the small tensors are those that the spec asks for; `gemm`: those of the logits, too.

    `device`: where they must be; None: anywhere.
    """
    for wanted in inputs_of(spec)[1:]:
        if wanted.half == "gemm" and not gemm:
            continue
        name, value = wanted.name, getattr(tensors, wanted.name)
        setting = f"the spec's {wanted.field} = {getattr(spec, wanted.field)!r}"
        if wanted.is_needed and value is None:
            raise ValueError(f"{name}: got None; allowed: a tensor {_words(wanted.shape)}, for {setting}")
        if not wanted.is_needed and value is not None:
            raise ValueError(f"{name}: got a tensor; allowed: None, for {setting}")
        if value is not None:
            check_tensor(name, value, wanted.dtypes, wanted.shape, device)


def check_rows(
    input_ids: object,
    padding: object,
    spec: RouterSpec,
    tensors: RouterTensors,
    num_tokens: int,
    device: torch.device,
) -> Tensor | None:
    """Checks what a call says of its rows; returns the token ids of those that are no padding, for hash routing.

    Token ids are given just for hash routing, one a row, within the table where a CPU can tell.
    """
    if isinstance(padding, Tensor) and padding.dtype == torch.int32:
        check_tensor("padding", padding, PADDINGS, () if padding.dim() == 0 else (1,), device)
    elif padding is not None:
        check_tensor("padding", padding, PADDINGS, (num_tokens,), device)
    if not spec.hash_routing:
        if input_ids is not None:
            raise ValueError("input_ids: got a tensor; allowed: None, for the spec's hash_routing = False")
        return None
    if input_ids is None:
        raise ValueError(f"input_ids: got None; allowed: a tensor [{num_tokens}], for the spec's hash_routing = True")
    ids = check_tensor("input_ids", input_ids, INTEGERS, (num_tokens,), device)
    assert tensors.tid2eid is not None
    if len(tensors.tid2eid) == 0:
        raise ValueError("tid2eid: got no rows; allowed: one for each token id")
    if isinstance(padding, Tensor) and can_be_asked(ids) and can_be_asked(padding):
        ids = ids[~padding] if padding.dtype == torch.bool else ids[: max(0, int(padding))]
    if ids.numel() and can_be_asked(ids):
        low, high, size = int(ids.min()), int(ids.max()), len(tensors.tid2eid)
        if low < 0 or high >= size:
            got = low if low < 0 else high
            raise ValueError(f"input_ids: got {got}; allowed: 0 to {size - 1}, the rows of tid2eid")
    return ids


def check_out(
    out: object, outputs: tuple[Output, ...], spec: RouterSpec, num_tokens: int, device: torch.device
) -> None:
    """Checks the routing that a gate is to fill: contiguous tensors, as in `outputs_of(spec)`; logits may be None."""
    if not isinstance(out, Routing):
        raise TypeError(f"out: got {type(out).__name__}; allowed: None, or a moegate.Routing")
    for wanted, value in zip(outputs, out):  # noqa: B905 # both have all of Routing's fields
        # The usual ones pass at once: this runs in every call that brings tensors to be filled.
        if value is None:
            if not wanted.is_there or wanted.name == "logits":
                continue
        elif type(value) is Tensor and value.dtype is wanted.dtype and value.layout is _STRIDED:
            columns = wanted.columns
            shape = (num_tokens,) if columns is None else (num_tokens, columns)
            if value.shape == shape and value.device == device and value.is_contiguous() and wanted.is_there:
                continue
        _refuse_output(wanted, value, spec, num_tokens, device)


def _refuse_output(wanted: Output, value: object, spec: RouterSpec, num_tokens: int, device: torch.device) -> None:
    """Raises what is wrong with a tensor to be filled; a subclass of Tensor may be right."""
    name = f"out.{wanted.name}"
    if not wanted.is_there:
        setting = f"the spec's {wanted.field} = {getattr(spec, str(wanted.field))!r}"
        raise ValueError(f"{name}: got a tensor; allowed: None, for {setting}")
    tensor = check_tensor(name, value, (wanted.dtype,), wanted.shape(num_tokens), device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {list(tensor.stride())}; allowed: a contiguous tensor")


def check_table(tid2eid: Tensor, spec: RouterSpec) -> None:
    """Checks the experts in (rows of) a hash table: in range, and no expert twice in a row."""
    if tid2eid.numel() == 0:
        return
    low, high = int(tid2eid.min()), int(tid2eid.max())
    if low < 0 or high >= spec.num_experts:
        raise ValueError(f"tid2eid: got expert {low if low < 0 else high}; allowed: 0 to {spec.num_experts - 1}")
    ordered = tid2eid.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1)
    if bool(twice.any()):
        row = int(twice.nonzero()[0])
        raise ValueError(f"tid2eid: got {tid2eid[row].tolist()} in a row; allowed: distinct experts")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
