"""A gate notices tensors that changed behind its back, or says why they do not fit."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from on_device import back, gate_there, there
from routers import SPECS, generator, tensors_of, token_ids
from torch import Tensor, nn

import moegate
from moegate import Gate, RouterSpec, noticing
from moegate.backends.torch import TorchBackend

SPEC = SPECS["sigmoid with bias in groups"]
PINNED = SPECS["softmax with bias and floor"]
HASH = SPECS["hash"]
FROZEN = pytest.mark.parametrize("frozen", [False, True])


def weight_of(spec: RouterSpec, seed: int = 1) -> Tensor:
    dtype = torch.float32 if spec.weight_dtype == "float32" else torch.bfloat16
    return torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(seed)).to(dtype)


def a_gate(spec: RouterSpec = SPEC, *, frozen: bool = False) -> Gate:
    given = {name: part for name, part in tensors_of(spec)._asdict().items() if part is not None}
    return gate_there(spec, weight_of(spec), **given, frozen=frozen)


HIDDEN = there(torch.randn(5, 64, generator=generator(2)).bfloat16())
IDS = there(token_ids(5))


def routed_as(gate: Gate, **given: Tensor) -> bool:
    """True if the gate routes as a new one with the tensors that it has by now."""
    names = ("bias", "e_score_correction_bias", "input_scale", "per_expert_scale", "global_scale", "tid2eid")
    now = {name: part for name in names if (part := getattr(gate, name)) is not None}
    expected = Gate(gate.spec, gate.weight.detach().clone(), **now, frozen=gate.frozen)(HIDDEN, **given)
    got = gate(HIDDEN, **given)
    return all(mine.equal(theirs) for mine, theirs in zip(got[:2], expected[:2], strict=True))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were prepared since."""
    weights: list[Tensor] = []
    prepare = TorchBackend.prepare

    def recorded(self: TorchBackend, weight: Tensor, *given: object, **named: object) -> object:
        weights.append(weight)
        return prepare(self, weight, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchBackend, "prepare", recorded)
    return weights


# What puts another weight [256, 64] into a gate without a word.
def _write(gate: Gate, weight: Tensor) -> None:
    with torch.no_grad():
        gate.weight.copy_(weight)


def _assign(gate: Gate, weight: Tensor) -> None:
    gate.weight = nn.Parameter(weight)


def _put_at_the_same_address(gate: Gate, weight: Tensor) -> None:
    """What an allocator does with memory that it got back."""
    place = gate.weight.data
    del gate.weight
    place.copy_(weight)
    gate.weight = nn.Parameter(place)


def _set_data(gate: Gate, weight: Tensor) -> None:
    gate.weight.data = weight


def _set_storage(gate: Gate, weight: Tensor) -> None:
    with torch.no_grad():
        gate.weight.set_(weight)  # type: ignore[call-overload] # the stub lacks a tensor


def _swap(gate: Gate, weight: Tensor) -> None:
    torch.utils.swap_tensors(gate.weight, nn.Parameter(weight))


def _load(gate: Gate, weight: Tensor) -> None:
    gate.load_state_dict({"weight": weight}, strict=False, assign=True)


def _step(gate: Gate, weight: Tensor) -> None:
    gate.weight.requires_grad_()
    gate.weight.grad = gate.weight.detach() - weight
    torch.optim.SGD([gate.weight], lr=1.0).step()
    gate.weight.requires_grad_(False)


def _into_dict(gate: Gate, weight: Tensor) -> None:
    gate._parameters["weight"] = weight  # type: ignore[assignment] # as FSDP does


CHANGES: list[Callable[[Gate, Tensor], None]] = [
    _write,
    _assign,
    _put_at_the_same_address,
    _set_data,
    _set_storage,
    _swap,
    _load,
    _step,
    _into_dict,
]


@pytest.mark.parametrize("change", CHANGES)
@FROZEN
def test_another_weight_takes_effect(frozen: bool, change: Callable[[Gate, Tensor], None]) -> None:
    gate = a_gate(frozen=frozen)
    before = gate(HIDDEN).topk_ids
    change(gate, there(weight_of(SPEC, 7)))
    assert routed_as(gate)
    assert not gate(HIDDEN).topk_ids.equal(before)


