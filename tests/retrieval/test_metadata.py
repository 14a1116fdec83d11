"""Names and values of metadata: all table contents are kept, can be filtered, and do not depend on order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.errors import UserError
from vlm2vec.retrieval.metadata import KEYWORDS, as_text, column_name, plain_value, resolve_fields
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore

pytestmark = pytest.mark.filterwarnings("ignore:Local mode")
FACTS = StoreFacts("toy", "abc", 4)
LANCE = ["_rowid", "_rowaddr", "_rowoffset", "_distance", "_score", "_relevance_score", "_row_created_at_version"]
ODD = [
    "key",
    "vector",
    "v2v_path",
    "V2V_kind",
    "a.b",
    "a b",
    "a_b",
    "",
    "2nd",
    "order",
    "select",
    "Name",
    "name",
    "x`y",
    "null",
    "TRUE",
    "in",
]
NAMES = st.sampled_from([*LANCE, *ODD]) | st.text(min_size=1, max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([3, 3.0, -0.0, 1e-5, 1e16, 5e-324, 1e300, 2**53, 2**60])
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
FEW = settings(max_examples=12)
COUNT = itertools.count()


def new_store(kind: str, folder: Path) -> VectorStore:
    number = next(COUNT)
    return open_store(f"{folder}/{number}.lance" if kind == "lance" else f"qdrant://:memory:/{number}", FACTS)


def vectors(count: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[np.arange(count) % 4]


@given(st.lists(NAMES, unique=True, max_size=30))
def test_distinct_columns_stay_distinct_and_a_kept_name_is_kept_again(names: list[str]) -> None:
    columns = [column_name(name) for name in names]
    assert len(set(columns)) == len(names)
    for column in columns:
        assert column_name(column) == column and not column.startswith(("_", "v2v_"))
        assert column.encode() and column not in ("key", "vector")


@FEW
@given(row=st.dictionaries(NAMES, VALUES.filter(lambda value: value is not None), max_size=6))
@pytest.mark.parametrize("kind", ["lance", "qdrant"])
def test_every_column_of_a_user_is_kept_and_a_filter_finds_it(kind: str, tmp_path: Path, row: dict[str, Any]) -> None:
    store = new_store(kind, tmp_path)
    named = {column_name(name) if name.startswith("v2v_") else name: value for name, value in row.items()}
    store.add(["a", "b"], vectors(2), [named, {}])  # readers rename what begins with our prefix
    kept = {column_name(name): plain_value(value) for name, value in row.items()}
    kept = {name: value for name, value in kept.items() if value is not None}
    (hit,) = (hit for hit in store.search(vectors(1)[0], 2) if hit.key == "a")
    assert hit.metadata == kept
    for name in kept:
        assert (
            store.count(
                f"`{name}` IS NOT NULL" if not name.isascii() or name.upper() in KEYWORDS else f"{name} IS NOT NULL"
            )
            == 1
        )


@FEW
@given(values=st.lists(VALUES, min_size=2, max_size=5), order=st.randoms(use_true_random=False))
def test_a_column_does_not_depend_on_the_order_of_its_values(tmp_path: Path, values: list[Any], order: Any) -> None:
    found = []
    shuffled = list(enumerate(values))
    order.shuffle(shuffled)
    for rows, together in ((list(enumerate(values)), False), (shuffled, False), (shuffled, True)):
        store = new_store("lance", tmp_path)
        keys, metadata = [str(number) for number, _ in rows], [{"n": value} for _, value in rows]
        step = len(rows) if together else 1
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            store.add(keys[part], vectors(len(keys[part])), metadata[part])
        found.append(dict(zip(*(lambda all: (all.keys, all.metadata))(store.fetch(sorted(keys))), strict=True)))
    assert found[0] == found[1] == found[2]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_text_of_a_number_is_the_number(number: float) -> None:
    assert float(as_text(number)) == number


def test_a_change_of_type_that_was_killed_is_completed_or_undone(tmp_path: Path) -> None:
    for step in ("drop_columns", "alter_columns"):
        store = new_store("lance", tmp_path)
        store.add(["a", "b"], vectors(2), [{"n": 1.5}, {"n": 2}])
        table = store._table  # type: ignore[attr-defined]
        real = getattr(table, step)
        setattr(table, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.add(["c"], vectors(1), [{"n": "n/a"}])
        setattr(table, step, real)
        again = open_store(store.uri)
        again.add(["c"], vectors(1), [{"n": "n/a"}])
        assert [row["n"] for row in again.fetch(["a", "b", "c"]).metadata] == ["1.5", "2", "n/a"]
        assert set(again.fields()) == {"n"}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("width > 600 AND kind = 'kind'", "[v2v_width] > 600 AND [v2v_kind] = 'kind'"),
        ("source = 'it''s width'", "[source] = 'it''s width'"),
        ("`page no.` = 3 or v2v_source = 'a'", f"[{column_name('page no.')}] = 3 or [v2v_source] = 'a'"),
        ("lower(source) = 'a' and width(3)", "lower([source]) = 'a' and width(3)"),
        ("order in (1, 2) and order between 1 and 2e5", "[order] in (1, 2) and [order] between 1 and 2e5"),
        ("sky = 1", "sky = 1"),
        ('"page no." = 3 and "width" = 1', f"[{column_name('page no.')}] = 3 and [v2v_width] = 1"),
    ],
)
def test_a_field_of_a_filter_is_the_users_column_or_else_ours(where: str, expected: str) -> None:
    fields = {"v2v_width", "v2v_kind", "source", "v2v_source", "order", column_name("page no.")}
    resolved = resolve_fields(where, fields.__contains__, quote="|")
    assert resolved.replace("|", "") == expected.replace("[", "").replace("]", "")
    assert resolved.count("|") == 2 * expected.count("[")


ODD_FILTERS = [
    "$set = 'a'",
    "e\u0301 = 1",
    "\u200b = 1",
    "a[0] = 1",
    "# = 1",
    "a b",
    "'",
    "((",
    "n =",
    "`",
    "n = 1; n = 2",
    "n = 1;",
]


@pytest.mark.parametrize("where", ODD_FILTERS)
@pytest.mark.parametrize("kind", ["lance", "qdrant"])
def test_a_filter_that_the_database_cannot_read_is_one_line(kind: str, where: str, tmp_path: Path) -> None:
    store = new_store(kind, tmp_path)
    store.add(["k"], vectors(1), [{"n": 1}])
    with pytest.raises(UserError, match=r"^filter .*$") as caught:
        store.count(where)
    assert "\n" not in str(caught.value)
