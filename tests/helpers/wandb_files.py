"""Read the file of an offline run: records of protobuf in blocks of 32 KiB, as in a log of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32 * 1024, 7


def records(folder: Path, run_id: str) -> Iterator[Any]:
    """Yield the records of a run, of all jobs that recorded it, the earliest first."""
    from wandb.proto import wandb_internal_pb2

    files = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    for file in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        for data in _messages(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def history(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Yield the rows that were logged; nested keys as tuples."""
    for record in records(folder, run_id):
        if record.WhichOneof("record_type") == "history":
            yield {_key(item): json.loads(item.value_json) for item in record.history.item}


def config(folder: Path, run_id: str) -> dict[str, Any]:
    """Return the hyperparameters."""
    updates = [
        record.config.update for record in records(folder, run_id) if record.WhichOneof("record_type") == "config"
    ]
    return {item.key: json.loads(item.value_json) for update in updates for item in update}


def exit_code(folder: Path, run_id: str) -> int:
    """Return the exit code of the last job."""
    return [r.exit.exit_code for r in records(folder, run_id) if r.WhichOneof("record_type") == "exit"][-1]


def _key(item: Any) -> Any:
    keys = tuple(item.nested_key) or (item.key,)
    return keys if len(keys) > 1 else keys[0]


def _messages(content: bytes) -> Iterator[bytes]:
    position, data = _HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + _HEADER : position + _HEADER + size]
        position += _HEADER + size
        if kind in (1, 4):  # complete, or the last part
            yield data
            data = b""
