"""Requests: what they may contain, and how they are read."""

import base64
import binascii
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, WithJsonSchema, model_validator
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from lexiseg.app.results import Output

# Eight by eight grey pixels, so that examples can be tried as they are.
EXAMPLE_PICTURE = "data:image/gif;base64,R0lGODdhCAAIAIEAAFpaWgAAAAAAAAAAACwAAAAACAAIAAAIDwABCBxIsKDBgwgTKkwYEAA7"
_NO_FIELDS = ("body", "str", "constrained-str", "list[str]")  # in pydantic's places: the members of a union
_EXAMPLE = {"classes": "giraffe; tree, bush; sky", "output": "rle"}


class Body(BaseModel):
    """A request's body; OpenAPI describes a field by the text below it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ExemplarRequest(Body):
    """A picture as a class."""

    name: str
    """Of the class; one of that name among the words gets the picture beside its words."""
    box: list[int] = Field(min_length=4, max_length=4)
    """Left, top, right and bottom of the thing in pixels."""
    image: str | None = None
    """The picture that shows it, in base64; None is the first picture that is asked about."""


# OpenAPI knows no definitions inside a body's schema, so the exemplar's stands where it is used. Forms hold it as text.
Exemplars = Annotated[
    list[Annotated[ExemplarRequest, WithJsonSchema(ExemplarRequest.model_json_schema())]],
    BeforeValidator(lambda value: from_json(value) if isinstance(value, str) else value),
]


class ClassesRequest(Body):
    """Classes to check before a picture is sent."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"classes": "giraffe; tree, bush; sky"}]})

    classes: str | list[str]
    """A semicolon or a line break separates classes, a comma joins synonyms; or a list of such texts."""
    model: str | None = None
    """One of those that ``GET /v1/models`` lists; None is the first."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        """Leave out options that are empty: forms send those that nobody has filled in."""
        if not isinstance(values, dict):
            return values
        options = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in values.items() if value != "" or name not in options}


class Question(ClassesRequest):
    """What a client asks of a picture."""

    exemplars: Exemplars = []
    """Pictures as classes, behind those of words."""
    background: Annotated[str, Field(max_length=1000)] | StrictFloat | None = None
    """Either "none", a class name, or a score below which pixels are ignored."""
    window: int | None = Field(default=None, ge=0)
    """Side of the sliding window in pixels; 0 runs whole pictures; None is the model's own way."""
    refine: str | None = None
    """How masks are cleaned up; None is the model's own way."""
    output: Output = "rle"
    """Form of the masks; see `lexiseg.app.results.describe_result`."""


class SegmentRequest(Question):
    """A question and its picture."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": EXAMPLE_PICTURE, **_EXAMPLE}]})

    image: str
    """The picture's file in base64, with or without a ``data:`` prefix. Addresses are not fetched."""


class BatchRequest(Question):
    """A question and its pictures."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [EXAMPLE_PICTURE], **_EXAMPLE}]})

    images: list[str] = Field(min_length=1)
    """Each as in a request of one picture."""


def decode_picture(text: str, what: str = "The picture") -> bytes:
    """The bytes of a picture in base64, which messages call ``what``. Raises HTTPException if it is not one."""
    if text.lstrip()[:8].lower().startswith(("http:", "https:", "ftp:", "file:", "s3:", "gs:")):
        raise HTTPException(422, f"{what} is a URL, and this service does not fetch URLs; send it in base64.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(422, f"{what} is not valid base64; encode the bytes of its file.") from error


async def _form_question(request: Request) -> tuple[Question, list[bytes]]:
    """A multipart request: fields of `Question`, and one or several files."""
    pictures: list[bytes] = []
    fields: dict[str, Any] = {}
    async with request.form(max_part_size=sys.maxsize) as form:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                pictures.append(await value.read())
            elif key in fields:
                raise HTTPException(422, f"The field '{key[:40]}' is given twice; send it once.")
            else:
                fields[key] = value
    if not pictures:
        raise HTTPException(422, "There is no picture; send one as the file 'image'.")
    return Question.model_validate(fields), pictures


async def read_question(request: Request, shape: type[BaseModel]) -> tuple[Any, list[bytes]]:
    """The question of a JSON or multipart request, and its pictures."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await _form_question(request)
    content = shape.model_validate_json(await request.body())
    if isinstance(content, BatchRequest) and len(content.images) > 1:
        return content, [decode_picture(text, f"Picture {place}") for place, text in enumerate(content.images, 1)]
    (image,) = content.images if isinstance(content, BatchRequest) else (content.image,)  # type: ignore[attr-defined]
    return content, [decode_picture(image)]


def first_complaint(errors: Sequence[Any]) -> str:
    """Pydantic's first complaint as a sentence."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in _NO_FIELDS)
    if not place or first["type"] == "json_invalid":  # whose place is a character of the body
        why = first.get("ctx", {}).get("error", "it has no fields")
        return f"The body is not a JSON object ({why[:200]}); send one as application/json, as /docs shows."
    return f"'{place[:80]}': {first['msg'][:200]}; see /docs for what the service takes."


def describe_body(shape: type[BaseModel], *, file: str) -> dict[str, Any]:
    """OpenAPI's description of a request that is JSON or multipart."""
    fields = {name: {"type": "string"} for name in Question.model_fields}
    many: dict[str, Any] = {"type": "string", "format": "binary"}
    if file == "images":
        many = {"type": "array", "items": many}
    form = {"type": "object", "required": [file, "classes"], "properties": {file: many, **fields}}
    schema = shape.model_json_schema()
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
        }
    }
