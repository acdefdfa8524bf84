"""The records that `rlinvariant bisect` makes of both sides, and its words for an engine or a difference that is no fault."""

import re
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlinvariant.bisect import both_sides, search, trials
from rlinvariant.bisect.record import Recorder
from rlinvariant.models import make_trainable, use_working_copies
from rlinvariant.trainer import score as scoring
from tests.bisect.pairs import TRIAL, replaced
from tests.parity.harness import start_engine


def test_without_a_fault_everything_recorded_is_equal(pair):
    """Places align and are whole on both sides, so that a difference is never one of recording."""
    ours, theirs, _, _ = both_sides.record(pair.engine, pair.model, TRIAL, 6)
    assert search.first_difference(ours, theirs) is None
    assert ours.trace.keys() == theirs.trace.keys() and len(theirs.trace) == 5 + 2 * 14
    last = len(TRIAL.prompts[6]) + 11  # the last token drawn goes into the trainer alone
    for place in theirs.trace:
        assert search.side_at(ours, place).keys() == search.side_at(theirs, place).keys() - {last}, place
    assert search.side_at(ours, (1, "attention")).keys() == set(range(last))
    assert search.side_at(ours, (None, "lm_head")).keys() == set(range(len(TRIAL.prompts[6]) - 1, last))


def test_a_stock_engine_is_named_as_such(pair):
    """It has no plugin: the outputs of vLLM's own modules are seen."""
    stock = start_engine(pair.path, longest=64, invariant=False)
    result, said = pair.find(("sampler",), stock)
    assert result.first is not None and result.first.place is not None
    assert result.mismatched > 72 and any("stock kernels: the sampler runs without the plugin" in line for line in said)


def test_what_does_not_come_back_is_said(pair):
    calls = []
    pack = scoring.pack

    def once(*args):
        calls.append(True)
        packed = pack(*args)
        return replace(packed, predicted_from=(packed.predicted_from - 1).clamp(min=0)) if len(calls) == 1 else packed

    with replaced(scoring, "pack", once):
        result, said = pair.find()
    assert result.first is None and result.mismatched > 0
    assert said[1].startswith("not reproducible") and re.fullmatch(r"sampler .*: (.*), then \1", said[2]), said
    assert (again := re.fullmatch(r"trainer .*: (.*), then (.*)", said[3])) and again[1] != again[2], said


def test_working_copies_are_recorded_as_the_modules_are(pair):
    """The trainer on a GPU calls no q_proj, k_proj, v_proj, gate_proj or up_proj, but one product for each group."""
    merged: Any = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32)
    merged = use_working_copies(make_trainable(merged), torch.bfloat16).eval()
    places = []
    for model in (pair.model, merged):
        recorder = Recorder(model)
        drawn = trials.draw(pair.engine, TRIAL)[1]
        with recorder.recording(), both_sides.expecting(model, TRIAL, drawn, 6, recorder, False):
            both_sides.score_rows(model, TRIAL, drawn, 5, False)
        places.append({place: [list(b.value.shape) for b in blocks] for place, blocks in recorder.trace.items()})
    assert places[0] == places[1] and len(places[0]) == 4 + 2 * 14
