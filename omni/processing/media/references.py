"""Which packets hold pictures that no other is made from, and which those that all after them are made from alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def unreferenced(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool]:
    """What tells of each packet of a stream, given in decoding order, whether others can be decoded without it.

    By what the bitstream says itself, where that is certain: H.264, HEVC and AV1 in MP4 or Matroska. False elsewhere.
    Frames of VP9 hand probabilities and motion on to the next without being its reference; in MPEG-4 and before it, B
    frames may share a packet with others.
    """
    head = extradata or b""
    if length := _length(codec, head):
        return lambda packet: _h264(packet, length) if codec == "h264" else _hevc(packet, length, head[21] >> 3 & 7)
    if codec == "av1" and len(head) > 4 and head[0] == 0x81:
        return _Av1(head[4:])
    return lambda _: False


def refreshing(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """What tells of a packet whether it holds a picture that a decoder forgets all others at: none that follows it in
    decoding order refers to any before (IDR: ITU-T H.264, 7.4.1.2.4, and H.265, 3.77). None where that is not certain
    of any.
    """
    length = _length(codec, extradata or b"")

    def refreshes(packet: memoryview) -> bool:
        slices = set()
        for unit in _units(packet, length):
            if not unit:
                return False
            kind = unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63
            if codec == "h264" and 1 <= kind <= 5:
                slices.add(kind == 5)
            elif codec == "hevc" and kind < 32:
                # no_output_of_prior_pics_flag, 7.4.7.1: libavcodec forgets those that were not yet shown, too.
                slices.add(kind in (19, 20) and len(unit) > 2 and not unit[2] & 64)
        return slices == {True}

    return refreshes if length else None


def lost_at_beginning(codec: str, extradata: bytes | None, first: memoryview) -> Callable[[memoryview], bool]:
    """What tells of a packet that follows a file's first keyframe and is shown before it, whether its picture is made
    from some that are not there: what begins in an open group of pictures, cut off another file.

    first: the keyframe. Pictures of HEVC say so (RASL: ITU-T H.265, 7.4.2.2), in MPEG-2 the header of their group
    (closed_gop: ITU-T H.262, 6.3.8). In H.264 none is shown before an IDR picture that it follows; libavcodec gives
    none of those before another, nor in MPEG-4 any. False elsewhere.
    """
    length = _length(codec, extradata or b"")
    if codec == "hevc" and length:
        return lambda packet: any(unit and unit[0] >> 1 & 63 in (8, 9) for unit in _units(packet, length))
    group = bytes(first).partition(b"\0\0\1\xb8")[2]
    closed = len(group) > 3 and bool(group[3] & 64)
    lost = codec in ("h264", "mpeg4") or (codec in ("mpeg1video", "mpeg2video") and not closed)
    return lambda _: lost


def _length(codec: str, head: bytes) -> int:
    """Bytes of the size before each NAL unit, in MP4 and Matroska; 0 elsewhere (ISO/IEC 14496-15)."""
    if codec == "h264" and len(head) > 6 and head[0] == 1:  # AVCDecoderConfigurationRecord
        return (head[4] & 3) + 1
    if codec == "hevc" and len(head) > 22 and head[0] == 1:  # HEVCDecoderConfigurationRecord
        return (head[21] & 3) + 1
    return 0


def _units(packet: memoryview, length: int) -> Iterator[memoryview]:
    """NAL units, each after its size in `length` bytes, not 0; an empty one where sizes are wrong."""
    place = 0
    while place < len(packet):
        start = place + length
        place = start + int.from_bytes(packet[place:start], "big")
        yield packet[start:place] if start + 2 <= place <= len(packet) else packet[:0]


PARAMETERS = (7, 8, 13, 15)
"""Types of units that later pictures need as well."""


def _h264(packet: memoryview, length: int) -> bool:
    """nal_ref_idc is 0 in all slices (ITU-T H.264, 7.4.1)."""
    slices = False
    for unit in _units(packet, length):
        kind = unit[0] & 31 if unit else PARAMETERS[0]
        if kind in PARAMETERS:
            return False
        if 1 <= kind <= 5:
            slices = True
            if unit[0] >> 5 & 3:
                return False
    return slices


def _hevc(packet: memoryview, length: int, sublayers: int) -> bool:
    """A sub-layer non-reference picture (ITU-T H.265, 7.4.2.2) of the highest sub-layer: above it none refers to it."""
    slices = False
    for unit in _units(packet, length):
        if not unit:
            return False
        kind = unit[0] >> 1 & 63
        if kind < 32:
            slices = True
            if kind > 14 or kind % 2 or unit[1] & 7 != sublayers:
                return False
        elif kind < 35:  # parameter sets, which later pictures need as well
            return False
    return slices


class _Av1:
    """No frame of the temporal unit is kept: refresh_frame_flags is 0 (AV1 bitstream specification, 5.9.2). What a
    frame hands on, it hands on by being kept."""

    def __init__(self, head: bytes) -> None:
        self.sequence: _Sequence | None = None
        self(memoryview(head))

    def __call__(self, packet: memoryview) -> bool:
        frames = kept = False
        place = 0
        while place < len(packet):
            kind, extended, sized = packet[place] >> 3 & 15, packet[place] >> 2 & 1, packet[place] >> 1 & 1
            place += 1 + extended
            size, shift = 0, 0
            while sized and place < len(packet):
                size |= (packet[place] & 127) << shift
                shift += 7
                place += 1
                if not packet[place - 1] & 128:
                    break
            end = place + size if sized else len(packet)
            if kind == 1:
                self.sequence = _sequence(_Bits(packet[place : min(end, place + 64)]))
                kept = True
            elif kind in (3, 6, 7):
                frames = True
                if self.sequence is None or _kept(_Bits(packet[place : min(end, place + 64)]), self.sequence):
                    kept = True
            place = end
        return frames and not kept


class _Sequence:
    """What of a sequence header the beginning of a frame header depends on."""

    def __init__(self, *, tools: int, integer_mv: int, frame_id: int, order_hint: int) -> None:
        self.tools, self.integer_mv, self.frame_id, self.order_hint = tools, integer_mv, frame_id, order_hint


class _Bits:
    def __init__(self, data: memoryview) -> None:
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def __call__(self, count: int) -> int:
        self.left -= count
        return self.value >> self.left & ((1 << count) - 1) if self.left >= 0 else 0


SELECT = 2


def _sequence(bits: _Bits) -> _Sequence | None:
    """sequence_header_obu (5.5.1); None for stills and for what states the buffers of a decoder."""
    bits(3)  # seq_profile
    still, reduced, timed = bits(1), bits(1), bits(1)
    if still or reduced or timed:
        return None
    delayed = bits(1)
    for _ in range(bits(5) + 1):
        bits(12)  # operating_point_idc
        if bits(5) > 7:
            bits(1)  # seq_tier
        if delayed and bits(1):
            bits(4)
    wide, high = bits(4) + 1, bits(4) + 1
    bits(wide + high)
    frame_id = 0
    if bits(1):
        delta = bits(4) + 2
        frame_id = bits(3) + delta + 1
    bits(3)  # use_128x128_superblock, enable_filter_intra, enable_intra_edge_filter
    bits(4)  # enable_interintra_compound, enable_masked_compound, enable_warped_motion, enable_dual_filter
    ordered = bits(1)
    if ordered:
        bits(2)  # enable_jnt_comp, enable_ref_frame_mvs
    tools = SELECT if bits(1) else bits(1)
    integer_mv = SELECT
    if tools:
        integer_mv = SELECT if bits(1) else bits(1)
    order_hint = bits(3) + 1 if ordered else 0
    return _Sequence(tools=tools, integer_mv=integer_mv, frame_id=frame_id, order_hint=order_hint)


def _kept(bits: _Bits, sequence: _Sequence) -> bool:
    """Whether others may refer to a frame, by the beginning of its uncompressed_header."""
    if bits(1):  # show_existing_frame
        return True
    kind, shown = bits(2), bits(1)
    if kind == 3 or (kind == 0 and shown):  # SWITCH_FRAME, a keyframe: all are refreshed
        return True
    if not shown:
        bits(1)  # showable_frame
    resilient = bits(1)
    bits(1)  # disable_cdf_update
    tools = bits(1) if sequence.tools == SELECT else sequence.tools
    if tools and sequence.integer_mv == SELECT:
        bits(1)
    bits(sequence.frame_id)
    bits(1)  # frame_size_override_flag
    bits(sequence.order_hint)
    if kind not in (0, 2) and not resilient:
        bits(3)  # primary_ref_frame
    return bits(8) != 0 or bits.left < 0
