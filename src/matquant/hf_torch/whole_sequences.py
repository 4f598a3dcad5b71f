"""Tell transformers that every row of a batch is one sequence.

Without an attention mask transformers looks at the positions for several sequences packed into one row. The look ends
in an ``if`` on a tensor, so that every forward pass waits for the device.
"""

import contextlib
from collections.abc import Iterator

from transformers import masking_utils

LOOK = "find_packed_sequence_indices"


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Within this context transformers takes each row of a batch as one sequence, and does not look."""
    look = getattr(masking_utils, LOOK, None)
    if look is None:  # another version, with nothing to leave out
        yield
        return
    setattr(masking_utils, LOOK, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, look)
