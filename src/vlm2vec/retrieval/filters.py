"""Translates SQL conditions on metadata to Qdrant's filters, so that both stores share one filter language.

A condition without an exact counterpart is an error, never approximated. As in SQL, a comparison with an absent value
is never true, and neither is its negation.
"""

from __future__ import annotations

from typing import Any

from vlm2vec.errors import UserError, shown

SUPPORTED = "=, <>, <, <=, >, >=, IN, BETWEEN, IS NULL, AND, OR, NOT on a field and constants"


def to_qdrant(where: str) -> tuple[Any, set[str]]:
    """A Qdrant `Filter` equivalent to a SQL condition, and the fields in it.

    Raises:
        UserError: for a syntax error, or an operator without a counterpart.
    """
    try:
        from sqlglot import condition
        from sqlglot.errors import ParseError, TokenError
    except ImportError as error:
        raise UserError("filters on Qdrant need sqlglot: pip install 'vlm2vec[qdrant]'") from error
    from qdrant_client import models

    try:
        tree = condition(where)
    except (ParseError, TokenError) as error:
        raise UserError(
            f"filter {shown(where)}: not a SQL condition; expected, for example: width > 600 AND kind = 'page'"
        ) from error
    translator = _Translator(where)
    found = translator.translate(tree, negated=False)
    return (found if isinstance(found, models.Filter) else models.Filter(must=[found])), translator.fields


def absent_field(field: str) -> Any:
    """Qdrant's condition that a row does not have a field."""
    from qdrant_client import models

    return models.IsEmptyCondition(is_empty=models.PayloadField(key=field))


class _Translator:
    """Walks the condition; a NOT is pushed down to the comparisons, where absent values are excluded."""

    def __init__(self, where: str) -> None:
        from qdrant_client import models

        self.where = where
        self.fields: set[str] = set()
        self.models = models

    def translate(self, node: Any, negated: bool) -> Any:
        from sqlglot import exp

        if isinstance(node, exp.Paren):
            return self.translate(node.this, negated)
        if isinstance(node, exp.Not):
            return self.translate(node.this, not negated)
        if isinstance(node, exp.And | exp.Or):
            both = [self.translate(node.left, negated), self.translate(node.right, negated)]
            every = isinstance(node, exp.And) != negated
            return self.models.Filter(must=both) if every else self.models.Filter(should=both)
        if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
            empty = self._empty(self._field(node.this))
            return self.models.Filter(must_not=[empty]) if negated else empty
        field, leaf, inverted = self._comparison(node)
        if negated != inverted:
            return self.models.Filter(must_not=[leaf, self._empty(field)])
        return leaf

    def _comparison(self, node: Any) -> tuple[str, Any, bool]:
        """A comparison's field and condition, and whether the condition is its opposite."""
        from sqlglot import exp

        if isinstance(node, exp.Column):
            field = self._field(node)
            return field, self._equals(field, True), False
        if isinstance(node, exp.EQ | exp.NEQ):
            field, value, _ = self._sides(node)
            return field, self._equals(field, value), isinstance(node, exp.NEQ)
        if isinstance(node, exp.Between):
            field = self._field(node.this)
            low, high = self._number(node.args["low"]), self._number(node.args["high"])
            return field, self._range(field, gte=low, lte=high), False
        if isinstance(node, exp.In) and node.expressions:
            field = self._field(node.this)
            any_of = [self._equals(field, self._value(one)) for one in node.expressions]
            return field, self.models.Filter(should=any_of), False
        bounds = {exp.GT: "gt", exp.GTE: "gte", exp.LT: "lt", exp.LTE: "lte"}
        if type(node) in bounds:
            field, value, swapped = self._sides(node)
            if isinstance(value, bool | str):
                raise self._refusal(node)
            bound = bounds[type(node)]
            bound = {"g": "l", "l": "g"}[bound[0]] + bound[1:] if swapped else bound
            return field, self._range(field, **{bound: value}), False
        raise self._refusal(node)

    def _sides(self, node: Any) -> tuple[str, Any, bool]:
        """Field and constant of a comparison, and whether the constant stands first."""
        from sqlglot import exp

        swapped = isinstance(node.right, exp.Column)
        field, value = (node.right, node.left) if swapped else (node.left, node.right)
        return self._field(field), self._value(value), swapped

    def _field(self, node: Any) -> str:
        from sqlglot import exp

        if not isinstance(node, exp.Column) or node.table:
            raise self._refusal(node)
        self.fields.add(str(node.name))
        return str(node.name)

    def _value(self, node: Any) -> bool | float | str:
        from sqlglot import exp

        if isinstance(node, exp.Boolean):
            return bool(node.this)
        if isinstance(node, exp.Neg):
            return -self._number(node.this)
        if isinstance(node, exp.Literal):
            return str(node.this) if node.is_string else float(node.this)
        raise self._refusal(node)

    def _number(self, node: Any) -> float:
        value = self._value(node)
        if isinstance(value, bool | str):
            raise self._refusal(node)
        return value

    def _equals(self, field: str, value: bool | float | str) -> Any:
        if isinstance(value, bool | str):
            return self.models.FieldCondition(key=field, match=self.models.MatchValue(value=value))
        return self._range(field, gte=value, lte=value)

    def _range(self, field: str, **bounds: float) -> Any:
        return self.models.FieldCondition(key=field, range=self.models.Range(**bounds))

    def _empty(self, field: str) -> Any:
        return absent_field(field)

    def _refusal(self, node: Any) -> UserError:
        return UserError(
            f"filter {shown(self.where)}: {node.sql()} has no counterpart in Qdrant, which supports {SUPPORTED}"
        )
