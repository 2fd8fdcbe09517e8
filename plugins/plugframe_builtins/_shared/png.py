"""PNG files without a library for images."""

from __future__ import annotations

import struct
import zlib

from torch import Tensor

from plugframe.checkpoint import as_bytes

#: The colour type of an image by its number of channels.
_COLOUR = {1: 0, 3: 2, 4: 6}


def encode_png(image: Tensor) -> bytes:
    """Return a PNG file of a uint8 image of shape ``(C, H, W)``, where C is 1, 3 or 4."""
    channels, height, width = image.shape
    last = image.permute(1, 2, 0).contiguous()
    pixels = bytes(as_bytes(last))  # a view, which does not keep its tensor
    stride = width * channels
    # Each row begins with its filter: 0, none.
    rows = b"".join(b"\0" + pixels[start : start + stride] for start in range(0, height * stride, stride))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
