"""Sets of points in the plane: a ring, a cross or a spiral, each of 12 points, as one sample."""
