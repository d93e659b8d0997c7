"""Result records become one HTML file that needs no network: tables that sort, plots that tell their values.

`page.py` puts it together, `charts.py` draws SVG, page.css and page.js are written into the file.  Like `report.py` it
knows no torch, and no matplotlib either.
"""

from .page import build_page

__all__ = ["build_page"]
