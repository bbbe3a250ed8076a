"""One page that shows a layout and answers who holds what: no network, no files beside it."""

from __future__ import annotations

import html
import json
import string
from importlib import resources

from cute_quant.lab import assignment, pictures
from cute_quant.lab.drawing import style_sheet
from cute_quant.lab.layout import Layout
from cute_quant.lab.machine_code import GPUS


def page(layout: Layout, mn: int | None = None, k: int | None = None, command: str = "") -> str:
    """HTML.

    Args:
        mn, k: shape of the input whose scales are drawn, as `pictures.pictures` takes it.
        command: that made the page, for who wants another.
    """
    mn = pictures.example_rows(layout) if mn is None else mn
    k = pictures.example_columns(layout) if k is None else k
    drawings = pictures.pictures(layout, mn, k)
    tile, walk, scales = (drawing.svg(alone=False) for drawing in drawings)
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        title=html.escape(f"Layout: {layout.name}"),
        summary=html.escape(pictures.summary(layout)),
        style=style_sheet(":root"),
        command=html.escape(command),
        tile=tile,
        walk=walk,
        scales=scales,
        # "</script>" would end the data.
        data=json.dumps(_data(layout, mn, k), separators=(",", ":")).replace("<", "\\u003c"),
    )


def _data(layout: Layout, mn: int, k: int) -> dict[str, object]:
    threads = assignment.threads(layout)
    scales = assignment.scales(layout, mn, k)
    requests = {arch: assignment.loads(layout, arch) for arch in GPUS}
    return {
        "threads": [
            {
                "number": t.number,
                "warp": t.warp,
                "lane": t.lane,
                "segments": [(s.row, s.column, s.values) for s in t.segments],
                "partners": t.partners,
                "groups": t.groups,
                "writes": t.writes,
            }
            for t in threads
        ],
        "scales": {
            f"{s.row},{s.group}": {"offset": s.offset, "unit": s.unit, "padding": s.padding}
            for s in scales
        },
        "loads": [
            (arch, len(found), found[0].nbytes // len(found[0].ranges))
            for arch, found in requests.items()
        ],
        "rows": layout.tile.rows,
        "columns": layout.cta_columns,
        "itemsize": layout.dtype.itemsize,
        "packed": layout.fmt.packed,
    }
