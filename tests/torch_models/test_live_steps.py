"""A module whose weights change while others use it: steps of generation, threads, hooks."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import fastinterp
from fastinterp.errors import UsageError
from fastinterp.torch_models.step_lock import StepLock
from tests.support.modules import assert_same_state, gpt2, llama, state


def test_set_during_generation():
    """Every forward pass sees one point, whole: two points differ in every tensor, and logits tell which it was."""
    module, other = llama(1, dtype=torch.float32), llama(2, dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    logits, stop = [], threading.Event()

    def generate():
        with torch.no_grad():
            while not stop.is_set():
                logits.append(module(ids).logits)

    with fastinterp.Live(module, directions={"far": state(other)}) as live, torch.no_grad():
        expected = []
        for alpha in (0.0, 1.0):
            live.set(far=alpha)
            expected.append(module(ids).logits)
        thread = threading.Thread(target=generate)
        thread.start()
        for k in range(60):
            live.set(far=float(k % 2))
            time.sleep(0.002)
        stop.set()
        thread.join()
    which = [[torch.equal(found, one) for one in expected] for found in logits]
    assert len(logits) > 10
    assert all(any(w) for w in which)
    assert {w.index(True) for w in which} == {0, 1}


def test_whole_generation_beside_set():
    """transformers' own loop, in a second thread, with and without hooks."""
    module, other = gpt2(1), gpt2(2)
    ids = torch.arange(1, 9)[None]
    done = []

    def generate(live):
        with live.step():  # the whole text from one point
            done.append(module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False))

    with fastinterp.Live(module, directions={"far": state(other)}) as live:
        texts = []
        for alpha in (0.0, 1.0):
            live.set(far=alpha)
            generate(live)
            texts.append(done.pop())
        threads = [threading.Thread(target=generate, args=(live,)) for _ in range(4)]
        for k, thread in enumerate(threads):
            thread.start()
            live.set(far=float(k % 2))
        for thread in threads:
            thread.join()
    assert len(done) == 4
    assert all(any(torch.equal(text, one) for one in texts) for text in done)


def test_set_inside_a_step_is_refused():
    module = torch.nn.Linear(2, 2)
    with fastinterp.Live(module, directions={"far": state(torch.nn.Linear(2, 2))}) as live:
        with live.step(), live.step(), pytest.raises(UsageError, match="call this between steps"):
            live.set(far=1.0)
        live.set(far=1.0)


def test_forward_that_fails_ends_its_step():
    module = torch.nn.Linear(2, 2)
    with fastinterp.Live(module, directions={"far": state(torch.nn.Linear(2, 2))}) as live:
        with pytest.raises(RuntimeError):
            module(torch.zeros(1, 3))
        live.set(far=1.0)


@pytest.mark.parametrize("whose", ["module", "global"])
def test_another_hook_that_fails_does_not_end_the_step_around_it(whose):
    def fail(*_):
        raise ValueError("not begun")

    module = torch.nn.Linear(2, 2)
    register = torch.nn.modules.module.register_module_forward_pre_hook
    handle = module.register_forward_pre_hook(fail) if whose == "module" else register(fail)
    try:
        with fastinterp.Live(module, directions={"far": state(torch.nn.Linear(2, 2))}) as live:
            with live.step():
                with pytest.raises(ValueError, match="not begun"):
                    module(torch.ones(1, 2))
                with pytest.raises(UsageError, match="call this between steps"):
                    live.set(far=1.0)
            live.set(far=1.0)
    finally:
        handle.remove()


def test_a_call_inside_a_call_does_not_end_it():
    """The inner one fails before its step begins; the outer one goes on, and is a step still."""

    class Twice(torch.nn.Linear):
        def forward(self, x):
            if x.shape[0] == 1:
                with pytest.raises(ValueError, match="inner"):
                    self(torch.ones(2, 2))
                with pytest.raises(UsageError, match="call this between steps"):
                    live.set(far=0.5)
            return super().forward(x)

    def fail(module, args):
        if args[0].shape[0] == 2:
            raise ValueError("inner")

    module = Twice(2, 2)
    module.register_forward_pre_hook(fail)
    with fastinterp.Live(module, directions={"far": state(torch.nn.Linear(2, 2))}) as live:
        module(torch.ones(1, 2))
        live.set(far=1.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_weights_are_back_when_a_forward_is_interrupted(error):
    """Torch runs no hook then."""

    class Interrupted(torch.nn.Linear):
        def forward(self, x):
            raise error

    module = Interrupted(2, 2)
    before = state(module)
    far = {"far": state(torch.nn.Linear(2, 2))}

    def call():
        with pytest.raises(error):
            module(torch.ones(1, 2))

    def run():
        with pytest.raises(error), fastinterp.Live(module, directions=far) as live:
            live.set(far=1.0)
            module(torch.ones(1, 2))

    run()
    assert_same_state(before, state(module))
    with fastinterp.Live(module, directions=far) as live:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        live.set(far=1.0)  # a step of a thread that has ended


def test_step_may_end_in_another_thread():
    """As a generator does that servers run in a pool of threads."""
    module = torch.nn.Linear(2, 2)
    with fastinterp.Live(module, directions={"far": state(torch.nn.Linear(2, 2))}) as live:
        step = live.step()
        for do in (step.__enter__, lambda: step.__exit__(None, None, None)):
            thread = threading.Thread(target=do)
            thread.start()
            thread.join()
        live.set(far=1.0)


def test_change_is_not_starved():
    """Steps without pause in two threads: a change gets its turn."""
    lock, stop = StepLock(), threading.Event()

    def steps():
        while not stop.is_set():
            thread = lock.enter()
            time.sleep(0.001)
            lock.leave(thread)

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    for _ in range(20):
        with lock.change():
            pass
    took = time.monotonic() - start
    stop.set()
    for thread in threads:
        thread.join()
    assert took < 5


def test_what_a_module_holds_is_looked_at_part_by_part():
    """Without a state dict being made, which takes long; one is where parts or tensors are others."""
    module = llama(1)
    asked: list[bool] = []
    real = module.state_dict

    def state_dict(**keys):
        asked.append(True)
        return real(**keys)

    with fastinterp.Live(module, a=state(module), b=state(module)) as live:
        module.state_dict = state_dict
        live.set(0.5)
        assert not asked
        layer, module.model.layers[1] = module.model.layers[1], llama(2).model.layers[1]
        with pytest.raises(UsageError, match=r"model.layers.1.* is not where it was"):
            live.set(0.25)
        module.model.layers[1] = layer
        del asked[:]
        live.set(0.25)
        assert not asked
        norm = module.model.norm.weight
        module.model.norm.weight = torch.nn.Parameter(norm.detach().clone())
        with pytest.raises(UsageError, match=r"model.norm.weight is not where it was"):
            live.set(0.5)
        module.model.norm.weight = norm
        weight = norm.data
        norm.data = weight.clone()
        with pytest.raises(UsageError, match=r"model.norm.weight is not where it was"):
            live.set(0.5)
        norm.data = weight
