"""Training pairs in the MMEB-train layout: Arrow rows in memory, from which an example is made when it is asked for.

Arrow rows have no reference counts, so forked data workers share the parent's memory. Rows are checked as columns when
they are read, and a cap is applied while reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2vec.data.examples import VERBATIM, TrainExample
from vlm2vec.data.mmeb.images import (
    SCORED_COLUMNS,
    TRAIN_COLUMNS,
    WORDINGS,
    check_columns,
    input_of,
    set_files,
    without_image,
)
from vlm2vec.data.mmeb.media import Media
from vlm2vec.errors import UserError
from vlm2vec.media.cells import cell_kind, is_list, parquet_errors
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput

NEGATIVE_COLUMNS = TRAIN_COLUMNS[4:]
POSITIVE_SCORE, NEGATIVE_SCORES = SCORED_COLUMNS[6:]
IMAGE_COLUMNS = tuple(name for name in TRAIN_COLUMNS if name.endswith("_image_path"))
BLOCK = 1024  # rows that iterating turns into Python objects at once
READ_AT_ONCE = 65536
LISTS, NUMBERS = pa.list_(pa.string()), pa.list_(pa.float64())
TYPES = dict.fromkeys(TRAIN_COLUMNS[:4], pa.string()) | dict.fromkeys(NEGATIVE_COLUMNS, LISTS)
TYPES |= {POSITIVE_SCORE: pa.float64(), NEGATIVE_SCORES: NUMBERS}
Wording = Literal["original", "diverse"]


def read_train_set(
    root: Path,
    name: str,
    use_negatives: bool = True,
    wording: Wording = "original",
    limit: int | None = None,
    choose: Callable[[int], Sequence[int]] | None = None,
) -> TrainRows:
    """Pairs of one set in the MMEB-train layout: `<root>/<name>/original-*.parquet`, or `diverse_instruction-*`.

    Images are looked for at `<root>/<path>`, then in `<root>/images_zip/<Set>.zip`; they are not opened.

    Args:
        root: The data folder.
        name: Folder of the set.
        use_negatives: Whether `neg_*` columns become explicit negatives.
        wording: The published sets have two: one instruction a set, or several.
        limit: Read at most this many first rows of each file. Default: all.
        choose: Number of pairs -> numbers of those to keep, ascending; the others are dropped while reading. Default:
            all are kept.

    Raises:
        UserError: for a missing or empty set, a missing or unknown column, or a row without query or target.
    """
    files = set_files(root, name, WORDINGS[wording])
    counts = [_num_rows(file, limit) for file in files]
    ends = np.cumsum(counts, dtype=np.int64)
    if not ends[-1]:
        raise UserError(f"{root / name}: the set is empty; expected at least one row")
    chosen = range(int(ends[-1])) if choose is None else choose(int(ends[-1]))
    numbers = np.asarray(chosen, dtype=np.int64)
    parts = [
        part
        for file, begin, end in zip(files, [0, *ends[:-1]], ends, strict=True)
        for part in _chosen_rows(file, numbers[(numbers >= begin) & (numbers < end)] - begin, use_negatives)
    ]
    table = _compact(pa.concat_tables(parts, promote_options="default"))  # a file without scores has null there
    return TrainRows(table, numbers, [*map(str, files)], [0, *ends.tolist()], name, Media(root))


def num_pairs(root: Path, name: str, wording: Wording = "original") -> int:
    """Pairs of a set in the MMEB-train layout, from the heads of its files."""
    return sum(_num_rows(file, None) for file in (root / name).glob(WORDINGS[wording]))


@dataclass(frozen=True)
class TrainRows(Sequence[TrainExample]):
    """The pairs of a set.

    Attributes:
        table: Its rows, with the columns of `SCORED_COLUMNS`, as far as the files have them and they are used.
        numbers: Number of each row in the set's files, ascending, [N].
        files: The set's files.
        begins: Number of the first row of each file; the last item is the number of rows of all files.
        name: Name of the set.
        media: Where its images are.
        target_instruction: Put on targets and negatives that have no instruction of their own; None: none.
        reference_negative: Whether the query's images become a hard negative.
    """

    table: pa.Table
    numbers: np.ndarray
    files: list[str]
    begins: list[int]
    name: str
    media: Media
    target_instruction: str | None = None
    reference_negative: bool = False

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[TrainExample]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    @overload
    def __getitem__(self, index: int) -> TrainExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainExample]: ...
    def __getitem__(self, index: int | slice) -> TrainExample | list[TrainExample]:
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(begin, end, step)]
            rows = self.table.slice(begin, max(end - begin, 0)).to_pylist()
            return [self._example(row, begin + i) for i, row in enumerate(rows)]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        return self._example(self.table.slice(number, 1).to_pylist()[0], number)

    def only(self, places: Sequence[int]) -> TrainRows:
        """The set of these of its pairs."""
        taken = np.asarray(places, dtype=np.int64)
        return _changed(self, table=self.table.take(taken), numbers=self.numbers[taken])

    def with_target_instruction(self, instruction: str) -> tuple[TrainRows, int]:
        """The set with an instruction for its targets, and the number of targets that are verbatim prompts."""
        text, path = (self.table[name].cast(pa.string()) for name in ("pos_text", "pos_image_path"))
        verbatim = pc.and_kleene(pc.invert(_empty(path)), pc.match_substring(text, VERBATIM))
        return _changed(self, target_instruction=instruction), pc.sum(verbatim).as_py() or 0

    def with_reference_negatives(self) -> TrainRows:
        """The set whose pairs have the query's images as a hard negative."""
        return _changed(self, reference_negative=True)

    def images(self) -> Iterator[ImageRef]:
        """Each distinct image path of a column once, with the first row that names it; nothing is opened."""
        for name in set(self.table.column_names).intersection(IMAGE_COLUMNS):
            column = self.table[name]
            rows = np.arange(len(self))
            if is_list(column.type):
                rows = np.repeat(rows, pc.fill_null(pc.list_value_length(column), 0).to_numpy())
                column = pc.list_flatten(column)
            encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
            paths, first = np.unique(encoded.indices.fill_null(-1).to_numpy(), return_index=True)
            for number, place in zip(paths.tolist(), first.tolist(), strict=True):
                path = encoded.dictionary[number].as_py() if number >= 0 else None
                if path:
                    yield self.media.image(path, f"{self._where(int(rows[place]))}, field {name}")

    def _where(self, place: int) -> str:
        number = int(self.numbers[place])
        file = int(np.searchsorted(self.begins, number, side="right")) - 1
        return f"{self.files[file]}, row {number - self.begins[file]}"

    def _example(self, row: dict[str, Any], place: int) -> TrainExample:
        where = self._where(place)
        query = self._input(row["qry"], row["qry_image_path"], f"{where}, field qry_image_path")
        target = self._input(row["pos_text"], row["pos_image_path"], f"{where}, field pos_image_path")
        assert query is not None and target is not None  # checked when the rows were read
        texts, paths = (row.get(name) or () for name in NEGATIVE_COLUMNS)
        pairs = zip(texts, paths, strict=False)  # lengths were checked when the rows were read
        found = [self._input(text, path, f"{where}, field neg_image_path") for text, path in pairs]
        negatives = tuple(negative for negative in found if negative is not None)
        scores: tuple[float, ...] = ()
        if row.get(POSITIVE_SCORE) is not None:
            judged = zip(found, row.get(NEGATIVE_SCORES) or (), strict=False)
            scores = (row[POSITIVE_SCORE], *(score for negative, score in judged if negative is not None))
        example = TrainExample(query, target, negatives, self.name, origin=where, scores=scores)
        if self.reference_negative:
            example = example.with_reference_negative()
        return example.with_target_instruction(self.target_instruction) if self.target_instruction else example

    def _input(self, text: str | None, path: str | None, origin: str) -> EmbeddingInput | None:
        return input_of(text if path else without_image(text), path, self.media, origin)


