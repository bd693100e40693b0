"""The bytes of a file: a header, then segments, each with its length and checksum.

docs/codec.md has the table. Every byte is covered by a CRC-32, and that of a segment goes on from
the one before it, so that segments cannot change places or come from another file.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

MAGIC = b"LOOP"
VERSION = 1
_KINDS = {  # first bytes of what is taken for a file by mistake
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"RIFF": "a WebP picture",
    b"PK": "a zip file, as checkpoints are",
}
_FIXED = len(MAGIC) + 2 + 4 + 4  # bytes before the first number of variable length
_MOST_BYTES = 5  # of a number, which is then below 2**35


class Header(NamedTuple):
    """Sizes, mode and fingerprints of a file.

    Attributes:
        mode: Byte of the entropy model.
        tokenizer: 4 bytes of the tokenizer's fingerprint.
        entropy: 4 bytes, the entropy model's.
        size: (H, W) of the picture in pixels.
        segments: Number of segments of the whole file.
    """

    mode: int
    tokenizer: bytes
    entropy: bytes
    size: tuple[int, int]
    segments: int


def encode_number(value: int) -> bytes:
    """Encode a number as LEB128: seven bits a byte, the low ones first."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def decode_number(data: bytes | memoryview, start: int) -> tuple[int, int]:
    """Decode a number of `encode_number`; return it and the place after it.

    Raises:
        ValueError: The data ends within it, or it has needless or too many bytes.
    """
    value = 0
    for place, byte in enumerate(data[start : start + _MOST_BYTES]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            if place and not byte:
                break
            return value, start + place + 1
    raise ValueError("a number is damaged or cut off")


def encode_file(header: Header, segments: Sequence[bytes]) -> bytes:
    """Encode a header and its segments as the bytes of a file."""
    numbers = b"".join(map(encode_number, (*header.size, header.segments)))
    head = MAGIC + bytes([VERSION, header.mode]) + header.tokenizer + header.entropy + numbers
    checksum = zlib.crc32(head)
    parts = [head, checksum.to_bytes(4, "little")]
    for segment in segments:
        body = encode_number(len(segment)) + segment
        checksum = zlib.crc32(body, checksum)
        parts += [body, checksum.to_bytes(4, "little")]
    return b"".join(parts)


def decode_file(data: bytes, partial: bool = False) -> tuple[Header, list[bytes]]:
    """Decode the bytes of a file, and compare all its checksums.

    Args:
        data: The file.
        partial: Of a file that is damaged or cut after its first segment, return the segments
            before that.

    Returns:
        The header, and the segments. They are fewer than the header's where a file was cut
        exactly after one.

    Raises:
        ValueError: It is no such file, or is damaged; names the segment.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"expected the bytes of a compressed picture, got {type(data).__name__}")
    view = memoryview(data)
    header, place, checksum = _decode_header(view)
    segments: list[bytes] = []
    for number in range(1, header.segments + 1):
        if place == len(view) and segments:
            return header, segments
        try:
            segment, place, checksum = _decode_segment(view, place, checksum)
        except ValueError as error:
            if partial and segments:
                return header, segments
            name = f"segment {number} of {header.segments}, from byte {place}"
            raise ValueError(f"the file is damaged or cut off in {name}: {error}") from error
        segments.append(segment)
    if place < len(view) and not partial:
        raise ValueError(f"{len(view) - place} bytes follow the last segment of the file")
    return header, segments


def _decode_header(view: memoryview) -> tuple[Header, int, int]:
    """Decode a header; return the place after it and its checksum too."""
    if not view:
        raise ValueError("not a compressed picture, but an empty file")
    if view[: len(MAGIC)] != MAGIC:
        kinds = (kind for begin, kind in _KINDS.items() if bytes(view[:4]).startswith(begin))
        raise ValueError(f"not a compressed picture, but {next(kinds, 'a file of another kind')}")
    if len(view) > len(MAGIC) and view[len(MAGIC)] != VERSION:
        version = view[len(MAGIC)]
        raise ValueError(f"the file is of version {version}; this release reads {VERSION}")
    numbers, place = [], _FIXED
    try:
        for _ in range(3):
            number, place = decode_number(view, place)
            numbers.append(number)
        checksum = _compare(view, 0, place, 0)
    except ValueError as error:
        raise ValueError(f"the file's header is damaged or cut off: {error}") from error
    height, width, segments = numbers
    if 0 in numbers:
        raise ValueError(f"a header of {height} x {width} pixels in {segments} segments")
    tokenizer, entropy = bytes(view[_FIXED - 8 : _FIXED - 4]), bytes(view[_FIXED - 4 : _FIXED])
    header = Header(view[_FIXED - 9], tokenizer, entropy, (height, width), segments)
    return header, place + 4, checksum


def _decode_segment(view: memoryview, start: int, checksum: int) -> tuple[bytes, int, int]:
    """Decode the segment at a place; return it, the place after it, and its checksum."""
    length, place = decode_number(view, start)
    checksum = _compare(view, start, place + length, checksum)
    return bytes(view[place : place + length]), place + length + 4, checksum


def _compare(view: memoryview, start: int, end: int, before: int) -> int:
    """Return the checksum of a range, if it is that in the 4 bytes after it."""
    if end + 4 > len(view):
        raise ValueError(f"it needs {end + 4 - len(view)} bytes more")
    checksum = zlib.crc32(view[start:end], before)
    if checksum != int.from_bytes(view[end : end + 4], "little"):
        raise ValueError("its checksum differs")
    return checksum
