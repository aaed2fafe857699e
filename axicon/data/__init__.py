"""Reading text and records from the files and data sets people have."""

from axicon.data.records import read_records
from axicon.data.text import join_rows, read_rows

__all__ = ["join_rows", "read_records", "read_rows"]
