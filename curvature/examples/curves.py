"""Images of random curves, after the CURVES data of Hinton and Salakhutdinov (2006).

Theirs were drawn through three random points of the plane; these are cubic Bezier curves with four
random control points, so that eight numbers tell an image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SIZE = 28
_MARGIN = 2.0  # pixels between a control point and the border, which keeps strokes inside
_SIGMA = 0.7  # pixels: strokes are a blurred line, about two pixels wide
_INK = 1.25  # above one, so that the middle of a stroke is white wherever it lies between pixels
_SAMPLES = 100  # points along a curve, at most a pixel apart
_CHUNK = 1000  # images drawn at once: 11 MB a coordinate


def curves(count: int, seed: int = 0) -> Floats:
    """Grey images of random cubic Bezier curves.

    Args:
      count: how many.
      seed: of the control points; the first images of a longer set are those of a shorter one.

    Returns:
      Images as rows of numbers in [0, 1], shape `[count, 784]`.

    >>> from curvature import examples
    >>> images = examples.curves(3)
    >>> images.shape, float(images.min()), float(images.max())
    ((3, 784), 0.0, 1.0)
    """
    return draw(control_points(count, seed))


def control_points(count: int, seed: int = 0) -> Floats:
    """Control points of cubic Bezier curves, uniform in the image but for a margin.

    Args:
      count: how many curves.
      seed: of the generator.

    Returns:
      Coordinates in pixels, column before row, shape `[count, 4, 2]`.
    """
    generator = np.random.default_rng(seed)
    points = generator.uniform(_MARGIN, SIZE - 1 - _MARGIN, (count, 4, 2))
    return points.astype(np.float32)


def draw(points: Floats) -> Floats:
    """Draws cubic Bezier curves as anti-aliased strokes, white on black.

    A pixel is the curve's line integral of a Gaussian around it, scaled to exceed one in the middle
    of a straight stroke and cut off at one. The Gaussian is a product of one function of the column
    and one of the row, so the integral is a matrix product.

    Args:
      points: control points, as `control_points` gives them.

    Returns:
      Images as rows of numbers in [0, 1], shape `[count, 784]`.
    """
    parts = list(_drawn(points))
    return np.concatenate(parts) if parts else np.zeros((0, SIZE**2), np.float32)


def _drawn(points: Floats) -> Iterator[Floats]:
    t = np.linspace(0, 1, _SAMPLES, dtype=np.float32)[:, None]
    bernstein = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    for start in range(0, len(points), _CHUNK):
        path = bernstein @ points[start : start + _CHUNK]
        length = np.linalg.norm(np.gradient(path, axis=1), axis=-1)
        offsets = path[..., None] - np.arange(SIZE, dtype=np.float32)
        columns, rows = np.moveaxis(np.exp(-(offsets**2) / (2 * _SIGMA**2)), 2, 0)
        ink = (_INK / (_SIGMA * np.sqrt(2 * np.pi)) * length).astype(np.float32)
        images = (rows * ink[..., None]).swapaxes(1, 2) @ columns
        # What is far below a printable grey is black: Gaussians never end.
        images = np.where(images < 1e-3, 0, np.minimum(images, 1))
        yield images.reshape(-1, SIZE**2).astype(np.float32)
