"""Recognizing errors that mean "out of memory"."""

from typing import Final

import torch

_OutOfMemory: Final = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
_OTHER_WORDS_FOR_IT: Final = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory has run out, on the host or on a device."""
    if isinstance(error, _OutOfMemory | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OTHER_WORDS_FOR_IT)
