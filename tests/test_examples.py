"""The generated curves: seeded, in range, shaped as said, and told by eight numbers."""

import numpy as np
import pytest

from curvature import examples


def test_the_seed_decides_and_a_longer_set_begins_with_the_shorter():
    images = examples.curves(5, seed=3)
    np.testing.assert_array_equal(images, examples.curves(5, seed=3))
    np.testing.assert_array_equal(images, examples.curves(1200, seed=3)[:5])
    assert (images != examples.curves(5, seed=4)).any(axis=1).all()


def test_images_are_dark_grey_images_with_a_stroke_and_no_two_are_alike():
    images = examples.curves(2000)
    assert images.shape == (2000, 784) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1
    lit = (images > 0.5).mean(axis=1)
    assert lit.min() > 0.002 and lit.max() < 0.2 and 0.03 < lit.mean() < 0.1
    assert len(np.unique(images, axis=0)) == len(images)


def test_no_images_are_an_empty_array():
    assert examples.curves(0).shape == (0, 784)


def test_a_stroke_lies_where_its_control_points_say():
    line = np.array([[4, 20], [8, 20], [16, 20], [20, 20]], np.float32)  # column, row
    image = examples.draw(line[None])[0].reshape(28, 28)
    assert (image[20, 6:19] == 1).all()
    assert image[16].max() < 0.01 and image[20, :1].max() < 0.01
    np.testing.assert_allclose(image[19], image[21], rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eight_numbers_tell_an_image(seed):
    points = examples.control_points(1, seed)
    moves = np.eye(8, dtype=np.float32).reshape(8, 4, 2)
    differences = examples.draw(points + moves) - examples.draw(points - moves)
    assert np.linalg.matrix_rank(differences, tol=0.1) == 8