@pytest.mark.parametrize("change", CHANGES)
def test_another_weight_that_is_alike_costs_no_refresh(
    change: Callable[[Gate, Tensor], None], prepared: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 and functional_call swap tensors in every step."""
    gate = a_gate()
    gate(HIDDEN)
    monkeypatch.setattr(Gate, "_take_note", lambda *_, **__: pytest.fail("a refresh"))
    if change is not _load:  # which refreshes by a hook
        change(gate, there(weight_of(SPEC, 7)))
        gate(HIDDEN)
        weight, bias = (there(tensor) for tensor in (weight_of(SPEC, 8), torch.randn(256)))
        swapped = {"weight": weight, "e_score_correction_bias": bias}
        got = torch.func.functional_call(gate, swapped, (HIDDEN,))
        assert got.topk_ids.equal(moegate.route(HIDDEN, weight, SPEC, e_score_correction_bias=bias).topk_ids)


def test_a_frozen_gate_prepares_again_only_for_a_change(prepared: list[Tensor]) -> None:
    gate = a_gate(frozen=True)
    for _ in range(3):
        gate(HIDDEN)
    assert len(prepared) == 1
    _write(gate, gate.weight * 2)
    for _ in range(3):
        gate(HIDDEN)
    assert len(prepared) == 2


def test_what_counts_no_version_needs_refresh() -> None:
    """The two writes that no call can see, as the documents say."""
    for inference in (False, True):
        with torch.inference_mode(inference):
            gate = a_gate(frozen=True)
            before = gate(HIDDEN).topk_ids
            (gate.weight if inference else gate.weight.data).neg_()
            gate.refresh()
            assert routed_as(gate)
            assert not gate(HIDDEN).topk_ids.equal(before)


def test_many_refreshes_of_a_frozen_gate_are_told() -> None:
    gate = a_gate(frozen=True)
    for call in range(1, 20):
        _write(gate, gate.weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gate(HIDDEN)
        told = ["16 calls found the tensors of a frozen gate changed" in str(each.message) for each in caught]
        assert told == ([True] if call == 16 else [])


# What does not fit: the errors of the constructor.
def _prune(gate: Gate) -> None:
    gate.weight.data = gate.weight.data[:200]  # at the same address


def _keep(gate: Gate) -> None:
    gate.weight.data = gate.weight.data[torch.arange(0, 256, 2)]


def _transpose(gate: Gate) -> None:
    gate.weight.data = gate.weight.data.T.contiguous().T


def _widen(gate: Gate) -> None:
    gate.weight.data = gate.weight.data.double()


def _as_integers(gate: Gate) -> None:
    gate._parameters["weight"] = gate.weight.data.view(torch.int16)  # type: ignore[assignment]


def _bias_as_integers_in_place(gate: Gate) -> None:
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.data.view(torch.int32)


def _weight_on_meta(gate: Gate) -> None:
    gate.weight = nn.Parameter(gate.weight.to("meta"))


def _no_bias(gate: Gate) -> None:
    gate.e_score_correction_bias = None


def _short_bias(gate: Gate) -> None:
    gate.e_score_correction_bias = gate.e_score_correction_bias[:1]  # type: ignore[index]


def _bias_cut_in_place(gate: Gate) -> None:
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.data[:255]


def _bias_spread_in_place(gate: Gate) -> None:
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.data[:1].expand(256)


def _bias_on_meta(gate: Gate) -> None:
    gate.e_score_correction_bias = torch.zeros(256, device="meta")


def _linear_bias(gate: Gate) -> None:
    gate.bias = nn.Parameter(there(torch.zeros(256)))


def _no_weight(gate: Gate) -> None:
    gate.weight = None  # type: ignore[assignment]


def _deleted_weight(gate: Gate) -> None:
    del gate.weight


def _number(gate: Gate) -> None:
    del gate.weight
    gate.weight = 3.0  # type: ignore[assignment]


MISFITS: list[tuple[Callable[[Gate], None], type[Exception], str]] = [
    (_prune, ValueError, r"weight: got shape \[200, 64\]; allowed: \[256, 64\]"),
    (_keep, ValueError, r"weight: got shape \[128, 64\]"),
    (_transpose, ValueError, r"weight: got strides \[1, 256\]"),
    (_widen, TypeError, "weight: got dtype float64"),
    (_as_integers, TypeError, "weight: got dtype int16"),
    (_bias_as_integers_in_place, TypeError, "e_score_correction_bias: got dtype int32"),
    (_weight_on_meta, ValueError, "e_score_correction_bias: got device"),
    (_no_bias, ValueError, "e_score_correction_bias: got None"),
    (_short_bias, ValueError, r"e_score_correction_bias: got shape \[1\]"),
    (_bias_cut_in_place, ValueError, r"e_score_correction_bias: got shape \[255\]"),
    (_bias_spread_in_place, ValueError, r"e_score_correction_bias: got strides \[0\]"),
    (_bias_on_meta, ValueError, "e_score_correction_bias: got device meta"),
    (_linear_bias, ValueError, "bias: got a tensor; allowed: None"),
    (_no_weight, TypeError, "weight: got NoneType"),
    (_deleted_weight, TypeError, "weight: got NoneType"),
    (_number, TypeError, "weight: got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISFITS)
@FROZEN
def test_what_does_not_fit_is_an_error(
    frozen: bool,
    change: Callable[[Gate], None],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each call, before anything runs; a copy of the gate says the same, and fitting tensors end it."""
    gate = a_gate(frozen=frozen)
    gate(HIDDEN)
    change(gate)
    twin = copy.deepcopy(gate)
    monkeypatch.setattr(TorchBackend, "route", lambda *_: pytest.fail("it ran"))
    for one in (gate, gate, twin):
        with pytest.raises(error, match=message):
            one(HIDDEN)
    with pytest.raises(error, match=message):
        gate.refresh()
    monkeypatch.undo()
    whole = a_gate()
    for name in ("weight", "bias", "e_score_correction_bias"):
        if hasattr(gate, name):
            delattr(gate, name)
        kind = gate.register_parameter if name != "e_score_correction_bias" else gate.register_buffer
        kind(name, getattr(whole, name))
    assert routed_as(gate)


@FROZEN
def test_a_bias_in_half_precision_that_was_assigned_is_widened(frozen: bool) -> None:
    for make in (lambda bias: bias, nn.Parameter):
        gate = a_gate(frozen=frozen)
        bias = there(torch.randn(256, generator=generator(3)).bfloat16())
        gate.e_score_correction_bias = make(bias)
        got = gate(HIDDEN)
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert got.topk_ids.equal(
            moegate.route(HIDDEN, gate.weight, SPEC, e_score_correction_bias=bias.float()).topk_ids
        )


@FROZEN
def test_a_pruned_gate_with_the_spec_of_its_rest(frozen: bool) -> None:
    """After spec, weight and bias were replaced one by one, as a pruner does."""
    gate = a_gate(frozen=frozen)
    gate.weight.data = gate.weight.data[:128]
    gate.e_score_correction_bias = gate.e_score_correction_bias[:128]  # type: ignore[index]
    gate.spec = replace(SPEC, num_experts=128)
    assert routed_as(gate)
    assert int(gate(HIDDEN).topk_ids.max()) < 128
    gate.spec = replace(SPEC, num_experts=128, routed_scaling_factor=1.0)
    assert routed_as(gate)


@FROZEN
def test_torch_prunes_and_parametrizes(frozen: bool) -> None:
    """torch.nn.utils takes the Parameter away and puts a computed tensor in its place."""
    from torch.nn.utils import parametrize, prune

    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    gate = a_gate(frozen=frozen)
    parametrize.register_parametrization(gate, "weight", Negated())
    assert routed_as(gate)
    gate = a_gate(frozen=frozen)
    before = gate(HIDDEN).topk_ids
    prune.random_unstructured(gate, "weight", amount=0.5)
    assert routed_as(gate)
    assert not gate(HIDDEN).topk_ids.equal(before)
    prune.remove(gate, "weight")
    assert routed_as(gate)


@FROZEN
def test_explain_tells_of_the_tensors_that_are_there(frozen: bool) -> None:
    gate = a_gate(frozen=frozen)
    gate.weight.data = gate.weight.data.float()
    gate.explain(1)
    assert gate._notice()[0].plan.facts.weight == torch.float32
    gate.e_score_correction_bias = None
    with pytest.raises(ValueError, match="e_score_correction_bias: got None"):
        gate.explain(1)
    assert "num_experts=256" in repr(gate)  # which says what it can


# On meta, to be loaded.
@FROZEN
@pytest.mark.parametrize("name", ["sigmoid with bias in groups", "hash", "input norm and expert scale"])
def test_meta_then_to_empty_then_loaded(name: str, frozen: bool) -> None:
    spec = SPECS[name]
    whole = a_gate(spec)
    ids = {"input_ids": IDS} if spec.hash_routing else {}
    on_meta = {key: part.to("meta") for key, part in tensors_of(spec)._asdict().items() if part is not None}
    gate = Gate(spec, weight_of(spec).to("meta"), **on_meta, frozen=frozen)
    assert gate(HIDDEN.to("meta"), **{key: part.to("meta") for key, part in ids.items()}).topk_ids.is_meta
    gate.to_empty(device=HIDDEN.device)
    gate.load_state_dict(whole.state_dict())
    assert routed_as(gate, **ids)


@FROZEN
def test_meta_then_assigned_one_by_one(frozen: bool) -> None:
    """As Transformers and accelerate load: no method of the module is called."""
    whole = a_gate(PINNED)
    gate = Gate(
        PINNED, weight_of(PINNED).to("meta"), e_score_correction_bias=torch.empty(64, device="meta"), frozen=frozen
    )
    gate._parameters["weight"] = nn.Parameter(whole.weight.detach())
    gate._buffers["e_score_correction_bias"] = whole.e_score_correction_bias
    assert routed_as(gate)
    assert (gate._notice()[0].prepared is not None) == frozen or HIDDEN.is_cuda


def test_a_backend_is_not_asked_for_on_meta() -> None:
    """backend="cuda" runs where the tensors will be."""
    gate = Gate(
        SPEC, weight_of(SPEC).to("meta"), e_score_correction_bias=torch.empty(256, device="meta"), backend="cuda"
    )
    assert "backend='torch'" in repr(gate)
    with pytest.raises(ValueError, match="backend: got 'cuda_'"):
        Gate(SPEC, weight_of(SPEC).to("meta"), e_score_correction_bias=torch.empty(256, device="meta"), backend="cuda_")


def test_a_parameter_that_goes_to_meta_when_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under accelerate's init_empty_weights, which leaves buffers where they are."""
    register = Gate.register_parameter

    def on_meta(self: Gate, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    monkeypatch.setattr(Gate, "register_parameter", on_meta)
    gate = a_gate(frozen=True)
    monkeypatch.undo()
    assert gate.weight.is_meta
    gate.weight = nn.Parameter(there(weight_of(SPEC)))
    assert routed_as(gate)


def test_hooks_that_move_a_weight_for_each_call() -> None:
    """As accelerate offloads: the weight is on meta between calls, of a frozen gate too."""
    for frozen in (False, True):
        gate, weight = a_gate(frozen=frozen), there(weight_of(SPEC, 9))
        expected = Gate(SPEC, weight, e_score_correction_bias=gate.e_score_correction_bias)(HIDDEN).topk_ids

        def onload(module: nn.Module, _: object, weight: Tensor = weight) -> None:
            module._parameters["weight"] = nn.Parameter(weight.clone())

        def offload(module: nn.Module, *_: object) -> None:
            module._parameters["weight"] = nn.Parameter(weight_of(SPEC).to("meta"))

        gate.register_forward_pre_hook(onload)
        gate.register_forward_hook(offload)
        for _ in range(3):
            assert gate(HIDDEN).topk_ids.equal(expected)


# A hash table is checked when it is there.
def test_a_placeholder_table_is_checked_at_the_first_call() -> None:
    table = tensors_of(HASH).tid2eid
    assert table is not None
    for placeholder in (torch.zeros_like(table), torch.full_like(table, -1), torch.full_like(table, 2**30)):
        for frozen in (False, True):
            gate = gate_there(HASH, weight_of(HASH), tid2eid=placeholder.clone(), frozen=frozen)
            for _ in range(2):
                with pytest.raises(ValueError, match=r"tid2eid: got"):
                    gate(HIDDEN, input_ids=IDS)
            with pytest.raises(ValueError, match=r"tid2eid: got"):
                gate.refresh()
            copy.deepcopy(gate)
            gate.load_state_dict({"tid2eid": there(table)}, strict=False)
            assert routed_as(gate, input_ids=IDS)


@FROZEN
def test_a_table_that_was_written_is_checked_again(frozen: bool) -> None:
    gate = a_gate(HASH, frozen=frozen)
    assert gate.tid2eid is not None
    gate.tid2eid[3, 0] = 96
    with pytest.raises(ValueError, match="tid2eid: got expert 96; allowed: 0 to 95"):
        gate(HIDDEN, input_ids=IDS)
    gate.tid2eid[3] = torch.arange(6)
    assert routed_as(gate, input_ids=IDS)
    gate.tid2eid = gate.tid2eid[:40]  # another vocabulary
    with pytest.raises(ValueError, match="tid2eid: got"):
        torch.func.functional_call(gate, {"tid2eid": gate.tid2eid * 0}, (HIDDEN,), {"input_ids": IDS})


# A weight that the spec pins to float32.
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_of_a_model_that_shares_the_weight(gate_first: bool, dtype: torch.dtype) -> None:
    """All of the model is cast, in whatever order, and the gate names the way out at its next call."""
    gate, linear = a_gate(PINNED, frozen=True), nn.Linear(64, 64, bias=False, device=HIDDEN.device)
    linear.weight = gate.weight
    model = nn.ModuleList([gate, linear] if gate_first else [linear, gate])
    model.append(nn.Linear(2, 2))
    float32 = gate.weight.detach().clone()
    model.to(dtype)
    assert model[2].weight.dtype == dtype
    assert linear.weight.dtype == dtype
    message = r"pins it.*another module.*one of its own" if dtype == torch.bfloat16 else "allowed: float32"
    with pytest.raises(TypeError, match=message):
        gate(HIDDEN)
    gate.weight = nn.Parameter(float32)  # the way out
    assert routed_as(gate)
    model.to(torch.bfloat16)
    assert gate.weight.equal(float32)


def test_a_cast_of_a_model_with_a_gate_that_takes_no_float64() -> None:
    model = nn.Sequential(nn.Linear(2, 2), a_gate(), nn.Linear(2, 2))
    model.double()
    assert model[2].weight.dtype == torch.float64
    with pytest.raises(TypeError, match="weight: got dtype float64"):
        model[1](HIDDEN)
    gate = model.float()[1]
    assert isinstance(gate, Gate)
    assert routed_as(gate)


def test_casts_under_the_settings_of_pytorch() -> None:
    for setting in ("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"):
        set_it = getattr(torch.__future__, f"set_{setting}")
        gate = a_gate(PINNED, frozen=True)
        float32 = gate.weight.detach().clone()
        set_it(True)
        try:
            gate.bfloat16()
        finally:
            set_it(False)
        assert gate.weight.equal(float32)
        assert routed_as(gate)


# Threads, forks, captures.
@FROZEN
def test_threads_that_find_a_change(frozen: bool, prepared: list[Tensor]) -> None:
    """One refresh for all of them, and none sees half of it."""
    gate = a_gate(frozen=frozen)
    for turn in range(5):
        prepared.clear()
        _assign(gate, there(weight_of(SPEC, turn).to(torch.float16 if turn % 2 == 0 else torch.bfloat16)))
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda _: gate(HIDDEN), range(16)))
        assert len(prepared) == 1
        expected = moegate.route(HIDDEN, gate.weight, SPEC, e_score_correction_bias=gate.e_score_correction_bias)
        assert all(routing.topk_ids.equal(expected.topk_ids) for routing in got)


