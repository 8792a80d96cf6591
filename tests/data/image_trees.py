"""Small data sets in the layouts of the published ones, as folders and zips."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SVG = (
    '<svg viewBox="0 0 800 800" xmlns="http://www.w3.org/2000/svg" version="1.1"><g>'
    '<g transform="translate(100,200) scale(2) translate(0,-50)"><path d="M0 0 L200 0"/></g></g></svg>'
)


def picture(value: int, form: str = "PNG", size: tuple[int, int] = (32, 32)) -> bytes:
    """An image file, its left half `value`, its right half white."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    pixels[:, : size[0] // 2] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zip_tree(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/._junk.png", b"junk")
    return path


def broken_files(good: bytes) -> dict[str, bytes]:
    """Contents of an image file that cannot be read."""
    return {"truncated": good[: len(good) // 2], "text": b"no image at all", "empty": b""}
