"""What recipes may say about this domain's pieces (imports no torch)."""

from pydantic import Field

from limbeck.api import Strict


class Data(Strict):
    """Draws from the reference sets, a little blurred."""


class Teacher(Strict):
    """`count` reference sets of each shape, each point blurred by `bandwidth`."""

    count: int = Field(200, ge=1)
    bandwidth: float = Field(0.08, gt=0)


class Student(Strict):
    """The size of the net."""

    width: int = Field(192, ge=1)
    depth: int = Field(3, ge=1)


class Plots(Strict):
    """How many samples of each shape are drawn."""

    count: int = Field(8, ge=1)


class Quality(Strict):
    """How many samples are measured."""

    count: int = Field(600, ge=6)
