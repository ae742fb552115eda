"""What a service allows and how it is protected."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ServiceSettings(BaseModel):
    """Limits of a service; what goes beyond one is refused with a sentence and its status code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # clients must send it as ``Authorization: Bearer TOKEN``; None asks for none
    token: str | None = Field(default=None, min_length=1)
    max_bytes: int = Field(default=32 * 2**20, ge=1024)  # of a request's body (413)
    max_pixels: int = Field(default=40_000_000, ge=1)  # of a picture (422)
    max_classes: int = Field(default=1000, ge=1)  # of a request (422)
    max_pictures: int = Field(default=32, ge=1)  # of a batch (422)
    # a request may take, its upload included (408 while it uploads, 504 later)
    seconds: float = Field(default=120.0, gt=0)
    queue: int = Field(default=32, ge=1)  # requests that wait at most; more are answered 503 with Retry-After
    batch: int = Field(default=8, ge=1)  # pictures in one forward pass at most
    classes: str | None = None  # of annotation tools that send no words, such as CVAT; None: there are none for them
    files: Path | None = None  # below which Label Studio's local files lie; None: pictures come in the request alone
