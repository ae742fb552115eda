"""Hashes that say whether two models hold the same weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all parameters and buffers, wherever they are."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of tensors, wherever they are."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # by bytes: numpy knows no bfloat16
    return digest.hexdigest()
