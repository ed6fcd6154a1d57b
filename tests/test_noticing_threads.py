"""Noticing in several threads, and in the child of a process that was refreshing."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from noticing_gates import FROZEN, HIDDEN, SPEC, a_gate, assign, weight_of, write
from on_device import there
from torch import Tensor

import moegate
from moegate import Gate, noticing


@FROZEN
def test_threads_that_find_a_change(frozen: bool, prepared: list[Tensor]) -> None:
    """All threads share one refresh, and none sees an incomplete one."""
    gate = a_gate(frozen=frozen)
    for turn in range(5):
        prepared.clear()
        assign(gate, there(weight_of(SPEC, turn).to(torch.float16 if turn % 2 == 0 else torch.bfloat16)))
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
    write(gate, gate.weight * 2)
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
    """A lock that a thread holds at the fork is not held in the child."""
    torch.set_num_threads(1)  # PyTorch's own threads do not live through a fork
    gate, held, done = a_gate(frozen=True), threading.Event(), threading.Event()

    def hold() -> None:
        with noticing.lock_of(gate):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    write(gate, gate.weight * 2)
    child = os.fork()
    if child == 0:
        threading.Timer(20, os._exit, [3]).start()
        gate(HIDDEN)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
