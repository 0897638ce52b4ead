"""Errors a user can act on: one clear line, printed without a traceback; `code` is the exit status."""

from collections.abc import Iterable


class LimbeckError(Exception):
    """The run failed; the message says why and what to do."""

    code = 1


class BadInput(LimbeckError):
    """A recipe, an option or a file is not as it must be."""

    code = 2


class NonFinite(LimbeckError):
    """A loss or gradient was NaN or infinite; nothing was updated."""

    def __init__(self, player: str, step: int, tensor: str) -> None:
        self.player, self.step, self.tensor = player, step, tensor
        super().__init__(
            f"step {step}: {tensor} of {player} is NaN or infinite; nothing was updated. "
            "Lower the learning rate, clip gradients, or use precision: fp32"
        )


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the nearest option, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, [str(option) for option in options], n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def clean(text: object, limit: int = 200) -> str:
    """One printable line of at most `limit` characters, for quoting foreign text in a message."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"
