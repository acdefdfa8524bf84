"""Faults that the first batch does not show. Each function returns a context in which the sampler is wrong at times."""

import contextlib
from collections.abc import Callable
from typing import Any

from rlinvariant.bisect import trials
from tests.bisect.pairs import halves, replaced, ulp


def rows_of_the_crowd(pair):
    down = pair.sampler("layers.1.self_attn.o_proj")
    forward = down.forward
    return replaced(down, "forward", lambda x: halves(x, down.weight) if 48 < x.shape[-2] <= 64 else forward(x))


@contextlib.contextmanager
def shifted_when(pair, when: Callable[[Any], bool], update: Callable[..., None] = lambda **how: None):
    """Let layer 1 attend wrongly where `when(metadata)`; `update` hears how each draw is done."""
    impl, drive = pair.attention(1), trials.drive
    forward = impl.forward

    def faulty(layer, query, key, value, kv_cache, m, output, *args, **kwargs):
        forward(layer, query, key, value, kv_cache, m, output, *args, **kwargs)
        if when(m):
            ulp(output)
        return output

    def heard(engine, requests, **how):
        update(**how)
        return drive(engine, requests, **how)

    with replaced(impl, "forward", faulty), replaced(trials, "drive", heard):
        yield


def prefill_that_goes_on(pair):
    def cut(m):
        rows = m.cu_seqlens_q.diff()
        return bool(((rows > 1) & (rows < m.kv_lens)).any())

    return shifted_when(pair, cut)


def warm_prefix(pair):
    cold = [True]
    return shifted_when(pair, lambda m: not cold[0], lambda cold=True, preempt=None, now=cold: now.__setitem__(0, cold))


def a_later_turn(pair):
    """Attend wrongly where prompts are drawn on a warm cache that others have left."""
    before, wrong = [None], [False]

    @contextlib.contextmanager
    def listening():
        drive = trials.drive

        def heard(engine, requests, *, cold=True, **how):
            prompts = [request.prompt for request in requests]
            wrong[0], before[0] = not cold and prompts != before[0], prompts
            return drive(engine, requests, cold=cold, **how)

        with shifted_when(pair, lambda m: wrong[0]), replaced(trials, "drive", heard):
            yield

    return listening()


@contextlib.contextmanager
def a_key_computed_again(pair):
    """Write one wrong key of each token to the cache after a preemption, until the next batch."""
    impl, llm, again = pair.attention(1), pair.engine.llm, [False]
    update, reset = impl.do_kv_cache_update, llm.reset_prefix_cache

    def faulty(layer, key, value, *args):
        key = key.clone()
        if again[0]:
            ulp(key[:, 0])
        update(layer, key, value, *args)

    def heard(reset_running_requests=False):
        again[0] = reset_running_requests
        return reset(reset_running_requests=reset_running_requests)

    with replaced(impl, "do_kv_cache_update", faulty), replaced(llm, "reset_prefix_cache", heard):
        yield
