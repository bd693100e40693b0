"""Values fit the types of the arguments that take them, or are refused."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from taming.run.values import Misfit, check_range, fit, members


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int | None, (int, type(None))),
        (Optional[int], (int, type(None))),  # noqa: UP045
        (Union[float, int], (float, int)),  # noqa: UP007
        (Mapping[str, Any], (Mapping[str, Any],)),
        (str, (str,)),
    ],
)
def test_members_of_a_union(annotation, expected):
    assert members(annotation) == expected


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (1e4, int, 10_000),
        (3, float, 3),
        (math.inf, float, math.inf),
        (3, str | int, 3),
        (None, str | None, None),
        ([1, 2], Sequence[int], [1, 2]),
        ([1e1, 2], tuple[int, ...], [10, 2]),
        ([0.5, 1], tuple[float, float], [0.5, 1]),
        ([[1, 2], [3, 4]], Sequence[tuple[int, int]], [[1, 2], [3, 4]]),
        ([], list[str], []),
        ({"a": [1.0]}, Mapping[str, list[int]], {"a": [1]}),
        ({"a": 1}, dict, {"a": 1}),
        ("x", Literal["x", "y"] | None, "x"),
        ("any", "an unknown type", "any"),
        ([1, "a"], Any, [1, "a"]),
    ],
)
def test_values_that_fit(value, annotation, expected):
    fitted = fit(value, annotation)
    assert fitted == expected and type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        (2.5, int, "int, got 2.5"),
        (True, int, "int, got True"),
        (True, float, "float, got True"),
        (math.nan, float, "float, got nan"),
        (1, bool, "bool, got 1"),
        ("1,2", Sequence[int], "list of int, got '1,2'"),
        ("abc", Sequence[str], "list of str, got 'abc'"),
        (2, Sequence[int] | None, r"list of int \| None, got 2"),
        ([1, "a"], Sequence[int], r"list of int, got \[1, 'a'\]"),
        ([0.5], tuple[float, float], r"list of 2 values \(float, float\), got \[0.5\]"),
        ([[1]], Sequence[tuple[int, int]], "list of list of 2 values"),
        ([1], Mapping[str, Any], r"mapping, got \[1\]"),
        ("z", Literal["x", "y"], r"'x' \| 'y', got 'z'"),
        (3, str, "str, got 3"),
        (3, Path, "str, got 3"),
    ],
)
def test_values_that_do_not_fit(value, annotation, words):
    with pytest.raises(Misfit, match=f"must be {words}"):
        fit(value, annotation)


def test_a_number_is_the_text_that_was_written_where_a_text_is_taken():
    texts = {"root": "007", "root.1": "12:30"}
    assert fit(7, str, "root", texts) == "007"
    assert fit(7, Path | None, "root", texts) == "007"
    assert fit(["a", 750], Sequence[str], "root", texts) == ["a", "12:30"]
    assert fit(7, int | str, "root", texts) == 7
    with pytest.raises(Misfit):
        fit(None, str, "root", texts)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_res_blocks", -2, "at least 0, got -2"),
        ("resolution", 0, "at least 1, got 0"),
        ("ch_mult", [1, 0], "at least 1, got 0"),
        ("codebook_weight", -0.5, "at least 0"),
        ("dropout", 1.5, "at most 1, got 1.5"),
        ("num_workers", 10**12, "at most 1000"),
        ("anything", math.inf, "at most"),
        ("anything", math.nan, "at least"),
    ],
)
def test_numbers_out_of_range(name, value, words):
    with pytest.raises(Misfit, match=f"must be {words}"):
        check_range(name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", math.inf), ("anything", -3), ("size", None), ("ch", True)]
)
def test_everything_else_is_in_range(name, value):
    check_range(name, value)
