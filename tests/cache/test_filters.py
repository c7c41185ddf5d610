from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from kdcache.cache.filters import filter_mask, select_sequences
from kdcache.errors import ConfigError
from tests.loops import loop

TABLE = pa.table(
    {
        "sequence": [0, 1, 2, 3],
        "num_positions": pa.array([1, 2, 3, 4], pa.int32()),
        "teacher_loss": pa.array([1.5, 2.5, 3.5, None], pa.float32()),
        "source": ["a", "b", None, "a"],
        "page title": ["x", "y", "z", "it's `w`"],
        "good": [True, False, True, None],
        "coded": pa.array(["q", "r", "q", "r"]).dictionary_encode(),
        "large": pa.array(["q", "r", "q", "r"], pa.large_string()),
        "tags": [["a"], [], ["b"], ["a"]],
        "nothing": pa.nulls(4),
        "unsigned": pa.array([0, 1, 2, 2**63], pa.uint64()),
    }
)


@loop(
    ("where", "chosen"),
    [
        ("teacher_loss < 3", [0, 1]),
        ("teacher_loss < 3 and num_positions >= 2", [1]),
        ("teacher_loss < 2 or num_positions > 3", [0, 3]),
        ("1 < num_positions <= 3", [1, 2]),
        ("num_positions != 2", [0, 2, 3]),
        ("source == 'a'", [0, 3]),
        ('source in ["b", "c"]', [1]),
        ("source not in ('a', 'c')", [1]),
        ("num_positions in [1.0, 4, 5]", [0, 3]),
        ("num_positions in [2, 3]", [1, 2]),
        ("unsigned in [2, 7]", [2]),
        ("coded == 'q' and large == 'q'", [0, 2]),
        ("good", [0, 2]),
        ("not good", [1]),
        ("`page title` == 'y'", [1]),
        ('`page title` == "it\'s `w`"', [3]),
        ("num_positions % 2 == 0", [1, 3]),
        ("sequence % 3 == 1", [1]),
        ("-num_positions % 3 == 2", [0, 3]),  # as Python rounds, down
        ("num_positions // 2 == 1", [1, 2]),
        ("num_positions / 2 > 1.4", [2, 3]),
        ("num_positions / sequence > 1.6", [0, 1]),  # 1 / 0 is infinite
        ("+num_positions - 1 == sequence", [0, 1, 2, 3]),
        ("(num_positions + 1) * 2 > 7 and not (sequence == 3)", [2]),
        ("True", [0, 1, 2, 3]),
        ("  num_positions\n  > 3 ", [3]),
    ],
)
def test_filters(where, chosen):
    assert select_sequences(TABLE, where).tolist() == chosen


def test_a_missing_value_is_neither_true_nor_false():
    for where in ("source == 'a'", "source != 'a'", "source in ['a']", "source not in ['a']", "not source == 'a'"):
        assert 2 not in np.flatnonzero(filter_mask(TABLE, where)), where
    assert select_sequences(TABLE, "source == 'a' or num_positions == 3").tolist() == [0, 2, 3]


def test_all_and_the_first_sequences():
    assert select_sequences(TABLE, None).tolist() == [0, 1, 2, 3]
    assert select_sequences(TABLE, None, 2).tolist() == [0, 1]
    assert select_sequences(TABLE, "num_positions > 1", 2).tolist() == [1, 2]
    assert select_sequences(TABLE, "good", 9).tolist() == [0, 2]
    chunked = pa.concat_tables([TABLE, TABLE])
    assert select_sequences(chunked, "good").tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('touch stolen')",
        "().__class__.__bases__[0].__subclasses__()",
        "source.upper == 'A'",
        "open('/etc/passwd')",
        "num_positions[0] == 1",
        "[s for s in source] == 1",
        "(lambda: num_positions)() > 1",
        "f'{source}' == 'a'",
        "1 if good else 0",
        "(n := num_positions) > 1",
        "{'a': 1} == 1",
        "source == None",
        "source == b'a'",
        "source == ...",
        "num_positions == 1j",
        "await good",
        "(good, good)",
    ],
)
def test_nothing_but_comparing_is_possible(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"contains .*, which is not allowed; a filter may contain column names"):
        filter_mask(TABLE, where)
    assert not list(tmp_path.iterdir())


@loop("where", ["9 ** 9 ** 9 ** 9 > 1", "good & good", "source is good", "~num_positions > 1", "1 << 9 > 1"])
def test_operators_that_no_filter_has(where):
    with pytest.raises(ConfigError, match="whose operator is unsupported"):
        filter_mask(TABLE, where)


@loop(
    ("where", "words"),
    [
        ("teacher_los < 3", "unknown column 'teacher_los'; did you mean 'teacher_loss'?"),
        ("source == wiki", r"unknown column 'wiki'; known: sequence, num_positions, .*texts need quotes"),
        ("`page titel` == 'x'", "unknown column 'page titel'; did you mean 'page title'?"),
        ("source < 3", "uses 3, a number, where a text is expected"),
        ("source + 'b' == 'ab'", "uses source, a text, where a number is expected"),
        ("'a' * 10000000000 == 'b'", "uses 'a', a text, where a number is expected"),
        ("`page title` + 1 > 2", "uses `page title`, a text"),
        ("good == 1", "uses 1, a number, where a condition is expected"),
        ("not num_positions", "uses num_positions, a number, where a condition is expected"),
        ("good and source", "uses source, a text, where a condition is expected"),
        ("num_positions in ['a']", "uses 'a', a text, where a number is expected"),
        ("num_positions in [sequence]", r"needs constants in \[sequence\]"),
        ("source in 'abc'", "needs a list such as"),
        ("tags == 'a'", "uses 'a', a text, where a list"),
        ("nothing == 'a'", "uses 'a', a text, where a null is expected"),
        ("num_positions", "is a number for every sequence, not a condition; compare it with something"),
        ("'a'", "is a text for every sequence"),
        ("source = 'a'", r"cannot be read \("),
        ("", r"cannot be read \("),
        ("good; good", r"cannot be read \("),
        ("good\0", r"cannot be read \("),
        ("(" * 500 + "good" + ")" * 500, r"cannot be (read|evaluated) \("),
        ("not " * 100_000 + "good", r"cannot be (read|evaluated) \("),
        ("9" * 5000 + " < num_positions", r"cannot be read \("),
        ("9" * 30 + " < num_positions", r"cannot be evaluated \("),
        ("num_positions * 9223372036854775807 > 3", r"cannot be evaluated \(overflow"),
        ("num_positions > 4", r"selects none of the 4 sequences \(num_positions is 1 to 4\)"),
        ("teacher_loss > 9 and source == 'a'", r"selects none of the 4 sequences \(teacher_loss is 1.5 to 3.5\)"),
        ("source == 'x'", r"selects none of the 4 sequences$"),
    ],
)
def test_mistakes(where, words):
    with pytest.raises(ConfigError, match=words) as error:
        select_sequences(TABLE, where)
    assert len(str(error.value)) < 600
    assert str(error.value).startswith("filter '") or str(error.value).startswith('filter "')
