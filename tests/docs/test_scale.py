"""The page that plans larger machines says what its formulas say, and these agree with what was measured."""

from rlinvariant.models.shapes import SHAPES
from tests.docs.test_docs import script

scale = script("scale")


def test_the_committed_tables_are_the_formulas():
    text = scale.PAGE.read_text()
    assert scale.filled(text) == text, "run python docs/scale.py"
    assert scale.filled(text.replace("| Qwen3-8B | 8 |", "| Qwen3-8B | 9 |")) == text, "control: another number is put right"


def test_formulas_are_near_what_was_measured():
    """They were not fitted to it; half of the parameters would be far."""
    ratios = [float(row[-1]) for row in scale.checks()]
    assert len(ratios) == 2 and all(0.85 < ratio < 1.15 for ratio in ratios), ratios


def test_parameters_are_those_of_the_shapes_that_are_built():
    for model, name in ((scale.MEASURED, "qwen3-1.7b"), (scale.MODELS[0], "qwen3-8b")):
        shape = SHAPES[name]
        own = (model.hidden, model.intermediate, model.layers, model.heads, model.kv_heads, model.head, model.vocab, model.tied)
        assert own == (*vars(shape).values(),)[:8]
    assert [round(m.parameters / 1e9, 1) for m in scale.MODELS] == [8.2, 32.8, 70.6]
