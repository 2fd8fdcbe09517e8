"""Shared code of checkpoint plugins: a state as tensors and structure, checksums, atomic replacement of files.

`split` and `join` convert between a state tree and named tensors with a JSON-serialisable structure. `write_shards`
writes what each rank holds of a state. `pieces` and `as_bytes` return the bytes of tensors in chunks. A `StoredTensor`
is read on demand. `Manifest` holds the expected contents with checksums. `replacing` replaces a file atomically: a
crash leaves the old or the new one.
"""

from plugframe.checkpoint.atomic import (
    check_space,
    draft_name,
    exchange,
    is_being_written,
    make_folders,
    open_locked,
    remove_if_dead,
    remove_leftovers,
    replacing,
    sync_folder,
)
from plugframe.checkpoint.background_checksum import Checksums
from plugframe.checkpoint.contents import Contents
from plugframe.checkpoint.error_codes import Packed, first_error, pack_error, unpack_error
from plugframe.checkpoint.lock import FolderLock
from plugframe.checkpoint.manifest import (
    DIGEST_CHARS,
    MAX_MANIFEST_BYTES,
    SEGMENT_BYTES,
    Checksum,
    Entry,
    Manifest,
    checked_size,
    checked_sums,
    digest,
    info_of,
    is_digest,
    seal,
    unseal,
)
from plugframe.checkpoint.partition import Piece
from plugframe.checkpoint.pieces import pieces
from plugframe.checkpoint.sharded_save import Divided, divide_state, on_all_ranks, write_shards
from plugframe.checkpoint.stored import Source, StoredTensor, fill, materialize
from plugframe.checkpoint.subclass import FlattenedTensor
from plugframe.checkpoint.tree import dump_structure, join, parse_structure, split, split_stored
from plugframe.checkpoint.values import dtype_name, dtype_of
from plugframe.errors import names_text, printable, printable_cause
from plugframe.utils.shards import is_shard, local_of, view_locally
from plugframe.utils.tensor_bytes import as_bytes

__all__ = [
    "DIGEST_CHARS",
    "MAX_MANIFEST_BYTES",
    "SEGMENT_BYTES",
    "Checksum",
    "Checksums",
    "Contents",
    "Divided",
    "Entry",
    "FlattenedTensor",
    "FolderLock",
    "Manifest",
    "Packed",
    "Piece",
    "Source",
    "StoredTensor",
    "as_bytes",
    "check_space",
    "checked_size",
    "checked_sums",
    "digest",
    "divide_state",
    "draft_name",
    "dtype_name",
    "dtype_of",
    "dump_structure",
    "exchange",
    "fill",
    "first_error",
    "info_of",
    "is_being_written",
    "is_digest",
    "is_shard",
    "join",
    "local_of",
    "make_folders",
    "materialize",
    "names_text",
    "on_all_ranks",
    "open_locked",
    "pack_error",
    "parse_structure",
    "pieces",
    "printable",
    "printable_cause",
    "remove_if_dead",
    "remove_leftovers",
    "replacing",
    "seal",
    "split",
    "split_stored",
    "sync_folder",
    "unpack_error",
    "unseal",
    "view_locally",
    "write_shards",
]
