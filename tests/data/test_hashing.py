"""Hashes of texts, which must never change, because caches and runs depend on them."""

import pytest
from vpd.data.hashing import hash_text, is_in_share

IDS = [hash_text(str(i)) for i in range(4000)]


def test_hashes_stay_what_they_are():
    assert hash_text("") == "e3b0c44298fc1c14"
    assert hash_text("größer") == "45fbf6a67b5efa7d"
    # The SHA-256 of "a" begins with the bytes ca 97 81 12 ca 1b bd ca, a little-endian number.
    share = 0xCABD1BCA128197CA / 2**64
    assert [is_in_share("a", share + step) for step in (-1e-9, 1e-9)] == [False, True]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_share_has_its_size_and_is_part_of_a_larger_one(share: float):
    chosen = {each for each in IDS if is_in_share(each, share)}
    assert abs(len(chosen) / len(IDS) - share) < 0.03
    assert chosen < {each for each in IDS if is_in_share(each, 1.5 * share)}


def test_the_ends():
    assert not any(is_in_share(each, 0.0) for each in IDS)
    assert all(is_in_share(each, 1.0) for each in IDS)
