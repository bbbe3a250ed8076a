"""python -m cute_quant.laboratory, as python -m cute_quant layout."""

import sys

from cute_quant.laboratory.cli import main

sys.exit(main())
