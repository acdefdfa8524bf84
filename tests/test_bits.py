import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinvariant import bits

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WORDS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (0,), (4, 0)])
def test_a_copy_is_equal(dtype, shape):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    assert bits.compare(x, x.clone()) is None
    bits.assert_bits_equal(x, x.clone(), "copy")


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_differs_from_zero(dtype):
    a = torch.tensor([1.0, 0.0], dtype=dtype)
    b = torch.tensor([1.0, -0.0], dtype=dtype)
    assert torch.equal(a, b)  # control: torch sees no difference
    difference = bits.compare(a, b)
    assert difference is not None
    assert (difference.count, difference.total, difference.coordinate, difference.max_ulps) == (1, 2, (1,), 1)
    digits = 2 * a.element_size()
    assert (difference.a_hex, difference.b_hex) == ("0x" + "0" * digits, "0x8" + "0" * (digits - 1))


def test_nan_is_equal_only_as_the_same_word():
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)
    assert not torch.equal(nan, nan.clone())  # control: torch never says equal
    assert bits.compare(nan, nan.clone()) is None
    difference = bits.compare(nan, other_nan)
    assert difference is not None and (difference.a_hex, difference.b_hex) == ("0x7FC00000", "0x7FC00001")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (2, 3, 4)])
def test_one_planted_ulp_is_found_where_it_is(dtype, place):
    a = torch.randn(3, 4, 5, dtype=torch.float64).to(dtype) + 3
    b = a.clone()
    b.view(WORDS[dtype])[place] += 1
    difference = bits.compare(a, b)
    assert difference is not None
    assert (difference.count, difference.total, difference.coordinate, difference.max_ulps) == (1, 60, place, 1)
    assert (difference.a, difference.b) == (a[place].item(), b[place].item())
    assert int(difference.b_hex, 16) == int(difference.a_hex, 16) + 1


def test_the_first_difference_is_the_first_in_row_major_order_also_in_strided_tensors():
    a = torch.zeros(6, 4).t()  # [4, 6], column-major in memory
    b = torch.zeros(4, 6)
    b[1, 5] = 1.0  # later in a's memory than b[2, 0], earlier in rows
    b[2, 0] = 2.0
    for x, y in ((a, b), (b, a)):
        difference = bits.compare(x, y)
        assert difference is not None and difference.coordinate == (1, 5) and difference.count == 2


def test_a_scalar_has_the_empty_coordinate():
    difference = bits.compare(torch.tensor(1.0), torch.tensor(2.0))
    assert difference is not None and difference.coordinate == () and difference.max_ulps == 2**23


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_compare(dtype):
    a, b = torch.tensor([0, 0, 1], dtype=dtype), torch.tensor([0, 1, 1], dtype=dtype)
    assert bits.compare(a, a.clone()) is None
    difference = bits.compare(a, b)
    assert difference is not None and (difference.count, difference.coordinate, difference.max_ulps) == (1, (1,), 1)


def test_gradients_are_no_obstacle():
    a = torch.ones(2, requires_grad=True)
    assert bits.compare(a, torch.ones(2)) is None
    assert bits.compare(a, torch.zeros(2)) is not None


@pytest.mark.parametrize("function", [bits.compare, bits.ulps])
def test_dtype_and_shape_must_be_the_same(function):
    with pytest.raises(TypeError, match="torch.bfloat16 with bits of torch.float32"):
        function(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2))  # equal by torch.equal after promotion
    with pytest.raises(ValueError, match=r"\(2, 3\) with shape \(3, 2\)"):
        function(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\(1,\) with shape \(\)"):
        function(torch.zeros(1), torch.zeros(()))  # would broadcast
    with pytest.raises(TypeError, match="torch.complex64"):
        function(torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64))


def test_assert_bits_equal_says_what_how_many_where_and_which_words():
    a, b = torch.ones(2, 600), torch.ones(2, 600)
    b[1, 7] = 1.0 + 2**-22
    with pytest.raises(AssertionError) as caught:
        bits.assert_bits_equal(a, b, "linear, 2 rows")
    assert str(caught.value) == (
        "linear, 2 rows: 1 of 1,200 float32 values differ, by up to 2 ulp; "
        "first at (1, 7): 1.0 (0x3F800000) != 1.000000238418579 (0x3F800002)"
    )


words32 = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=200, deadline=None)
@given(words32, words32)
def test_compare_says_equal_exactly_if_the_words_are(word_a, word_b):
    a, b = (torch.tensor([w], dtype=torch.int32).view(torch.float32) for w in (word_a, word_b))
    assert (bits.compare(a, b) is None) == (word_a == word_b)
    assert (bits.ulps(a, b).item() == 0) == (word_a == word_b)
    assert bits.ulps(a, b).item() == bits.ulps(b, a).item()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3))
def test_ulps_add_up_along_the_number_line(values):
    low, middle, high = (torch.tensor([v]) for v in sorted(values, key=lambda v: (v, math.copysign(1.0, v))))
    assert bits.ulps(low, high) == bits.ulps(low, middle) + bits.ulps(middle, high)


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 40))
def test_ulps_count_the_steps_of_nextafter(value, steps):
    start = x = torch.tensor([value])
    for _ in range(steps):
        x = torch.nextafter(x, torch.tensor([math.inf]))
    skipped_zero = math.copysign(1.0, value) < 0 < x.item()  # nextafter goes from -0.0 straight past 0.0
    if not x.isinf().any():
        assert bits.ulps(start, x).item() == steps + skipped_zero


def test_a_distance_too_large_for_int64_is_given_as_the_largest():
    inf = torch.tensor([math.inf], dtype=torch.float64)
    assert bits.ulps(-inf, inf).item() == 2**63 - 1
    extremes = torch.tensor([-(2**63)]), torch.tensor([2**63 - 1])
    assert bits.ulps(*extremes).item() == 2**63 - 1
