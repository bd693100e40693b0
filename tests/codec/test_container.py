"""The container: what is written is read, and no byte can change unnoticed."""

import zlib

import pytest

from taming.codec.container import Header, decode_file, encode_file

HEADER = Header(1, b"\x01\x02\x03\x04", b"\xfa\xfb\xfc\xfd", (300, 17), 3)
SEGMENTS = [bytes(range(7)), b"", bytes(200)]
FILE = encode_file(HEADER, SEGMENTS)
STORED = "4c4f4f50010101020304fafbfcfdac021103"  # all of its header but the checksum
ENDS = [22, 22 + 12, 22 + 12 + 5, len(FILE)]  # of the header and of each segment


def segment_of(place: int) -> int:
    """Number of the segment, from 1, of a byte; 0 in the header."""
    return next(number for number, end in enumerate(ENDS) if place < end)


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError) as error:
        decode_file(data)
    return str(error.value)


def test_a_file_is_read_as_it_was_written() -> None:
    assert decode_file(FILE) == (HEADER, SEGMENTS) == decode_file(bytearray(FILE), partial=True)
    assert FILE[:18].hex() == STORED and len(FILE) == ENDS[0] + sum(map(len, SEGMENTS)) + 3 * 5 + 1


@pytest.mark.parametrize("size", [(1, 1), (127, 128), (1 << 34, 16384)], ids=str)
@pytest.mark.parametrize("length", [0, 127, 128, 16384])
def test_numbers_of_any_size_come_back(size: tuple[int, int], length: int) -> None:
    header = Header(0, bytes(4), bytes(4), size, 1)
    assert decode_file(encode_file(header, [bytes(length)])) == (header, [bytes(length)])


def test_overhead() -> None:
    header = HEADER._replace(size=(768, 512))
    assert len(encode_file(header, [bytes(100)] * 3)) - 300 == 23 + 3 * 5


def test_every_flipped_bit_is_refused_and_its_place_named() -> None:
    for place in range(len(FILE)):
        for bit in range(8):
            data = bytearray(FILE)
            data[place] ^= 1 << bit
            message = refusal(bytes(data))
            number = segment_of(place)
            assert (f"in segment {number} of 3" in message) == (number > 0), (place, bit, message)


@pytest.mark.parametrize("byte", [0, 1, 0x7F, 0x80, 0xFF])
def test_every_inserted_and_dropped_byte_is_refused(byte: int) -> None:
    for place in range(len(FILE) + 1):
        data = FILE[:place] + bytes([byte]) + FILE[place:]
        message = refusal(data)
        if place == len(FILE):
            assert message == "1 bytes follow the last segment of the file"
    for place in range(len(FILE)):
        assert refusal(FILE[:place] + FILE[place + 1 :])


def test_a_file_that_is_cut_is_refused_but_after_a_segment() -> None:
    for place in range(len(FILE)):
        if place in ENDS[1:]:
            assert decode_file(FILE[:place]) == (HEADER, SEGMENTS[: ENDS.index(place)])
            continue
        message = refusal(FILE[:place])
        if place >= ENDS[0]:
            assert f"in segment {segment_of(place)} of 3, from byte" in message


def test_partial_gives_the_segments_before_what_is_wrong() -> None:
    for place in range(ENDS[1], len(FILE)):
        before = SEGMENTS[: segment_of(place) - 1]
        flipped = FILE[:place] + bytes([FILE[place] ^ 16]) + FILE[place + 1 :]
        for data in (flipped, FILE[:place]):
            assert decode_file(data, partial=True) == (HEADER, before)
    for place in range(ENDS[1]):  # before the first segment has ended, there is nothing to show
        with pytest.raises(ValueError):
            decode_file(FILE[:place], partial=True)
    assert decode_file(FILE + b"more", partial=True) == (HEADER, SEGMENTS)


def test_segments_change_neither_places_nor_files() -> None:
    equal = [bytes([1] * 9), bytes([2] * 9), bytes([3] * 9)]
    file, start, size = encode_file(HEADER, equal), 22, 14
    parts = [file[start + n * size : start + (n + 1) * size] for n in range(3)]
    assert file == file[:start] + b"".join(parts)
    assert "segment 1 of 3" in refusal(file[:start] + parts[1] + parts[0] + parts[2])
    assert "segment 2 of 3" in refusal(file[:start] + parts[0] + parts[2])
    other = encode_file(HEADER._replace(size=(300, 18)), equal)
    assert "segment 2 of 3" in refusal(file[: start + size] + other[start + size :])


def with_checksum(head: bytes) -> bytes:
    return head + zlib.crc32(head).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a compressed picture, but an empty file"),
        (b"\x89PNG\r\n\x1a\n", "not a compressed picture, but a PNG picture"),
        (b"text", "not a compressed picture, but a file of another kind"),
        (FILE[:4] + b"\x02" + FILE[5:], "version 2; this release reads 1"),
        (FILE[:18], "header is damaged or cut off: it needs 4 bytes more"),
        (with_checksum(FILE[:14] + b"\x00\x11\x03"), "a header of 0 x 17 pixels in 3 segments"),
        (with_checksum(FILE[:14] + b"\x05\x11\x00"), "a header of 5 x 17 pixels in 0 segments"),
        (with_checksum(FILE[:14] + b"\x85\x00\x11\x03"), "a number is damaged"),
        (with_checksum(FILE[:14] + b"\xff" * 5 + b"\x01\x11\x03"), "a number is damaged"),
        (FILE[:22], "segment 1 of 3, from byte 22: a number is damaged or cut off"),
        (FILE[:22] + b"\xff\xff\xff\xff\x7f", "needs 34359738371 bytes more"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_file(data)


@pytest.mark.parametrize("data", ["photo.loop", None, 3, [1, 2]])
def test_what_is_not_bytes_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="expected the bytes of a compressed picture, got"):
        decode_file(data)  # type: ignore[arg-type]
