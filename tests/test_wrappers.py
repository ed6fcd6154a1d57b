"""Wrapper tensors, and calls under modes, transforms and tracers: routing never branches on values."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from noticing_gates import a_gate
from on_device import there
from routers import SPECS, generator, route_arguments, tensors_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import moegate
from moegate import Gate, RouterSpec, Routing

NAMES = pytest.mark.parametrize("name", SPECS)
FROZEN = pytest.mark.parametrize("frozen", [False, True])


def hidden_of(rows: int, *, special: bool = False) -> Tensor:
    hidden = torch.randn(rows, 64, generator=generator(rows)).bfloat16()
    if special:
        hidden[1, 3], hidden[2, 5] = torch.nan, torch.inf
    return there(hidden)


def ids_of(spec: RouterSpec, rows: int) -> dict[str, Tensor]:
    return (
        {"input_ids": there(ids)}
        if (ids := route_arguments(spec, tensors_of(spec), rows).get("input_ids")) is not None
        else {}
    )


def assert_same(got: Any, expected: Routing, spec: RouterSpec, *, is_exact: bool = True) -> None:
    """Asserts equal ids, and weights equal to the bit or within the ulps of another order of operations (4.5)."""
    for mine, theirs in zip(got, (part for part in expected if part is not None), strict=True):
        mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
        if mine.dtype == torch.int32:
            assert mine.equal(theirs)
        else:
            torch.testing.assert_close(
                mine, theirs, rtol=1e-5 if spec.topk_weights_dtype == "float32" else 1e-2, atol=1e-6, equal_nan=True
            )


def parts(routing: Routing) -> tuple[Tensor, ...]:
    """A gate as a function of tensors that returns tensors, for transforms and tracers."""
    return tuple(part for part in routing if part is not None)


@NAMES
@FROZEN
def test_vmap(name: str, frozen: bool) -> None:
    spec, gate = SPECS[name], a_gate(SPECS[name], frozen=frozen)
    hidden, ids = hidden_of(12), ids_of(spec, 12)
    expected = gate(hidden, **ids)
    batched = {key: part.view(3, 4) for key, part in ids.items()}
    got = torch.func.vmap(lambda hidden, ids: parts(gate(hidden, **ids)))(hidden.view(3, 4, 64), batched)
    assert_same([part.flatten(0, 1) for part in got], expected, spec)


def test_vmap_over_weights_and_biases() -> None:
    """Over stacked gates: no tensor of the module is batched by itself."""
    spec, gates = SPECS["sigmoid with bias in groups"], [a_gate(), a_gate()]
    gates[1].weight.data = -gates[1].weight.data
    stacked, buffers = torch.func.stack_module_state(gates)
    hidden = hidden_of(4)
    got = torch.func.vmap(lambda *state: parts(torch.func.functional_call(gates[0], state, (hidden,))))(
        stacked, buffers
    )
    for index, gate in enumerate(gates):
        assert_same([part[index] for part in got], gate(hidden), spec)
    assert gates[0](hidden).topk_ids.equal(got[0][0])


@NAMES
def test_the_functions_take_wrappers(name: str) -> None:
    spec = SPECS[name]
    hidden, weight = hidden_of(6), there(torch.randn(spec.num_gate_rows, 64, generator=generator(1)))
    given: dict[str, Any] = {key: there(part) for key, part in route_arguments(spec, tensors_of(spec), 6).items()}
    expected = moegate.route(hidden, weight, spec, **given, return_logits=True)
    got = torch.func.vmap(lambda one: parts(moegate.route(one, weight, spec, **given)))(hidden.expand(2, 6, 64))
    assert_same([part[1] for part in got], expected.without_logits(), spec)
    assert expected.logits is not None
    for key in ("bias", "input_scale"):
        given.pop(key, None)
    got = torch.func.vmap(lambda one: parts(moegate.select(one, spec, **given)))(expected.logits.expand(2, -1, -1))
    assert_same([part[1] for part in got], expected.without_logits(), spec)
    logits = torch.func.vmap(lambda one: moegate.router_gemm(one, weight))(hidden.expand(2, 6, 64))
    torch.testing.assert_close(logits[0], moegate.router_gemm(hidden, weight), rtol=1e-4, atol=1e-4)


@NAMES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_traces_hold_for_other_values(name: str) -> None:
    """Traces of jit and of make_fx with ordinary values are right for NaN, infinities, other rows and other ties."""
    spec, gate = SPECS[name], a_gate(SPECS[name], frozen=True)
    example, ids = hidden_of(5), ids_of(spec, 5)
    call = (lambda hidden, ids: parts(gate(hidden, input_ids=ids))) if ids else (lambda hidden: parts(gate(hidden)))
    arguments = (example, *ids.values())
    traced: list[Callable[..., Any]] = [torch.jit.trace(call, arguments)]
    traced += [make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*arguments) for mode in ("real", "fake")]
    for other in (hidden_of(5, special=True), torch.zeros_like(example)):
        expected = gate(other, **ids)
        for run in traced:
            assert_same(run(other, *ids.values()), expected, spec)


@NAMES
@FROZEN
def test_fake_tensors(name: str, frozen: bool) -> None:
    """A fake gate, and a gate called with fakes: outputs have the forms of a real call's outputs."""
    spec, real = SPECS[name], a_gate(SPECS[name], frozen=frozen)
    expected = real(hidden_of(20), **ids_of(spec, 20), return_logits=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        gate = a_gate(spec, frozen=frozen)
        hidden = mode.from_tensor(hidden_of(20))
        ids = {key: mode.from_tensor(part) for key, part in ids_of(spec, 20).items()}
        for one in (gate, real):
            for got, wanted in zip(one(hidden, **ids, return_logits=True), expected, strict=True):
                assert (got is None) == (wanted is None)
                assert got is None or (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device)
        gate.refresh()
    real(hidden_of(20), **ids_of(spec, 20))  # still works: fakes were not noted


def test_a_mode_that_counts_operations_sees_them() -> None:
    gate = a_gate(frozen=True)
    expected = gate(hidden_of(4))
    with FlopCounterMode(display=False) as counter:
        got = gate(hidden_of(4))
    assert counter.get_total_flops() == 2 * 4 * 64 * 256
    assert got.topk_ids.equal(expected.topk_ids)


def test_transforms_that_differentiate() -> None:
    gate = a_gate()
    with pytest.warns(RuntimeWarning, match="no gradient flows through a routing"):
        gradient = torch.func.grad(lambda hidden: gate(hidden).topk_weights.sum())(hidden_of(4).float())
    assert not gradient.any()


@pytest.mark.parametrize("strict", [False, True])
@NAMES
def test_an_export_is_saved_and_loaded(name: str, strict: bool, tmp_path: Path) -> None:
    spec, gate = SPECS[name], a_gate(SPECS[name])
    tokens = torch.export.Dim("tokens", min=2)
    ids = ids_of(spec, 5)
    shapes = {"hidden": {0: tokens}, **{key: {0: tokens} for key in ids}}
    exported = torch.export.export(gate, (hidden_of(5),), ids, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    ids = ids_of(spec, 17)
    got, expected = loaded(hidden_of(17), **ids), gate(hidden_of(17), **ids)
    assert type(got) is Routing
    assert_same(parts(got), expected, spec)


@pytest.mark.cpu
def test_an_export_is_loaded_by_another_process(tmp_path: Path) -> None:
    file, hidden = tmp_path / "gate.pt2", hidden_of(5)
    gate = a_gate(SPECS["softmax"])
    torch.export.save(torch.export.export(gate, (hidden,)), file)
    torch.save(hidden, tmp_path / "hidden.pt")
    program = (
        "import sys, torch, moegate.ops\n"
        "hidden = torch.load(sys.argv[2])\n"
        "print(torch.export.load(sys.argv[1]).module()(hidden).topk_ids.tolist())\n"
    )
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "hidden.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(gate(hidden).topk_ids.tolist())


# DTensors and FSDP2, with one process.
@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def on_mesh(gate: Gate, mesh: DeviceMesh) -> Gate:
    """The gate with all tensors replicated as DTensors, as in tensor parallelism."""
    for name, tensor in list(gate.named_parameters()):
        whole = distribute_tensor(tensor.detach(), mesh, [Replicate()])
        gate.register_parameter(name, nn.Parameter(whole, requires_grad=False))
    for name, buffer in list(gate.named_buffers()):
        gate.register_buffer(name, distribute_tensor(buffer, mesh, [Replicate()]))
    return gate


@pytest.mark.cpu
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
@NAMES
def test_dtensors(name: str, placement: Replicate | Shard, mesh: DeviceMesh) -> None:
    spec = SPECS[name]
    hidden, ids = hidden_of(20, special=True), ids_of(spec, 20)
    expected = a_gate(spec)(hidden, **ids)
    gate = on_mesh(a_gate(spec, frozen=True), mesh)
    wrapped = {key: distribute_tensor(part, mesh, [placement]) for key, part in ids.items()}
    got = gate(distribute_tensor(hidden, mesh, [placement]), **wrapped)
    assert all(isinstance(part, DTensor) for part in parts(got))
    assert_same(parts(got), expected, spec)
    gate.refresh()
    gate.e_score_correction_bias = distribute_tensor(torch.zeros(3), mesh, [Replicate()])
    with pytest.raises(ValueError, match="e_score_correction_bias: got"):
        gate(distribute_tensor(hidden, mesh, [placement]), **wrapped)


@pytest.mark.cpu
def test_fsdp_that_casts_a_pinned_weight(mesh: DeviceMesh) -> None:
    """The error names a remedy, and the remedy works."""
    spec = SPECS["softmax with bias and floor"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    hidden = hidden_of(6)
    expected = a_gate(spec)(hidden)
    for frozen in (False, True):
        model = nn.Sequential(a_gate(spec, frozen=frozen))
        fully_shard(model, mesh=mesh, mp_policy=policy)
        with pytest.raises(TypeError, match=r"weight: got dtype bfloat16.*param_dtype=torch\.float32"):
            model(hidden)
        model = nn.Sequential(a_gate(spec, frozen=frozen))
        own = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(model[0], mesh=mesh, mp_policy=own)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for _ in range(2):
            assert_same(parts(model(hidden)), expected, spec)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:moegate. no gradient flows:RuntimeWarning")
def test_fsdp_that_casts_what_is_free(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight cast to bfloat16 for each call routes like a bfloat16 gate, with one refresh at most."""
    spec = SPECS["sigmoid with bias"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    gate = a_gate(spec).float()
    expected = moegate.route(
        hidden_of(6), gate.weight.bfloat16(), spec, e_score_correction_bias=gate.e_score_correction_bias
    )
    model = nn.Sequential(gate)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model(hidden_of(6))
    monkeypatch.setattr(Gate, "_take_note", lambda *_, **__: pytest.fail("a refresh"))
    for _ in range(3):
        assert_same(parts(model(hidden_of(6))), expected, spec)
