"""Result records become tables, figures and one HTML file that needs no network.

Nothing here knows torch, nor another folder of this package.
"""

from .page import build_page
from .tables import accuracy_table, load_records

__all__ = ["accuracy_table", "build_page", "load_records"]
