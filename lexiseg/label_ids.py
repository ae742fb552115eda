"""The label of pixels that have no class: one rule for data, losses, metrics and label files."""

IGNORE_INDEX = 255
"""Label id of pixels that have no class: void, border, padding, and in training the unseen classes."""

WIDE_IGNORE_INDEX = 65535
"""The same where there are more than 255 classes, so that 255 is the id of one."""


def ignore_index(num_classes: int) -> int:
    """The label of pixels without a class: 255, and 65535 or 2**31 - 1 where that could be the id of a class."""
    return next(index for index in (IGNORE_INDEX, WIDE_IGNORE_INDEX, 2**31 - 1) if num_classes <= index)
