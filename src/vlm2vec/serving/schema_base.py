"""What all request schemas share: strings, unknown fields, null values, and what to do with long inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictInt,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from vlm2vec.serving.truncation import MODEL_LIMIT, Side, Truncation


def _any_string(value: Any, usual: Callable[[Any], str]) -> str:
    """Accept any string: lone surrogates are refused for one input, not for the whole request."""
    return value if isinstance(value, str) else usual(value)


Text = Annotated[str, WrapValidator(_any_string)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]


class NullIsDefault(BaseModel):
    """An object of a request: null in an optional field means its default, since clients send it for unset fields."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Declare null for every optional field."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                outer = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outer}
        return schema


class Lenient(NullIsDefault):
    """A request: unknown fields are ignored, because clients send many."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Strict(NullIsDefault):
    """A part of an input: an unknown field is an error, because it would change the vector."""

    model_config = ConfigDict(extra="forbid")


ONLY = {
    "normalize": (True,),
    "normalized": (True,),
    "embed_dtype": ("float32",),
    "output_dtype": ("float", "float32"),
    "embedding_type": ("float", "float32"),
    "embedding_types": (["float"],),
    "prompt": (),
    "endianness": ("native", "little"),
    "pooling": (),
    "pooling_type": (),
    "late_chunking": (False,),
    "return_multivector": (False,),
    "add_special_tokens": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
"""Fields with which other servers change a vector, and the values for which it is the vector of this server."""


class VectorRequest(Lenient):
    """A request for vectors: a field that would change them elsewhere is refused, other unknown fields are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _no_other_vector(cls, values: Any) -> Any:
        for name, accepted in ONLY.items() if isinstance(values, dict) else ():
            value = None if name in cls.model_fields else values.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
                possible = " or ".join(json.dumps(one) for one in accepted) or "null"
                raise ValueError(f"{name}: this server supports {possible} only")
        return values


class Truncatable(VectorRequest):
    """A request that says what happens to inputs that are longer than the model reads."""

    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = Field(
        None,
        description="Cut inputs to this number of tokens; -1: to what the model reads. Default: refuse them (400).",
    )
    truncation_side: Side = Field("right", description="The side from which text is removed.")
    truncate: StrictBool = Field(False, description="The same as truncate_prompt_tokens: -1 (as in Jina).")

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _not_zero(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("expected 1 or more, or -1 for what the model reads")
        return value

    @property
    def truncation(self) -> Truncation:
        """The truncation that the request asks for."""
        default = MODEL_LIMIT if self.truncate else None
        return Truncation(self.truncate_prompt_tokens or default, self.truncation_side)
