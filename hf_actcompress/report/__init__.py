"""Result records become tables, plots and one HTML file that needs no network.  Nothing here knows torch."""

from .page import build_page

__all__ = ["build_page"]
