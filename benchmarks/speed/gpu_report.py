"""What gpu.sh measured, as tables in benchmarks/README.md: python benchmarks/speed/gpu_report.py OUT"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN, END, NONE = "<!-- gpu -->\n", "<!-- end of gpu -->", "not measured"
MODELS, RANKS = ("deberta-v3-base", "llama-1b"), (2, 8, 64)
STEPS = {
    "before the budget": "IncreLoRA between",
    "after the budget": "IncreLoRA after the budget",
    "paper's method, scoring": "IncreLoRA, paper while scoring",
    "no adapter": "no adapter (floor)",
}


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def steps(folder: Path, models: Sequence[str], ranks: Sequence[int]) -> str:
    """Ratios to PEFT LoRA of steps, of whole runs and of peak memory, by model and rank."""
    rows = []
    for model in models:
        for rank in ranks:
            path = folder / f"step-{model}-{rank}.json"
            found = json.loads(path.read_text()) if path.exists() else {"steps": {}, "whole_runs": {}, "memory": {}}
            ratios = [found["steps"].get(name, {}).get("ratio") for name in STEPS.values()]
            ours, reference = (found["memory"].get(name, {}).get("peak") for name in ("IncreLoRA", "PEFT LoRA"))
            memory = ours / reference if ours and reference else None
            numbers = [*ratios, found["whole_runs"].get("IncreLoRA"), memory]
            rows.append([model, rank, *(NONE if value is None else f"{value:.3f}" for value in numbers)])
    return table(["model", "r_avg", *STEPS, "whole run", "peak memory"], rows)


def text(folder: Path) -> str:
    """Everything that is there, and what is not."""
    files = sorted(folder.glob("step-*.json"))
    where = {json.loads(path.read_text())["where"] for path in files}
    models = list(dict.fromkeys([*MODELS, *(path.stem.split("-", 1)[1].rpartition("-")[0] for path in files)]))
    parts = [f"On {', '.join(where) or 'no device yet'}; ratios to PEFT LoRA in the same turn.", ""]
    parts.append(steps(folder, models, RANKS))
    if (path := folder / "scaling.json").exists():
        rows = json.loads(path.read_text())
        parts += ["", table(list(rows[0]), [list(row.values()) for row in rows])]
    resumed = "not measured"
    if (path := folder / "fp16-resume.json").exists():
        found = json.loads(path.read_text())
        resumed = f"{'the same bits' if found['same_bits'] else 'OTHER BITS'}, loss scale {found['loss_scale']}"
    return "\n".join([*parts, "", f"A run in fp16 with its GradScaler, resumed: {resumed}."])


def main() -> None:
    """Put the tables between the marks of the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what gpu.sh has written")
    parser.add_argument("--output", type=Path, default=README)
    settings = parser.parse_args()
    document = settings.output.read_text()
    if BEGIN not in document or END not in document:
        sys.exit(f"{settings.output} has no {BEGIN.strip()} and {END} for the tables. Add them where they belong.")
    before, after = document.split(BEGIN)[0], document.split(END)[1]
    settings.output.write_text(f"{before}{BEGIN}\n{text(settings.folder)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
