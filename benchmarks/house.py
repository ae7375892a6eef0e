"""How much code one forward and one `plan()` pass through: Python calls, functions, files and changes of file.

python benchmarks/house.py [FOLDER]      (FOLDER: another checkout of this project, to compare with)

It counts only this project's own code, in the caller's thread. Every call of a function counts, and every time that a
generator resumes. A change of file is a call in another file than that of the call before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
FOLDERS = tuple(f"{ROOT / folder}/" for folder in ("taskgraph_offload", "planner", "viz"))
sys.path.insert(0, str(ROOT))


class Walk:
    """The calls that one function makes in this project's code."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.calls: list[tuple[str, str, int]] = []
        sys.setprofile(self._note)
        try:
            function()
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDERS):
            self.calls.append((code.co_filename, code.co_name, code.co_firstlineno))

    def row(self, name: str) -> str:
        """Calls, functions, files, and changes of file."""
        files = [file for file, _, _ in self.calls]
        changes = sum(one != other for one, other in pairwise(files))
        return f"{name:<22}{len(files):>9}{len(set(self.calls)):>11}{len(set(files)):>7}{changes:>14}"


def main() -> None:
    """Print the table for this checkout, or for another one."""
    import torch

    import taskgraph_offload as tgo

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
    x = torch.randn(4, 256)
    planner = tgo.Planner(model, "50%", inputs=(x,), machine="rtx4090")
    plans: list[Any] = []
    planning = Walk(lambda: plans.append(planner.plan()))
    with torch.no_grad(), tgo.Executor(model, plans[0], device="cpu"):
        for _ in range(3):
            model(x)
        forward = Walk(lambda: model(x))
    print(f"{ROOT}\n{'':<22}{'calls':>9}{'functions':>11}{'files':>7}{'file changes':>14}")
    print(forward.row("one forward"))
    print(planning.row("one plan()"))


if __name__ == "__main__":
    main()
