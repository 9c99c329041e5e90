import pytest

from keras_lowbit.numerics.windows import positions_seen, same_padding

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("size", "window", "stride", "expected"),
    [
        (5, 3, 1, (1, 1)),
        (5, 2, 1, (0, 1)),
        (4, 3, 2, (0, 1)),  # 2 places reach over 5
        (5, 3, 2, (1, 1)),  # 3 places reach over 7
        (5, 1, 2, (0, 0)),  # a window smaller than its steps
        (None, 5, 1, (2, 2)),
    ],
)
def test_same_adds_what_the_places_need_and_the_odd_one_after(size, window, stride, expected):
    assert same_padding(size, window, stride) == expected


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding", "expected"),
    [
        (5, 3, 3, "SAME", [3, 2]),
        (4, 3, 1, "SAME", [2, 3, 3, 2]),
        (2, 5, 1, "SAME", [2, 2]),  # a window larger than the axis
        (5, 3, 1, "VALID", [3, 3, 3]),
    ],
)
def test_windows_over_the_border_see_less(size, window, stride, padding, expected):
    assert positions_seen(size, window, stride, padding).tolist() == expected
