"""Result records become tables, figures and one HTML file that needs no network.

Nothing here knows torch, nor another folder of this package.
"""

from .page import build_page
from .records import load_records
from .tables import accuracy_table

__all__ = ["accuracy_table", "build_page", "load_records"]
