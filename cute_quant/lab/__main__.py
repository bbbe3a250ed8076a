"""python -m cute_quant.lab, as python -m cute_quant layout."""

import sys

from cute_quant.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["layout", *sys.argv[1:]]))
