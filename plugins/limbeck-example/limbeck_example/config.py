from limbeck.api import Strict


class Radius(Strict):
    """How far from the origin is best."""

    best: float = 2.1
