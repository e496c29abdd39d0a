import pytest

from unswag.sizes import bytes_of


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (5, 5),
        ("7", 7),
        ("7B", 7),
        ("64GiB", 64 << 30),
        (" 1.5 GiB ", 3 << 29),
        ("500MB", 500_000_000),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(size, expected):
    assert bytes_of(size, "limit") == expected


@pytest.mark.parametrize("size", [-1, True, 1.5, None, "", "GiB", "-1GiB", "3 apples", "1e9", "5gib", "1.2.3MB"])
def test_other_texts_are_errors_with_the_argument_s_name(size):
    with pytest.raises(ValueError, match=r"store_limit=.* is no size; pass a number of bytes"):
        bytes_of(size, "store_limit")


@pytest.mark.parametrize("size", [1 << 63, "8388608TiB", "99999999999999TiB", "9" * 400])
def test_sizes_beyond_64_bits_are_errors_with_the_argument_s_name(size):
    with pytest.raises(ValueError, match=r"store_limit=.* is more than a signed 64-bit size holds; pass less than 8 EiB"):
        bytes_of(size, "store_limit")
    assert bytes_of((1 << 63) - 1, "store_limit") == (1 << 63) - 1