def _changed(rows: TrainRows, **values: Any) -> TrainRows:
    return TrainRows(**{**rows.__dict__, **values})


def _num_rows(file: Path, limit: int | None) -> int:
    with parquet_errors(file):
        number: int = pq.read_metadata(file).num_rows
    return number if limit is None else min(number, limit)


def _compact(table: pa.Table) -> pa.Table:
    """The table with columns of repeated texts (labels, paths of images that several pairs share) as dictionaries."""
    for place, name in enumerate(table.column_names):
        column = table.column(place)
        if column.type != pa.string():
            continue
        encoded = column.combine_chunks().dictionary_encode()
        if encoded.nbytes < column.nbytes:
            table = table.set_column(place, name, encoded)
    return table


def _chosen_rows(file: Path, chosen: np.ndarray, use_negatives: bool) -> Iterator[pa.Table]:
    """Yields the chosen rows of a file in parts, checked; other rows are read but not kept."""
    begin = 0
    with pq.ParquetFile(file) as opened:
        check_columns(file, opened.schema_arrow.names, TRAIN_COLUMNS, SCORED_COLUMNS)
        unused = () if use_negatives else (*NEGATIVE_COLUMNS, NEGATIVE_SCORES)
        columns = [name for name in SCORED_COLUMNS if name in opened.schema_arrow.names and name not in unused]
        yield pa.schema([(name, TYPES[name]) for name in columns]).empty_table()  # if no row of the file is chosen
        batches = opened.iter_batches(READ_AT_ONCE, columns=columns)
        while len(chosen) and begin <= chosen[-1]:
            with parquet_errors(file):
                batch = next(batches)
            first, last = np.searchsorted(chosen, [begin, begin + len(batch)])
            mine = chosen[first:last]
            rows = batch if len(mine) == len(batch) else batch.take(pa.array(mine - begin))
            with parquet_errors(file):
                found = {name: _typed(file, name, rows.column(name)) for name in columns}
            _check(found, file, mine)
            yield pa.table({name: _as_lists(column, TYPES[name]) for name, column in found.items()})
            begin += len(batch)


