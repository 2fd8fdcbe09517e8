"""What every checkpoint plugin shares: a state as tensors plus structure, checksums, atomic replacement.

`split` and `join` turn a state tree into named tensors and a JSON-able structure and back, `pieces` and
`as_bytes` give the bytes of tensors without copying them whole, `Manifest` says what must be found again, and
`replacing` puts a new file in place of an old one so that a crash at any instant leaves one of the two.
"""

from plugframe.checkpoint.atomic import remove_leftovers, replacing
from plugframe.checkpoint.buffers import as_bytes, pieces
from plugframe.checkpoint.manifest import SEGMENT_BYTES, Checksum, Entry, Manifest
from plugframe.checkpoint.tree import dump_structure, join, parse_structure, split
from plugframe.checkpoint.values import dtype_name

__all__ = [
    "SEGMENT_BYTES",
    "Checksum",
    "Entry",
    "Manifest",
    "as_bytes",
    "dtype_name",
    "dump_structure",
    "join",
    "parse_structure",
    "pieces",
    "remove_leftovers",
    "replacing",
    "split",
]
