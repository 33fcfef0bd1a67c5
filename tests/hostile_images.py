"""Two hundred image files that should not be trusted, and what loading them comes to.

`hostile_images()` makes the files in memory, the same ones every time: every mode and format, cut short, with flipped
bits, under a wrong magic number, with sizes of zero, sizes that would fill the memory, extreme shapes and metadata
that is garbage. Run as a script it loads each one and prints a table of outcomes and the growth of peak memory, the
last line as JSON.
"""

import collections
import hashlib
import io
import json
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin

COUNT = 200


def hostile_images() -> list[tuple[str, bytes]]:
    """Exactly `COUNT` pairs of a unique name (`family/what`) and the bytes of a file."""
    whole = dict(_valid())
    found = [(f"valid/{name}", data) for name, data in whole.items()]
    for family in (_cut, _wrong_magic):
        found += family(whole)
    for family in (_bombs, _empty_sizes, _shapes, _metadata, _not_images):
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
    yield "bomb/png-real-over-the-limit", _png(14_000, 14_000, filled=True)
    yield "bomb/png-real-under-the-limit", _png(9_400, 9_400, filled=True)
    yield "bomb/png-real-16-bit-under-the-limit", _png(9_400, 9_400, filled=True, depth=16)
    yield "bomb/png-real-rgba-under-the-limit", _png(9_400, 9_400, filled=True, depth=8, colour=6)
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
    text = zlib.compress(bytes(30_000_000), 1)
    yield "bomb/png-text", _png(8, 8, extra=_chunk(b"zTXt", b"note\0\0" + text), filled=True)
    yield "bomb/png-profile", _png(8, 8, extra=_chunk(b"iCCP", b"icc\0\0" + text), filled=True)


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


def main() -> None:
    """Load every file; an exception that is no ImageError ends the script with its traceback."""
    from qzoom_agent.errors import ImageError
    from qzoom_agent.images import load_image

    warnings.simplefilter("ignore")
    files = hostile_images()
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest = (0.0, "")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in files:
        began = time.perf_counter()
        try:
            image = load_image(data)
        except ImageError as error:
            outcome = "ImageError" if str(error) else "ImageError without a text"
        else:
            outcome = "RGB image" if image.mode == "RGB" and min(image.size) > 0 else f"{image.mode} {image.size}"
        outcomes[name.partition("/")[0]][outcome] += 1
        slowest = max(slowest, (time.perf_counter() - began, name))
        if "-v" in sys.argv:
            print(f"{name:45} {outcome}")
    unit = 1 if sys.platform == "darwin" else 1024
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    for family, counts in outcomes.items():
        print(f"{family:8} {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    total = sum(outcomes.values(), collections.Counter())
    print(f"slowest  {slowest[1]} {slowest[0]:.2f} s; peak memory grew by {growth / 2**20:.0f} MiB")
    print(json.dumps({"files": len(files), "digest": digest(files), "outcomes": total, "peak_growth_bytes": growth}))


if __name__ == "__main__":
    main()
