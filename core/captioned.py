"""Pictures and clips with a name, a group and keywords: captions at three levels, and what a mirror may not touch."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Captions = Literal["name", "mixed"]
COARSE = 1 / 3  # share of the mixed captions at the level of a group or a keyword

# Group -> (caption, keyword or word of the name that it needs; "" holds for the whole group), first match wins.
GROUP_CAPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "Smileys & Emotion": (("a face", "face"), ("a cat face", "cat"), ("a heart", "heart"), ("an emotion", "")),
    "People & Body": (("a hand", "hand"), ("a person", "")),
    "Animals & Nature": (("a flower", "flower"), ("plant", "plant"), ("animal", "")),
    "Food & Drink": (("a drink", "drink"), ("fruit", "fruit"), ("food", "")),
    "Travel & Places": (("a vehicle", "vehicle"), ("a building", "building"), ("weather", "weather"), ("a place", "")),
    "Activities": (("sports", "sports"), ("an activity", "")),
    "Objects": (("clothing", "clothing"), ("an object", "")),
    "Symbols": (("a symbol", ""),),
    "Flags": (("a flag", ""),),
}

# A mirrored picture of these would be wrong: writing, numbers, clocks, directions, moon phases, charts.
UNMIRRORED = re.compile(
    r"(?i)\b(left|right|leftwards|rightwards|facing|arrow|clocks?|watch|o’clock|thirty|timer|hourglass|numbers?|letters?"
    r"|alphabet|text|written|moon|quarter|crescent|chart|calendar|newspaper|place medal|keyboard|atm|hundred points"
    r"|input|button|sign|banknote|receipt|passport|label|card|bank|hospital|hotel|school|post office|store|cinema"
    r"|dice|die|slot machine|8 ball|music|musical|score|note|notes|saxophone|guitar|violin|globe|map|zzz|page)\b"
)


def mirrorable(name: str, group: str, keywords: list[str]) -> bool:
    """Whether the mirrored picture still shows what its name says."""
    written = {"alphabet", "number", "numbers", "clock"}
    return group != "Symbols" and not UNMIRRORED.search(name) and not written.intersection(keywords)


def group_caption(name: str, group: str, keywords: list[str]) -> str:
    """The caption of a picture at the level of its group ("animal", "a face", "food")."""
    words = {*name.lower().split(), *keywords}
    return next(text for text, need in GROUP_CAPTIONS[group] if not need or need in words)


class Captioned:
    """Names, groups and keywords of N things, and random draws of captions."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """`rows` have a name, a group and keywords each."""
        self.names: list[str] = [r["name"] for r in rows]
        self.groups: list[str] = [r["group"] for r in rows]
        self.keywords: list[list[str]] = [r["keywords"] for r in rows]
        self.group_captions = [group_caption(r["name"], r["group"], r["keywords"]) for r in rows]
        self.mirror = torch.tensor([mirrorable(r["name"], r["group"], r["keywords"]) for r in rows])
        self.index = {name: i for i, name in enumerate(self.names)}
        self.known = frozenset(self.texts())

    def __len__(self) -> int:
        return len(self.names)

    def texts(self) -> list[str]:
        """Every caption that `batch` can give, each once (for caches of text states)."""
        coarse = [k for keywords in self.keywords for k in keywords]
        return list(dict.fromkeys([*self.names, *self.group_captions, *coarse]))

    def caption(self, indices: Tensor, gen: torch.Generator, captions: Captions) -> list[str]:
        """Names; with "mixed", a third at the level of the group (half of these) or of a keyword."""
        u = torch.rand(len(indices), 2, generator=gen).tolist()
        out = []
        for i, (level, which) in zip(indices.tolist(), u, strict=True):
            words = self.keywords[i]
            if captions == "name" or level >= COARSE:
                out.append(self.names[i])
            elif level < COARSE / 2 or not words:
                out.append(self.group_captions[i])
            else:
                out.append(words[int(which * len(words))])
        return out

    def prompts(self, n: int, gen: torch.Generator, captions: Captions = "mixed") -> list[str]:
        """n captions of uniformly drawn pictures, without the pictures."""
        return self.caption(torch.randint(len(self), (n,), generator=gen), gen, captions)

    def spread(self, n: int, gen: torch.Generator) -> Tensor:
        """Indices [n], as evenly as n allows over all names."""
        rounds = [torch.randperm(len(self), generator=gen) for _ in range(-(-n // len(self)))]
        return torch.cat(rounds)[:n]

    def knows(self, prompt: str) -> bool:
        """Whether the prompt is among the captions of the set."""
        return prompt in self.known

    def nearest(self, prompt: str, k: int = 3) -> list[str]:
        """The k names nearest to a prompt by shared words, then by spelling (for did-you-mean)."""
        wanted = prompt.lower()
        words = set(re.findall(r"\w+", wanted))

        def score(i: int) -> float:
            name = self.names[i].lower()
            own = set(re.findall(r"\w+", name))
            shared = len(words & own) / max(len(words | own), 1) + 0.5 * (len(words & set(self.keywords[i])) > 0)
            return shared + difflib.SequenceMatcher(None, wanted, name).ratio()

        return [self.names[i] for i in sorted(range(len(self)), key=score, reverse=True)[:k]]
