"""Requests: what they may contain, and how they are read."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, WithJsonSchema
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from lexiseg.app.results import Output

# Eight by eight grey pixels, so that examples can be tried as they are.
EXAMPLE_PICTURE = "data:image/gif;base64,R0lGODdhCAAIAIEAAFpaWgAAAAAAAAAAACwAAAAACAAIAAAIDwABCBxIsKDBgwgTKkwYEAA7"
_EXAMPLE = {"classes": "giraffe; tree, bush; sky", "output": "rle"}


def example(**fields: Any) -> ConfigDict:
    """Settings of a request with an example of it."""
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [fields]})


class ExemplarRequest(BaseModel):
    """A picture as a class.

    Attributes:
        name: of the class; one of that name among the words gets the picture beside its words.
        box: left, top, right and bottom of the thing in pixels.
        image: the picture that shows it, in base64; None is the first picture that is asked about.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    box: list[int] = Field(min_length=4, max_length=4)
    image: str | None = None


# OpenAPI knows no definitions inside a body's schema, so the exemplar's stands where it is used. Forms hold it as text.
Exemplars = Annotated[
    list[Annotated[ExemplarRequest, WithJsonSchema(ExemplarRequest.model_json_schema())]],
    BeforeValidator(lambda value: from_json(value) if isinstance(value, str) else value),
]


class Question(BaseModel):
    """What a client asks of a picture.

    Attributes:
        classes: a semicolon or a line break separates classes, a comma joins synonyms; or a list of such texts.
        exemplars: pictures as classes, behind those of words.
        background: "none", a class name, or a score below which pixels are ignored.
        window: side of the sliding window in pixels; 0 runs whole pictures; None is the model's own way.
        refine: how masks are cleaned up; None is the model's own way.
        output: form of the masks; see `lexiseg.app.results.describe_result`.
        model: one of those that ``GET /v1/models`` lists; None is the first.
    """

    model_config = ConfigDict(extra="forbid")

    classes: str | list[str]
    exemplars: Exemplars = []
    background: str | StrictFloat | None = None
    window: int | None = Field(default=None, ge=0)
    refine: str | None = None
    output: Output = "rle"
    model: str | None = None


class SegmentRequest(Question):
    """A question and its picture.

    Attributes:
        image: the picture's file in base64, with or without a ``data:`` prefix. Addresses are not fetched.
    """

    model_config = example(image=EXAMPLE_PICTURE, **_EXAMPLE)

    image: str


class BatchRequest(Question):
    """A question and its pictures.

    Attributes:
        images: as in `SegmentRequest`.
    """

    model_config = example(images=[EXAMPLE_PICTURE], **_EXAMPLE)

    images: list[str] = Field(min_length=1)


class ClassesRequest(BaseModel):
    """Classes to check before a picture is sent.

    Attributes:
        classes: as in `Question`.
        model: as in `Question`.
    """

    model_config = example(classes="giraffe; tree, bush; sky")

    classes: str | list[str]
    model: str | None = None


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
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "str", "list[str]")) or "the request"
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
