"""What Python raises where an operator refuses an argument: the stable ABI throws RuntimeError for everything."""

from __future__ import annotations

import re

# What torch's dispatcher says of an option that does not fit the schema.
_OF_ANOTHER_TYPE = re.compile(
    r"lossmeta::\w+\(\) Expected a value of type '(.+?)' for argument '(.+?)' but instead found type '(.+?)'"
)


def refusal(name: str, error: RuntimeError) -> Exception | None:
    """The error as ValueError or TypeError where it refuses an argument; ``None`` for any other failure.

    Every call from Python passes here. A graph of ``torch.compile`` calls the operator itself: there it stays a
    RuntimeError.
    """
    text = str(error)
    if text.startswith(f"{name}: "):
        return None if text.startswith(f"{name}: CUDA ") else ValueError(text)
    if (found := _OF_ANOTHER_TYPE.match(text)) is None:
        return None
    expected, argument, got = found.groups()
    if expected == got:  # an integer
        return ValueError(f"{name}: {argument} must fit into 64 bits")
    return TypeError(f"{name}: {argument} must be of type {expected}, got {got}")