def test_threads_that_wait_for_a_refresh_make_none(prepared: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = a_gate(frozen=True)
    waiting = threading.Semaphore(0)
    notice = Gate._notice

    def counted(self: Gate) -> object:
        waiting.release()
        return notice(self)

    monkeypatch.setattr(Gate, "_notice", counted)
    prepared.clear()
    _write(gate, gate.weight * 2)
    with ThreadPoolExecutor(4) as pool:
        with noticing.lock_of(gate):
            calls = [pool.submit(gate, HIDDEN) for _ in range(4)]
            for _ in calls:
                assert waiting.acquire(timeout=30)
        for call in calls:
            call.result()
    assert len(prepared) == 1


@pytest.mark.cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_of_a_process_that_was_refreshing() -> None:
    """A lock that a thread holds at the fork has nobody to release it in the child."""
    torch.set_num_threads(1)  # PyTorch's own threads do not live through a fork
    gate, held, done = a_gate(frozen=True), threading.Event(), threading.Event()

    def hold() -> None:
        with noticing.lock_of(gate):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    _write(gate, gate.weight * 2)
    child = os.fork()
    if child == 0:
        threading.Timer(20, os._exit, [3]).start()
        gate(HIDDEN)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.cpu
def test_a_refresh_during_a_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CPU in the place of the GPU; test_cuda_streams.py has the GPU."""
    gate, capturing = a_gate(frozen=True), [True]
    bias = gate.e_score_correction_bias
    for module in ("gate", "noticing"):
        monkeypatch.setattr(f"moegate.{module}.is_capturing", lambda device: capturing[0])
    gate(HIDDEN)
    changes: list[tuple[str, Callable[[], object]]] = [
        ("weight", lambda: _write(gate, gate.weight)),
        ("e_score_correction_bias", lambda: bias is not None and bias.add_(0)),
        ("gate", lambda: setattr(gate, "spec", replace(SPEC))),
    ]
    for name, change in changes:
        change()
        with pytest.raises(RuntimeError, match=rf"{name}: .*call gate\.refresh\(\) before the capture"):
            gate(HIDDEN)
        capturing[0] = False
        gate.refresh()
        capturing[0] = True
        gate(HIDDEN)


# What a gradient would need.
@FROZEN
def test_no_gradient_is_told_once(frozen: bool) -> None:
    def told(gate: Callable[[Tensor], object], hidden: Tensor) -> int:
        moegate.warn.warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                gate(hidden)
        return sum("no gradient flows through a routing" in str(each.message) for each in caught)

    gate, learns = a_gate(frozen=frozen), HIDDEN.detach().clone().requires_grad_()
    assert told(gate, HIDDEN) == 0
    assert told(gate, learns) == 1
    with torch.no_grad():
        assert told(gate, learns) == 0
    gate.weight.requires_grad_()
    assert told(gate, HIDDEN) == 1
    scaled = a_gate(SPECS["input norm and expert scale"], frozen=frozen)
    assert scaled.per_expert_scale is not None
    assert told(scaled, HIDDEN) == 0
    scaled.per_expert_scale.requires_grad_()
    assert told(scaled, HIDDEN) == 1
    torch.compiler.reset()
    assert told(torch.compile(gate, fullgraph=True, backend="aot_eager"), HIDDEN) == 1


@FROZEN
def test_copies_of_a_gate_that_changed(frozen: bool) -> None:
    gate = a_gate(frozen=frozen)
    _set_data(gate, there(weight_of(SPEC, 11)))
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), copy.copy(gate)):
        assert back(twin(HIDDEN)).topk_ids.equal(back(gate(HIDDEN)).topk_ids)
        _write(twin, -twin.weight)
        assert routed_as(twin)
