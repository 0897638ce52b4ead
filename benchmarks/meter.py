"""The most bytes that torch's CPU allocator had given out at once: counted event by event, the same in every run."""

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak(function: Callable[[], object]) -> int:
    """Bytes at the highest moment of a call, above those that were out when it began."""
    with profile(profile_memory=True) as profiler:
        function()
    found = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return int(torch.tensor([0, *(event.nbytes() for event in found)]).cumsum(0).max())
