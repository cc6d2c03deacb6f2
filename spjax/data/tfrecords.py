"""TFRecord format: for each record the length (8 bytes), its CRC, the payload, its CRC; little-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from etils import epath


class RecordError(ValueError):
    """Unit records or their sources are damaged or inconsistent. The message names file, record and suggested fix."""


def read_frames(content: bytes, path: epath.PathLike, check_crc: bool) -> Iterator[bytes]:
    """Yield the payloads of a TFRecord file.

    Args:
      content: bytes of the file.
      path: file name for messages.
      check_crc: False if the file's hash was already verified.

    Raises:
      RecordError: the file is truncated or damaged; names the file and the record.
    """
    start = number = 0
    while start < len(content):
        head = content[start : start + 12]
        size = struct.unpack_from("<Q", head)[0] if len(head) == 12 else 0
        end = start + 12 + size
        if check_crc and len(head) == 12 and masked_crc(head[:8]) != struct.unpack_from("<I", head, 8)[0]:
            raise RecordError(f"{path}, record {number} is damaged (CRC of its length): make the records again")
        if len(head) < 12 or end + 4 > len(content):
            raise RecordError(f"{path} ends inside record {number}: it is truncated, make the records again")
        payload = content[start + 12 : end]
        if check_crc and masked_crc(payload) != struct.unpack_from("<I", content, end)[0]:
            raise RecordError(f"{path}, record {number} is damaged (CRC of its bytes): make the records again")
        yield payload
        start, number = end + 4, number + 1


def frame(payload: bytes) -> bytes:
    """Encode a payload as a record of the file."""
    head = struct.pack("<Q", len(payload))
    return head + struct.pack("<I", masked_crc(head)) + payload + struct.pack("<I", masked_crc(payload))


def _crc_row(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli polynomial, reflected
    return byte


_CRC_ROWS = tuple(_crc_row(byte) for byte in range(256))


def masked_crc(content: bytes) -> int:
    """Masked CRC-32C of the TFRecord format."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC_ROWS[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
