"""Draw thread-value layouts, examine their machine code, and time them.

layout = make_layout(threads_per_group=4, rows_per_thread=2)
print(draw(layout))                      # in a terminal
draw(layout, "layout.html")              # or .svg, .png, .txt
examine(layout, "sm_100a").registers     # no GPU needed
sweep([layout])                          # on a GPU, time over that of the default
"""

from cute_quant.lab.draw import draw
from cute_quant.lab.examination import Examination, examine
from cute_quant.lab.layout import Layout, around_the_default, make_layout
from cute_quant.lab.sweep import Trial, sweep

__all__ = [
    "Examination",
    "Layout",
    "Trial",
    "around_the_default",
    "draw",
    "examine",
    "make_layout",
    "sweep",
]
