"""Hundreds of image files that should not be trusted, and what loading them comes to.

`hostile_images()` makes the files in memory, the same ones every time: every mode and format, cut short, with flipped
bits, under a wrong magic number, with sizes of zero, sizes that would fill the memory, extreme shapes, metadata that is
garbage or endless, thousands of frames, and pixels that Pillow decodes in Python. `large_images()` are those that take
a while to make or to refuse. Run as a script it loads each one and prints a table of outcomes, the slowest and the
growth of peak memory, the last line as JSON.
"""

import collections
import hashlib
import io
import json
import os
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, PngImagePlugin

COUNT = 320


def hostile_images() -> list[tuple[str, bytes]]:
    """Exactly `COUNT` pairs of a unique name (`family/what`) and the bytes of a file, each handled in a moment."""
    whole = dict(_valid())
    found = [(f"valid/{name}", data) for name, data in whole.items()]
    for family in (_cut, _wrong_magic):
        found += family(whole)
    for family in (_bombs, _empty_sizes, _shapes, _metadata, _endless, _not_images):
        found += family()
    found += _flips(whole, COUNT - len(found))
    return found


def digest(files: list[tuple[str, bytes]]) -> str:
    """SHA-256 over names and contents."""
    found = hashlib.sha256()
    for name, data in files:
        found.update(f"{name} {len(data)}\n".encode() + data)
    return found.hexdigest()


# ---- making them ---------------------------------------------------------------------------------------------------


def _picture(mode: str = "RGB", size: tuple[int, int] = (48, 36)) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    colour = Image.merge("RGB", (ramp, ramp.rotate(90).resize(size), Image.radial_gradient("L").resize(size)))
    if mode in ("RGBA", "LA"):
        colour.putalpha(ramp)
        return colour if mode == "RGBA" else colour.convert("LA")
    if mode == "I;16":
        return ramp.convert("I").point(lambda value: value * 257).convert("I;16")
    return colour.convert("L").convert(mode) if mode in ("I", "F") else colour.convert(mode)


def _encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def _valid() -> Iterator[tuple[str, bytes]]:
    lab = Image.frombytes("LAB", (8, 8), bytes(range(192)))
    frames = [_picture("P"), _picture("P").rotate(90), _picture("P").rotate(180)]
    modes = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"),
        "PPM": ("1", "L", "RGB", "I", "F"),
        "WEBP": ("RGB", "RGBA"),
        "AVIF": ("RGB", "RGBA"),
        "JPEG2000": ("L", "RGB", "RGBA"),
        "BMP": ("1", "L", "P", "RGB", "RGBA"),
        "GIF": ("L", "P"),
        "ICO": ("RGBA",),
        "QOI": ("RGB", "RGBA"),
        "TGA": ("RGB",),
        "PCX": ("RGB",),
        "EPS": ("RGB",),
    }
    for format, kinds in modes.items():
        for mode in kinds:
            yield f"{format}-{mode}", _encode(_picture(mode), format)
    yield "PNG-palette-transparent", _encode(_picture("P"), "PNG", transparency=bytes(range(0, 250, 5)))
    yield "PNG-RGB-transparent", _encode(_picture("RGB"), "PNG", transparency=(0, 0, 0))
    yield "PNG-animated", _encode(_picture(), "PNG", save_all=True, append_images=[_picture().rotate(90)])
    yield "JPEG-progressive", _encode(_picture(), "JPEG", progressive=True)
    yield "JPEG-mpo", _encode(_picture(), "MPO", save_all=True, append_images=[_picture().rotate(90)])
    yield "TIFF-lab", _encode(lab, "TIFF")
    yield "TIFF-lzw", _encode(_picture(), "TIFF", compression="tiff_lzw")
    yield "TIFF-pages", _encode(_picture(), "TIFF", save_all=True, append_images=[_picture().rotate(90)])
    yield "WEBP-lossless", _encode(_picture(), "WEBP", lossless=True)
    yield "WEBP-animated", _encode(_picture(), "WEBP", save_all=True, append_images=[_picture().rotate(90)])
    yield "GIF-animated", _encode(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0)


_DAMAGED = (
    "PNG-RGB",
    "JPEG-RGB",
    "JPEG-progressive",
    "TIFF-lzw",
    "TIFF-I;16",
    "WEBP-RGBA",
    "WEBP-animated",
    "AVIF-RGB",
    "JPEG2000-RGB",
    "BMP-RGB",
    "GIF-animated",
    "ICO-RGBA",
    "QOI-RGB",
)


