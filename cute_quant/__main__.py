"""``python -m cute_quant``."""

import sys

from cute_quant.cli.entry.cute_quant_command import main

if __name__ == "__main__":
    sys.exit(main())
