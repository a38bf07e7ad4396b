"""``python -m increlora_hf``: the program `increlora`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