def _cut(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for name in _DAMAGED:
        data = whole[name]
        for percent in (3, 50, 95):
            yield f"cut/{name}-{percent}%", data[: max(4, len(data) * percent // 100)]


def _flips(whole: dict[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    dice = random.Random(20)
    for number in range(count):
        name = _DAMAGED[number % len(_DAMAGED)]
        data = bytearray(whole[name])
        for _ in range(1 + number % 4 * 3):
            # Headers are where a flip hurts most.
            place = dice.randrange(4, min(len(data), 64) if dice.random() < 0.5 else len(data))
            data[place] ^= 1 << dice.randrange(8)
        yield f"flips/{name}-{number}", bytes(data)


def _wrong_magic(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    heads = {"PNG": whole["PNG-RGB"][:8], "JPEG": whole["JPEG-RGB"][:4], "GIF": b"GIF89a", "TIFF": b"II*\0"}
    bodies = {"JPEG-RGB", "PNG-RGB", "WEBP-RGB"}
    for format, head in heads.items():
        for body in sorted(bodies - {f"{format}-RGB"}):
            yield f"magic/{format}-on-{body}", head + whole[body][len(head) :]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(
    width: int, height: int, *, extra: bytes = b"", filled: bool = False, depth: int = 1, colour: int = 0
) -> bytes:
    """A PNG of that bit depth and colour type (0 grey, 6 RGBA), all zero if `filled`, else without pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = b""
    if filled:
        squeeze = zlib.compressobj(1)
        row = bytes(1 + (width * depth * {0: 1, 6: 4}[colour] + 7) // 8)
        pixels = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    magic = b"\x89PNG\r\n\x1a\n"
    return magic + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def _gif(width: int, height: int, frame: tuple[int, int] = (1, 1)) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"


def _tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(68)


def _webp(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + sizes
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _qoi(width: int, height: int) -> bytes:
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + bytes(7) + b"\x01"


def _ico(inside: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inside), 22) + inside


def _bombs() -> Iterator[tuple[str, bytes]]:
    yield "bomb/png-header", _png(60_000, 60_000)
    yield "bomb/png-largest-header", _png(2**31 - 1, 2**31 - 1)
    yield "bomb/png-between-our-limit-and-pillows", _png(13_000, 13_000)
    yield "bomb/gif-screen", _gif(65_535, 65_535)
    yield "bomb/gif-frame", _gif(10, 10, frame=(65_535, 65_535))
    yield "bomb/bmp", _bmp(100_000, 100_000)
    yield "bomb/bmp-upside-down", _bmp(30_000, -30_000)
    yield "bomb/tiff", _tiff(200_000, 200_000)
    yield "bomb/webp", _webp(16_383, 16_383)
    yield "bomb/webp-canvas-of-24-bits", _webp(2**24, 2**24)
    yield "bomb/qoi", _qoi(2**30, 2**30)
    yield "bomb/ppm", b"P6 1000000 1000000 255\n" + bytes(64)
    yield "bomb/pgm-number-of-many-digits", b"P5 " + b"9" * 5000 + b" 1 255\n"
    yield "bomb/ico-of-png", _ico(_png(60_000, 60_000))
    for side in (60_000, 2**31 - 1):
        avif = _encode(_picture(), "AVIF")
        place = avif.index(b"ispe") + 8
        yield f"bomb/avif-{side}", avif[:place] + struct.pack(">II", side, side) + avif[place + 8 :]
    for mode, side in (("RGB", 9_000), ("RGBA", 9_000), ("L", 60_000)):
        jpeg2000 = _encode(_picture(mode), "JPEG2000")
        siz, ihdr = jpeg2000.index(b"\xff\x51") + 6, jpeg2000.index(b"ihdr") + 4
        big = jpeg2000[:siz] + struct.pack(">II", side, side) + jpeg2000[siz + 8 :]
        yield f"bomb/jpeg2000-{mode}-{side}", big[:ihdr] + struct.pack(">II", side, side) + big[ihdr + 8 :]
    jpeg = _encode(_picture(), "JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    yield "bomb/jpeg-65535", jpeg[:place] + b"\xff" * 4 + jpeg[place + 4 :]
    for width, height in ((1, 88_000_000), (88_000_000, 1), (2, 40_000_000), (300, 290_000)):
        yield f"thin/png-{width}x{height}", _png(width, height, depth=8, colour=6)
        yield f"thin/ppm-{width}x{height}", b"P6 %d %d 255\n" % (width, height) + bytes(64)
        yield f"thin/bmp-{width}x{height}", _bmp(width, height)
        yield f"thin/tiff-{width}x{height}", _tiff(width, height)


def large_images() -> Iterator[tuple[str, bytes]]:
    """Yield further files, one at a time."""
    yield "large/png-over-the-limit", _png(14_000, 14_000, filled=True)
    yield "large/png-1-bit", _png(9_400, 9_400, filled=True)
    yield "large/png-16-bit", _png(9_400, 9_400, filled=True, depth=16)
    yield "large/png-rgba", _png(9_400, 9_400, filled=True, depth=8, colour=6)
    yield "large/png-rgba-1-pixel-wide", _png(1, 88_000_000, filled=True, depth=8, colour=6)
    yield "large/ico-of-png", _ico(_png(9_400, 9_400, filled=True, depth=8, colour=6))
    text = zlib.compress(bytes(30_000_000), 1)
    yield "large/png-text", _png(8, 8, extra=_chunk(b"zTXt", b"note\0\0" + text), filled=True)
    yield "large/png-profile", _png(8, 8, extra=_chunk(b"iCCP", b"icc\0\0" + text), filled=True)
    yield "large/png-text-chunk", _png(8, 8, extra=_chunk(b"tEXt", b"note\0" + bytes(98_000_000)), filled=True)
    yield "large/png-unknown-chunk", _png(8, 8, extra=_chunk(b"qzOm", bytes(200_000_000)), filled=True)
    yield "large/png-pixels-in-a-million-chunks", _png(8, 8, extra=_chunk(b"IDAT", b"") * 1_000_000, filled=True)
    jpeg = _encode(_picture(), "JPEG")
    segment = b"\xff\xe1\xff\xfdExif\0\0" + bytes(65_525)
    yield "large/jpeg-98-mb-of-exif", jpeg[:2] + segment * 1_500 + jpeg[2:]
    yield "large/jpeg-comments", jpeg[:2] + (b"\xff\xfe\xff\xfd" + bytes(65_531)) * 1_500 + jpeg[2:]
    wide = _encode(Image.new("RGB", (9_400, 9_400)), "JPEG", progressive=True)
    scan = wide.rindex(b"\xff\xda")
    yield "large/jpeg-a-thousand-scans", wide[:-2] + wide[scan:-2] * 1_000 + wide[-2:]
    comment = b"\xff" + bytes(255)
    yield "large/gif-comment", _gif(8, 8)[:19] + b"!\xfe" + comment * 300_000 + b"\0" + _gif(8, 8)[19:]
    offsets = 16_000_000
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, offsets, 200)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    yield "large/tiff-offsets", b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4 * offsets + 200)
    yield "large/jpeg2000-rgba", _encode(Image.new("RGBA", (5_000, 5_000)), "JPEG2000")
    yield "large/avif", _encode(Image.new("RGBA", (8_100, 8_100)), "AVIF", speed=10)
    yield "large/webp", _encode(Image.new("RGBA", (8_100, 8_100)), "WEBP", lossless=True, method=0)
    yield "large/tiff-float", _encode(Image.new("F", (8_000, 8_000)), "TIFF", compression="tiff_lzw")
    yield "large/cmyk", _encode(Image.new("CMYK", (9_400, 9_400)), "JPEG")
    noise = random.Random(3).randbytes(1 << 20)
    yield "large/qoi", _qoi(9_400, 9_400)[:14] + noise * 40
    yield "large/ppm-plain", b"P3 4000 4000 255\n" + b"1 2 3 " * 16_000_000
    yield "large/bmp-runs", _bmp_with_runs(9_400, b"\x01\x02" * 20_000_000)
    yield "large/data-uri", b"data:image/png;base64," + b"A" * 600_000_000


def _bmp_with_runs(side: int, runs: bytes) -> bytes:
    head = struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078)
    return b"BM" + head + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024) + runs


def _endless() -> Iterator[tuple[str, bytes]]:
    """Yield many small blocks of metadata, and many frames."""
    jpeg, progressive = _encode(_picture(), "JPEG"), _encode(_picture(), "JPEG", progressive=True)
    yield "endless/jpeg-segments", jpeg[:2] + b"\xff\xe2\0\2" * 20_000 + jpeg[2:]
    yield "endless/jpeg-fill-bytes", jpeg[:2] + b"\xff" * 100_000 + jpeg[2:]
    scan = progressive.rindex(b"\xff\xda")
    yield "endless/jpeg-scans", progressive[:-2] + progressive[scan:-2] * 500 + progressive[-2:]
    for kind in (b"tEXt", b"qzOm", b"PLTE"):
        yield f"endless/png-{kind.decode()}", _png(8, 8, extra=_chunk(kind, b"a\0b") * 20_000, filled=True)
    yield "endless/png-empty-pixels", _png(8, 8, extra=_chunk(b"IDAT", b"") * 2_000, filled=True)
    head, frame = _gif(8, 8)[:19], _gif(8, 8)[19:-1]
    yield "endless/gif-comment", head + b"!\xfe" + (b"\x01a") * 40_000 + b"\0" + frame + b";"
    yield "endless/gif-extensions", head + b"!\xfe\x01a\0" * 20_000 + frame + b";"
    yield "endless/gif-frames", head + frame * 5_000 + b";"
    frames = [_picture("RGB", (8, 8)).rotate(at) for at in range(40)]
    for format in ("GIF", "PNG", "WEBP"):
        made = _encode(frames[0], format, save_all=True, append_images=frames[1:])
        yield f"endless/{format.lower()}-animation", made
    control = struct.pack(">IIIIIHHBB", 1, 8, 8, 0, 0, 1, 10, 0, 0)
    steps = (_chunk(b"fcTL", control) + _chunk(b"fdAT", bytes(8))) * 4_000
    yield (
        "endless/apng-frames",
        _png(8, 8, extra=_chunk(b"acTL", struct.pack(">II", 4_000, 0)), filled=True)[:-12] + steps,
    )
    jpeg2000 = _encode(_picture(), "JPEG2000")
    yield "endless/jpeg2000-boxes", jpeg2000[:12] + b"\0\0\0\x08free" * 20_000 + jpeg2000[12:]
    entries = b"".join(struct.pack("<HHII", tag, 1, 700_000, 8) for tag in range(1_000, 61_000))
    yield "endless/tiff-tags", b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + entries + bytes(4)
    yield "endless/tiff-pages-in-a-circle", _tiff(8, 8)[:-68] + struct.pack("<I", 8) + bytes(64)
    yield "endless/ico-entries", struct.pack("<HHH", 0, 1, 65_535) + bytes(16 * 65_535)
    yield "endless/ppm-comments", b"P6 " + b"# note\n" * 20_000 + b"8 8 255\n" + bytes(192)
    yield "endless/qoi-noise", _qoi(3_000, 3_000)[:14] + random.Random(4).randbytes(2_100_000)
    yield "endless/ppm-plain", b"P3 700 700 255\n" + b"1 2 3 " * 490_000
    yield "endless/bmp-runs", _bmp_with_runs(2_000, b"\x01\x02" * 1_100_000)


def _empty_sizes() -> Iterator[tuple[str, bytes]]:
    yield "zero/png", _png(0, 0)
    yield "zero/png-width", _png(0, 10)
    yield "zero/gif", _gif(0, 0)
    yield "zero/gif-frame", _gif(0, 0, frame=(0, 0))
    yield "zero/bmp", _bmp(0, 0)
    yield "zero/tiff", _tiff(0, 10)
    yield "zero/qoi", _qoi(0, 0)
    yield "zero/ppm", b"P6 0 0 255\n"


def _shapes() -> Iterator[tuple[str, bytes]]:
    yield "shape/png-1x100000", _png(1, 100_000, filled=True)
    yield "shape/png-100000x1", _png(100_000, 1, filled=True)
    yield "shape/png-1x200", _png(1, 200, filled=True)
    yield "shape/png-1x201", _png(1, 201, filled=True)
    yield "shape/png-1x1", _png(1, 1, filled=True)
    yield "shape/jpeg-65500x1", _encode(Image.new("L", (65_500, 1)), "JPEG")
    yield "shape/ppm-1x1000000", b"P5 1 1000000 255\n" + bytes(1_000_000)


def _metadata() -> Iterator[tuple[str, bytes]]:
    dice = random.Random(6)
    loop = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 0x8769, 4, 1, 8) + b"\x08\0\0\0"
    count = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 65_535) + bytes(24)
    text = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0") + bytes(4)
    far = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 0x0112, 5, 9, 2**32 - 1) + bytes(4)
    for name, block in {"loop": loop, "count": count, "text": text, "far": far, "noise": dice.randbytes(300)}.items():
        yield f"exif/jpeg-{name}", _encode(_picture(), "JPEG", exif=block)
    for value in (0, 6, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = value
        yield f"exif/jpeg-orientation-{value}", _encode(_picture(), "JPEG", exif=exif)
    yield "exif/png-noise", _encode(_picture(), "PNG", exif=dice.randbytes(300))
    yield "exif/webp-noise", _encode(_picture(), "WEBP", exif=dice.randbytes(300))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n9999\nzz")
    yield "exif/png-text-profile", _encode(_picture(), "PNG", pnginfo=info)
    yield "exif/jpeg-profile-noise", _encode(_picture(), "JPEG", icc_profile=dice.randbytes(500))


def _not_images() -> Iterator[tuple[str, bytes]]:
    dice = random.Random(7)
    yield "other/empty", b""
    yield "other/one-byte", b"\x89"
    yield "other/zeros", bytes(4096)
    yield "other/noise", dice.randbytes(4096)
    yield "other/text", b"this is not an image\n"
    yield "other/html", b"<!doctype html><title>404</title>"
    yield "other/pdf", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
    yield "other/svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "other/zip", b"PK\x03\x04" + dice.randbytes(64)
    yield "other/video", b"\0\0\0\x18ftypmp42" + dice.randbytes(64)
    yield "other/psd", b"8BPS" + struct.pack(">HxxxxxxHIIHH", 1, 3, 30_000, 30_000, 8, 3) + bytes(64)
    yield "other/icns", b"icns" + struct.pack(">I4sI", 64, b"ic10", 56) + bytes(48)
    yield "other/dds", b"DDS |\0\0\0" + bytes(128)
    yield "other/riff-sound", b"RIFF\x24\0\0\0WAVEfmt " + bytes(32)
    for magic in (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"MM\0*",
        b"RIFF\xff\xff\xff\xffWEBP",
        b"\0\0\0\x0cjP  \r\n\x87\n",
    ):
        yield f"other/only-magic-{magic[:4].hex()}", magic


# ---- loading them --------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What loading one file came to."""

    name: str
    kind: str
    """`ImageError` or `RGB image`, else what went wrong."""
    seconds: float
    """Of this process's CPU."""
    growth: int
    """Bytes by which the peak of this process's memory grew."""


def load(name: str, data: bytes) -> Outcome:
    """Load a file here; an exception that is no ImageError is raised."""
    from qzoom_agent.errors import ImageError
    from qzoom_agent.images import load_image

    source = data.decode() if data.startswith(b"data:") else data
    before, began = _peak(), time.process_time()
    try:
        image = load_image(source)
    except ImageError as error:
        kind = "ImageError" if str(error) else "ImageError without a text"
    else:
        kind = "RGB image" if image.mode == "RGB" and min(image.size) > 0 else f"{image.mode} {image.size}"
    return Outcome(name, kind, time.process_time() - began, _peak() - before)


def load_apart(name: str, data: bytes) -> Outcome:
    """Load a file in a process of its own, whose peak is its own: a peak only ever grows."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(load(name, data)).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return Outcome(*json.loads(pipe.read() or json.dumps([name, "an exception", 0.0, 0])))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Load every file, the large ones with `--large`."""
    warnings.simplefilter("ignore")
    files = hostile_images()
    before = _peak()
    found = [load(name, data) for name, data in files]
    growth = _peak() - before
    if "--large" in sys.argv:
        found += [load_apart(name, data) for name, data in large_images()]
        growth = max(growth, *(one.growth for one in found))
    families: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in found:
        families[one.name.partition("/")[0]][one.kind] += 1
        if "-v" in sys.argv:
            print(f"{one.name:45} {one.kind:12} {one.seconds:6.2f} s {one.growth / 2**20:6.0f} MiB")
    for family, counts in families.items():
        print(f"{family:8} {', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}")
    slowest = max(found, key=lambda one: one.seconds)
    total = sum(families.values(), collections.Counter())
    print(f"slowest  {slowest.name} {slowest.seconds:.2f} s; peak memory grew by {growth / 2**20:.0f} MiB")
    told = {"files": len(found), "digest": digest(files), "outcomes": total, "peak_growth_bytes": growth}
    print(json.dumps(told | {"slowest": slowest.name, "seconds": slowest.seconds}))


if __name__ == "__main__":
    main()
