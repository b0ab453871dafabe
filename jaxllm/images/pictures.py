"""Grids of images with captions, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import einops
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxllm.data.images import to_uint8
from jaxllm.data.records import check_target

_GAP = 2
_CAPTION = 14


def save_grid(
    path: Path,
    rows: Sequence[np.ndarray],
    *,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    scale: int | None = None,
) -> None:
    """Writes one row of pictures per entry of `rows`.

    Args:
      path: PNG file to write.
      rows: Arrays [n, H, W, channels] in [-1, 1]; rows may have different n.
      row_names: Captions at the left.
      column_names: Captions at the top.
      scale: Whole-number magnification; by default small images are brought to about 64 pixels.
    """
    height, width, channels = rows[0].shape[1:]
    scale = scale or max(1, round(64 / max(height, width)))
    cell_h, cell_w = height * scale + _GAP, width * scale + _GAP
    left = 8 + 7 * max(map(len, row_names)) if row_names else _GAP
    top = _CAPTION + 4 if column_names else _GAP
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * cell_w, top + len(rows) * cell_h), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for r, row in enumerate(rows):
        y = top + r * cell_h
        if row_names:
            draw.text((4, y + cell_h // 2 - 7), row_names[r], "black", font)
        for c, image in enumerate(to_uint8(np.asarray(row))):
            big = einops.repeat(image, "h w c -> (h s) (w t) c", s=scale, t=scale)
            big = np.repeat(big, 3, axis=2) if channels == 1 else big
            sheet.paste(Image.fromarray(big), (left + c * cell_w, y))
    for c, name in enumerate(column_names or ()):
        draw.text((left + c * cell_w, 2), name, "black", font)
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)