def _typed(file: Path, name: str, column: Any) -> Any:
    """Converts a column to texts, to lists of texts (mined negatives) or to scores, from any Arrow type that has them.

    Raises:
        UserError: for a column of another kind.
    """
    wanted = TYPES[name]
    if wanted in (NUMBERS, pa.float64()):
        try:
            return column.cast(wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{file}: column {name}: expected numbers, found {column.type}") from error
    column.validate(full=True)  # texts are UTF-8
    inner = column.type.value_type if wanted == LISTS and is_list(column.type) else column.type
    if not pa.types.is_null(inner) and cell_kind(inner) != "text":
        raise UserError(f"{file}: column {name}: expected texts, found {column.type}")
    return column.cast(pa.string() if inner is column.type else LISTS)


def _as_lists(column: Any, kind: pa.DataType) -> Any:
    """Converts published negatives, one text per row, to lists of one text."""
    if kind != LISTS or column.type == LISTS:
        return column
    return pa.ListArray.from_arrays(pa.array(np.arange(len(column) + 1, dtype=np.int32)), column)


def _check(rows: dict[str, Any], file: Path, numbers: np.ndarray) -> None:
    """Checks that each of these rows of a file has a query, a target, and as many texts as images of negatives.

    Raises:
        UserError: naming the first row that does not.
    """
    for text, path in (("qry", "qry_image_path"), ("pos_text", "pos_image_path")):
        place = pc.index(pc.and_(_empty(rows[text]), _empty(rows[path])), True).as_py()
        if place >= 0:
            raise UserError(
                f"{file}, row {numbers[place]}: field {text} and its image are both empty; remove the row or fill one"
            )
    if NEGATIVE_COLUMNS[0] not in rows:
        return
    texts, paths = (rows[name] for name in NEGATIVE_COLUMNS)
    if LISTS in (texts.type, paths.type):
        place = pc.index(pc.not_equal(_lengths(texts), _lengths(paths)), True).as_py()
        if place >= 0:
            lists = "expected neg_text and neg_image_path to be two texts or two lists of equal length"
            raise UserError(f"{file}, row {numbers[place]}: {lists}")
    if POSITIVE_SCORE in rows:
        wrong = pc.not_equal(_lengths(rows[NEGATIVE_SCORES]), _lengths(_as_lists(texts, LISTS)))
        place = pc.index(pc.and_(rows[POSITIVE_SCORE].is_valid(), wrong), True).as_py()
        if place >= 0:
            expected = "expected a list of numbers, one for each negative"
            raise UserError(f"{file}, row {numbers[place]}: field neg_score: {expected}")


def _lengths(column: Any) -> Any:
    """Length of each list; -1 for null and for cells that are no lists."""
    lengths = pc.list_value_length(column) if is_list(column.type) else pa.nulls(len(column))
    return pc.fill_null(lengths.cast(pa.int64()), -1)


def _empty(column: Any) -> Any:
    return pc.fill_null(pc.equal(pc.binary_length(column), 0), True)
