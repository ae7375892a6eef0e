"""What a forward that looks at data did not read this time, and may the next time: the experts of a mixture, say.

    blocks.3         enter router exit   enter experts.1 exit      experts 0, 2 and 3 were not asked
    read here, too   |----------- all of experts.* -----------|    while their nearest ancestor runs that does

Only inside of blocks: elsewhere it would have to stay for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from taskgraph_offload.nouns.names import above
from taskgraph_offload.nouns.trace import Weight

from .blocks import follow
from .recorder import Segment


def add_unseen(segments: Sequence[Segment], blocks: Collection[str], weights: Iterable[Weight]) -> None:
    """Let segments read the weights that nobody has read but that belong to a module inside of a block that runs."""
    stacks, stack = list[tuple[str, ...]](), [""]
    for segment in segments:
        follow(stack, segment.boundary)
        stacks.append(tuple(stack))
    running = {module for stack in stacks for module in stack}
    read = {name for segment in segments for name in (*segment.reads, *segment.writes)}
    for weight in weights:
        owner = None if weight.name in read else _owner(weight, running, blocks)
        for segment, modules in zip(segments, stacks, strict=True):
            if owner in modules:
                segment.reads[weight.name] = None


def _owner(weight: Weight, running: Collection[str], blocks: Collection[str]) -> str | None:
    """The nearest module above a weight that ran, if it is a block or inside of one."""
    for name in (weight.name, *weight.aliases):
        modules = list(above(name))
        nearest = next((place for place, module in enumerate(modules) if module in running), None)
        if nearest is not None and any(module in blocks for module in modules[nearest:]):
            return modules[nearest]
    return None
