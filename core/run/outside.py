"""What a user names on the command line and no recipe can: programs and addresses elsewhere that judge samples.

They belong to the process: nothing of them is written into a run folder, so a resume needs them again. Torch-free.
"""

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from limbeck.core.run.errors import BadInput, clean, did_you_mean

FLAGS = {"program": "--reward-program", "address": "--reward-address"}
VALUES = {"program": "COMMAND", "address": "http://HOST:PORT"}


@dataclass
class Outside:
    """Commands and addresses by the names that recipes use."""

    program: dict[str, list[str]] = field(default_factory=dict)
    address: dict[str, str] = field(default_factory=dict)


_named = Outside()


def programs() -> dict[str, list[str]]:
    """The commands of this process by name, each as its list of arguments."""
    return _named.program


def addresses() -> dict[str, str]:
    """The reward servers elsewhere by name."""
    return _named.address


def take(programs: Sequence[str], addresses: Sequence[str]) -> None:
    """Read NAME=COMMAND and NAME=ADDRESS items, in place of what was known; BadInput where one cannot work."""
    _named.program = {name: _command(name, text) for name, text in _pairs("program", programs)}
    _named.address = {name: _address(name, text) for name, text in _pairs("address", addresses)}


def _pairs(kind: str, items: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name or not text.strip():
            raise BadInput(f"{FLAGS[kind]} {clean(item, 80)}: write it as {FLAGS[kind]} NAME={VALUES[kind]}")
        if name in seen:
            raise BadInput(f"{FLAGS[kind]} {clean(name, 40)}: given twice; give it once")
        seen.add(name)
        yield name, text.strip()


def _command(name: str, text: str) -> list[str]:
    where = f"{FLAGS['program']} {clean(name, 40)}"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{where}: {clean(text, 80)} cannot be split into words ({error}); check its quotes") from None
    if not words or shutil.which(words[0]) is None:
        raise BadInput(f"{where}: there is no program {clean(words[0] if words else text, 80)} that can be run")
    return words


def _address(name: str, text: str) -> str:
    try:
        place = urlsplit(text)
        good = place.scheme == "http" and place.hostname and place.port and place.netloc.count("@") == 0
        good = good and place.path in ("", "/") and not place.query and not place.fragment
    except ValueError:
        good = False
    if not good:
        raise BadInput(f"{FLAGS['address']} {clean(name, 40)}: {clean(text, 80)} must be {VALUES['address']}")
    return text.rstrip("/")


def wanted(rewards: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of everything that a recipe's rewards, as plain data, leave to the command line."""
    if isinstance(rewards, dict):
        kind = {"program": "program", "remote": "address"}.get(str(rewards.get("kind")))
        if kind and rewards.get("name"):
            yield kind, rewards["name"]
    items = rewards.values() if isinstance(rewards, dict) else rewards if isinstance(rewards, list) else ()
    for item in items:
        yield from wanted(item)


def missing(kind: str, name: str) -> BadInput:
    """The error that says which flag is needed."""
    return BadInput(
        f"the {kind} of the reward {clean(name, 40)} is named on the command line alone, also at resume: add "
        f"{FLAGS[kind]} {clean(name, 40)}={VALUES[kind]}"
    )


def agree(rewards: Any) -> None:
    """BadInput unless what the recipe asks for and what the command line names are the same."""
    asked = set(wanted(rewards))
    for kind, name in sorted(asked):
        if name not in getattr(_named, kind):
            raise missing(kind, name)
    for kind in FLAGS:
        known = [name for found, name in asked if found == kind]
        for name in getattr(_named, kind):
            if name not in known:
                hint = did_you_mean(name, known)
                raise BadInput(f"{FLAGS[kind]} {clean(name, 40)}: no reward of the recipe has this name{hint}")


def arguments(programs: Sequence[str], addresses: Sequence[str]) -> list[str]:
    """The same as flags, for worker processes."""
    given = {"program": programs, "address": addresses}
    return [part for kind, items in given.items() for item in items for part in (FLAGS[kind], item)]


def flags_for(rewards: Any) -> list[str]:
    """What this process was told of the rewards that a recipe asks for, as flags for a process that carries it out."""
    asked = set(wanted(rewards))
    programs = [f"{n}={shlex.join(words)}" for n, words in _named.program.items() if ("program", n) in asked]
    addresses = [f"{n}={text}" for n, text in _named.address.items() if ("address", n) in asked]
    return arguments(programs, addresses)


def hidden(words: Sequence[str]) -> list[str]:
    """A command line without the commands and addresses, as it may be kept in a run folder."""
    out, flags = [], set(FLAGS.values())
    for i, word in enumerate(words):
        flag, equals, text = word.partition("=")
        if flag in flags and equals:
            out.append(f"{flag}={text.partition('=')[0]}=…")
        elif i and words[i - 1] in flags:
            out.append(f"{word.partition('=')[0]}=…")
        else:
            out.append(word)
    return out
