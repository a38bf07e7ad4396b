"""Print constraints for pip that pin every dependency to the lowest version that pyproject.toml allows.

Extras stay free: what they need itself (trl) may be above these.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"]:
    found = re.match(r"([\w-]+)>=([\w.]+)", requirement)
    if found is None:
        sys.exit(f"pyproject.toml: {requirement!r} has no lower bound. Write one: NAME>=VERSION.")
    sys.stdout.write(f"{found[1]}=={found[2]}\n")
