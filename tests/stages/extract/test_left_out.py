"""Rows that are left out, each kind of error shown once."""

from vpd.stages.extract.left_out import MAX_KINDS, LeftOut


def test_rows_are_counted_by_reason_and_the_first_of_each_kind_is_kept():
    found = LeftOut()
    for row in range(1, 4):
        found.add("unreadable record", f"a.jsonl:{row}", f"messages[{row}].content must be a string, found int '{row}'")
    found.add("unreadable record", "a.jsonl:9", "not JSON")
    found.add("duplicate")
    other = LeftOut()
    other.add("unreadable record", "b.jsonl:1", "not JSON")
    other.add("too long", "b.jsonl, row 2", "the prompt has 700 tokens")
    found.update(other)
    assert found.counts == {"unreadable record": 5, "duplicate": 1, "too long": 1}
    assert [*found.firsts.values()] == [
        "a.jsonl:1: messages[1].content must be a string, found int '1'",
        "a.jsonl:9: not JSON",
        "b.jsonl, row 2: the prompt has 700 tokens",
    ]


def test_a_million_kinds_take_little_memory():
    found = LeftOut()
    for letters in map(chr, range(1000, 9000)):
        found.add("unreadable record", "a.jsonl:1", f"expected a key, found {letters}")
    assert (len(found.firsts), found.counts["unreadable record"]) == (MAX_KINDS, 8000)
