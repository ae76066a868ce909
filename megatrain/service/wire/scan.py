"""Counts the fields of a protobuf body before it is parsed.

An empty message takes two bytes on the wire and dozens once it is parsed: a body within its cap
could take gigabytes.
"""

from megatrain.errors import DataError

_DATUM = 3  # ForwardBackwardRequest.data
_BYTES = 2  # the wire type of messages, strings and bytes


def check_fields(body: bytes, max_fields: int) -> None:
    """Raise DataError for a ForwardBackwardRequest of more fields, those of its data included."""
    view = memoryview(body)
    left = _scan(view, 0, len(view), max_fields, inside=False)
    if left < 0:
        raise DataError(
            f"the request is made of more than {max_fields} parts",
            hint="send fewer data in a request, and fewer chunks in a datum",
        )


def _scan(view: memoryview, at: int, end: int, left: int, *, inside: bool) -> int:
    while at < end and left >= 0:
        left -= 1
        tag, at = _varint(view, at, end)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(view, at, end)
        elif kind == _BYTES:
            size, at = _varint(view, at, end)
            if size > end - at:
                raise DataError("the protobuf body is cut off")
            if not inside and tag >> 3 == _DATUM:
                left = _scan(view, at, at + size, left, inside=True)
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:  # groups, which no client of ours writes
            raise DataError("the body is not the protobuf message that it should be")
    if at > end:
        raise DataError("the protobuf body is cut off")
    return left


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DataError("the protobuf body is cut off")
