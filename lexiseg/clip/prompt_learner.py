"""Learnt prompts for the text tower (CoOp): vectors around the class name that are trained instead of written."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import CLIP, digest_of
from lexiseg.errors import LexisegError
from lexiseg.strict import StrictModel

SEMANTIC_TASK = "semantic segmentation."
"""FreeSeg's name of our task; the full stop is a token of it."""

_CHUNK = 256


class PromptOptions(StrictModel):
    """Learned words around the class names, of a system with a `PromptLearner` and proposals.

    Attributes:
        prefix: vectors in front of a name.
        suffix: vectors behind it.
        task: vectors behind the name of the task; 0 leaves the task out.
        proposals: False leaves the generator's own scores to the templates: only CLIP's words are learned prompts.
        frozen: keep the prompts as they are while the proposals are trained.
    """

    prefix: Annotated[int, Field(ge=0)] = 16
    suffix: Annotated[int, Field(ge=0)] = 0
    task: Annotated[int, Field(ge=0)] = 0
    proposals: bool = True
    frozen: bool = False


class PromptLearner(nn.Module):
    """Prompts of the form ``[start][prefix ...] name [suffix ...][.][end]``, shared by all classes.

    DeOP and ZSSeg learn a prefix of 16 vectors; FreeSeg puts its task in front of the start mark: ``[task name][task
    prompt ...][start][prefix ...] name ...``. The start mark, the full stop and the end mark are CLIP's own tokens, and
    the feature is read at the end mark.

    Args:
        width: width of the text tower's tokens, `CLIP.text_width`.
        prefix: number of vectors in front of the name.
        suffix: number of vectors behind it.
        task: number of vectors behind the task's name; 0 means no task part at all. Nothing to learn is a
            `LexisegError`.
    """

    def __init__(self, width: int, prefix: int = 16, suffix: int = 0, task: int = 0) -> None:
        super().__init__()
        if min(prefix, suffix, task) < 0 or not prefix + suffix + task:
            raise LexisegError(
                f"A learned prompt of {prefix} + {suffix} vectors and {task} for the task has nothing to learn; "
                "use for example 16 vectors before the name."
            )
        self.prefix_prompt = nn.Parameter(torch.randn(prefix, width) * 0.02) if prefix else None
        self.suffix_prompt = nn.Parameter(torch.randn(suffix, width) * 0.02) if suffix else None
        self.task_prompt = nn.Parameter(torch.empty(task, width)) if task else None
        if self.task_prompt is not None:
            nn.init.kaiming_normal_(self.task_prompt)

    def forward(self, clip: CLIP, names: Sequence[str], task: str | None = None, *, chunk: int = _CHUNK) -> Tensor:
        """Encode C class names with the prompts, with gradients for them: (C, D) unit vectors.

        Args:
            clip: the text tower.
            names: any number of tokens each.
            task: name of the task, only for prompts with a task part; None means `SEMANTIC_TASK`.
            chunk: number of names encoded at once.

        Raises LexisegError if a name is too long, a task is given to prompts without one, or the text tower is not
        CLIP's.
        """
        parts = []
        for start in range(0, len(names), chunk):
            embeddings, end = self.assemble(clip, names[start : start + chunk], task)
            parts.append(F.normalize(clip.encode_embeddings(embeddings, end).float(), dim=-1))
        return torch.cat(parts) if parts else torch.zeros(0, clip.embed_dim, device=clip.device)

    def assemble(
        self, clip: CLIP, names: Sequence[str], task: str | None = None, *, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put token embeddings and prompts in a row; arguments and errors are those of `forward`.

        Returns (C, L, W) embeddings without positions, padded with those of token 0, and the end marks' positions (C,).
        L is ``length``, or just long enough (the authors' code has the text tower's context length).
        """
        if task is not None and self.task_prompt is None:
            raise LexisegError(f"This learned prompt has no task part; ask without '{task}'.")
        device = clip.device
        start, stop, end_mark = clip.mark_tokens()
        head = self._head(clip, start, task)
        num_suffix = 0 if self.suffix_prompt is None else len(self.suffix_prompt)
        name_ids = [clip.name_tokens(name) for name in names]
        name_lengths = torch.tensor([len(ids) for ids in name_ids], device=device)
        end = len(head) + name_lengths + num_suffix + 1
        longest = int(end.argmax())
        if (needed := int(end[longest]) + 1) > clip.context_length:
            raise LexisegError(
                f"'{names[longest][:80]}' needs {needed} tokens with its learned prompt and the text tower takes "
                f"{clip.context_length}; shorten the class name."
            )
        length = int(end.max()) + 1 if length is None else length
        tail_length = length - len(head)
        rows = [[*ids, *[0] * num_suffix, stop, end_mark] for ids in name_ids]
        tail_ids = torch.tensor([row + [0] * (tail_length - len(row)) for row in rows], device=device)
        tail = clip.embed_tokens(tail_ids)
        if self.suffix_prompt is not None:
            place = torch.arange(tail_length, device=device) - name_lengths[:, None]
            inside = (place >= 0) & (place < num_suffix)
            suffix = self.suffix_prompt[place.clamp(0, num_suffix - 1)].to(tail.dtype)
            tail = torch.where(inside[..., None], suffix, tail)
        return torch.cat([head.to(tail.dtype).expand(len(names), -1, -1), tail], dim=1), end

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the prompts: what text features made with them are remembered by."""
        return digest_of(sorted(self.state_dict().items()))

    def _head(self, clip: CLIP, start: int, task: str | None) -> Tensor:
        """What stands in front of the name, the same for every class: (L, W)."""
        parts = []
        if self.task_prompt is not None:
            task_ids = clip.name_tokens(SEMANTIC_TASK if task is None else task)
            parts += [clip.embed_tokens(torch.tensor(task_ids, device=clip.device)), self.task_prompt]
        parts.append(clip.embed_tokens(torch.tensor([start], device=clip.device)))
        if self.prefix_prompt is not None:
            parts.append(self.prefix_prompt)
        return torch.cat(parts)
