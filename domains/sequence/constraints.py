"""Hard constraints on designs: forbidden words, runs, GC, letters and templates, kept by masking logits.

A walk that reveals one letter at a time (first-hitting) draws each from the letters that some sequence within all rules
still has: the look-ahead is to the very end, so that a walk does not get stuck. What is drawn is the model's
conditional, renormalised over those letters. Legend: B sequences, L length, V letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Model, Output, Prediction
from limbeck.core.diffusion.discrete import NEVER, FirstHitting, MaskProcess
from limbeck.core.diffusion.time import times
from limbeck.core.run.errors import BadInput, LimbeckError, clean
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.automaton import Automaton, Word, open_letters
from limbeck.domains.sequence.config import Design
from limbeck.domains.sequence.text import Alphabet, complement

STRONG = "GC"


@dataclass(frozen=True)
class Rules:
    """What every design of `length` letters keeps; `gc` counts letters, `words` holds both strands' of DNA."""

    alphabet: Alphabet
    length: int
    template: str
    words: tuple[str, ...] = ()
    longest: int | None = None  # letters of a run
    gc: tuple[int, int] | None = None
    omit: str = ""

    @property
    def forbidden(self) -> tuple[str, ...]:
        """All words that may not occur, those of too long runs included."""
        runs = [letter * (self.longest + 1) for letter in self.alphabet.letters] if self.longest else []
        return (*self.words, *runs)

    @cached_property
    def allowed(self) -> Tensor:
        """Letters that template and omissions admit at each place, bool [L,V]."""
        kept = torch.tensor([letter not in self.omit for letter in self.alphabet.letters])
        return tokens.allowed(self.template, self.alphabet) & kept

    @cached_property
    def machine(self) -> Automaton:
        """The automaton of the forbidden words."""
        return Automaton([numbers(word, self.alphabet) for word in self.forbidden], self.alphabet.size)

    def open(self, admitted: Tensor) -> Tensor:
        """Which of the admitted letters [B,L,V] bool lead to a whole sequence within the rules."""
        if not self.forbidden and self.gc is None:
            return admitted
        if self.gc is None:
            return open_letters(self.machine, admitted, torch.zeros(1, self.alphabet.size), [0])
        strong = torch.tensor([letter in STRONG for letter in self.alphabet.letters])
        counted, ceilings = torch.stack([strong, ~strong]), [self.gc[1], self.length - self.gc[0]]
        return open_letters(self.machine, admitted, counted, ceilings)

    def possible(self, allowed: Tensor) -> bool:
        """Whether any sequence of the letters allowed [L,V] keeps all rules."""
        return bool(self.open(allowed[None]).any(-1).all())


def numbers(word: str, alphabet: Alphabet) -> Word:
    """A word of codes as the letters, by number, of each place."""
    return tuple(frozenset(alphabet.letters.index(letter) for letter in alphabet.codes[code]) for code in word)


def parse(design: Design, alphabet: Alphabet, length: int) -> Rules:
    """What a recipe's `design` says, checked; BadInput for what no sequence can keep."""
    template = alphabet.clean(design.template or alphabet.any * length, "design.template")
    if len(template) != length:
        raise BadInput(f"design.template has {len(template)} letters and the model {length}; make them the same")
    omit = alphabet.clean(re.sub(r"[,\s]", "", design.omit or ""), "design.omit")
    gc = None if design.gc is None else bounds(design.gc, alphabet, length)
    found = Rules(alphabet, length, template, words_of(design.avoid or "", alphabet), design.homopolymer, gc, omit)
    barred(found)
    check(found, found.allowed)
    return found


def words_of(text: str, alphabet: Alphabet) -> tuple[str, ...]:
    """`GAATTC,GGATCC` as words, for DNA with their reverse complements."""
    given = [alphabet.clean(part, "design.avoid") for part in re.split(r"[,\s]+", text) if part]
    turned = [complement(word, alphabet) for word in given] if alphabet.name == "dna" else []
    return tuple(dict.fromkeys([*given, *turned]))


def bounds(text: str, alphabet: Alphabet, length: int) -> tuple[int, int]:
    """`0.4-0.6` as the least and the largest number of G and C."""
    if alphabet.name == "protein":
        raise BadInput("design.gc: a protein has no G and C content; leave it out")
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*", text)
    low, high = (float(match[1]), float(match[2])) if match else (2.0, 2.0)
    if max(low, high) > 1:
        raise BadInput(f"design.gc: {clean(text, 40)} is no range of shares; write it as 0.4-0.6")
    if high < low:
        raise BadInput(f"design.gc: {clean(text, 40)} runs backwards; write {high:g}-{low:g}")
    least, most = math.ceil(low * length - 1e-9), math.floor(high * length + 1e-9)
    if most < least:
        raise BadInput(f"design.gc: no number of G and C in {length} letters is within {clean(text, 40)}; widen it")
    return least, most


def barred(rules: Rules) -> None:
    """BadInput where the template leaves no letter, or spells a forbidden word whatever its codes become."""
    for place, row in enumerate(rules.allowed.any(1).tolist()):
        if not row:
            raise BadInput(
                f"design.omit leaves no letter for {rules.template[place]} at position {place + 1}; admit one"
            )
    fixed = "".join(spelled(row, rules.alphabet) for row in rules.allowed)
    for text in violations([fixed], replace(rules, gc=None, omit="")):
        raise BadInput(f"design.template cannot be kept: {text.removeprefix('sequence 1: ')}")


def spelled(row: Tensor, alphabet: Alphabet) -> str:
    """The only letter that a place [V] admits, or a blank."""
    return alphabet.letters[int(row.int().argmax())] if int(row.sum()) == 1 else "_"


def check(rules: Rules, allowed: Tensor, where: str = "design") -> None:
    """BadInput where no sequence of the letters allowed [L,V] keeps all rules; it names those in conflict."""
    if rules.possible(allowed):
        return
    without = {
        "avoid": replace(rules, words=()),
        "homopolymer": replace(rules, longest=None),
        "gc": replace(rules, gc=None),
    }
    named = [name for name, other in without.items() if other != rules and other.possible(allowed)]
    free = torch.ones_like(allowed)
    named += [name for name, same in (("template or omit", allowed.equal(free)),) if not same and rules.possible(free)]
    text = ", ".join(named) or ", ".join(name for name, other in without.items() if other != rules)
    raise BadInput(f"{where}: no sequence of {rules.length} letters keeps all rules; in conflict: {text}; relax one")


def violations(texts: Iterable[str], rules: Rules) -> list[str]:
    """What is wrong with finished sequences, one line each, found without the automaton; empty if nothing is."""
    return [f"sequence {n}: {line}" for n, text in enumerate(texts, 1) for line in _wrong(text, rules)]


def _wrong(text: str, rules: Rules) -> Iterator[str]:
    codes = rules.alphabet.codes
    for word in rules.words:
        pattern = "".join(f"[{codes[code]}]" for code in word)
        for match in re.finditer(f"(?={pattern})", text):
            yield f"the forbidden {word} at position {match.start() + 1}"
    if rules.longest:
        for match in re.finditer(rf"([A-Z])\1{{{rules.longest},}}", text):
            yield f"{len(match[0])} {match[1]} in a row at position {match.start() + 1}, {rules.longest} are allowed"
    strong = sum(letter in STRONG for letter in text)
    if rules.gc and not rules.gc[0] <= strong <= rules.gc[1]:
        yield f"{strong} of {len(text)} letters are G or C, {rules.gc[0]} to {rules.gc[1]} are allowed"
    if len(text) != len(rules.template):
        yield f"{len(text)} letters, not {len(rules.template)}"
    for place, (letter, code) in enumerate(zip(text, rules.template, strict=False), 1):
        if letter in rules.omit or (letter != tokens.HOLE and letter not in codes[code]):
            yield f"{letter} at position {place}, where {code} without {rules.omit or 'omissions'} is asked for"


class Constrained(Denoiser):
    """A denoiser of masked tokens whose forbidden letters have the logit -1e6, given what x_t already reveals.

    Exact where one letter is revealed between two calls (`FirstHitting`); a step that reveals several independently can
    break a rule that no single letter of it breaks. `bias` [V] is added to the logits. A condition may bring `allowed`
    [B,L,V] bool, the letters that each row's template admits. Soft rows are read by their largest letter.
    """

    def __init__(self, inner: Denoiser, rules: Rules, bias: Tensor) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.rules, self.bias = inner, rules, bias

    @property
    def network(self) -> nn.Module:
        """The net behind the denoiser (exporters read it)."""
        found: Any = self.inner.network
        return found  # type: ignore[no-any-return]

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        rest = {key: value for key, value in cond.items() if key != "allowed"}
        out = self.inner(x_t, t, rest, features)
        raw, taps = out if isinstance(out, tuple) else (out, None)
        size = self.rules.alphabet.size
        logits = (raw[..., :size] + self.bias.to(raw)).masked_fill(~self.open(x_t, cond), NEVER)
        return logits if taps is None else (logits, taps)

    def open(self, x_t: Tensor, cond: Encoded) -> Tensor:
        """Which letters [B,L,V] each place may still take; all of them where the letter is known already."""
        size = self.rules.alphabet.size
        state = (x_t.argmax(-1) if x_t.is_floating_point() else x_t).cpu()
        masked = (state == size)[..., None]
        allowed = cond["allowed"].cpu() if "allowed" in cond else self.rules.allowed
        found = self.rules.open(torch.where(masked, allowed, tokens.onehot(state, size).bool()))
        if bool((masked[..., 0] & ~found.any(-1)).any()):
            raise LimbeckError(
                "a walk came to a state from which no sequence keeps all rules of `design`; reveal one letter a step "
                "(the kernel first_hitting) and widen gc"
            )
        return (found | ~masked).to(x_t.device)

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return self.inner.wrap(raw, x_t, t, features)

    def begin(self, times: Tensor) -> Denoiser:
        return Constrained(self.inner.begin(times), self.rules, self.bias)

    def pick(self, index: Tensor) -> Denoiser:
        return Constrained(self.inner.pick(index), self.rules, self.bias)


class Templates:
    """Prompts as conditions: `allowed` [B,L,V] joins each prompt with the design, `fixed` [B,L] has what is certain."""

    def __init__(self, inner: Callable[[list[str]], Encoded], rules: Rules) -> None:
        self.inner, self.rules = inner, rules
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str]) -> Encoded:
        cond = self.inner(prompts)
        size, device = self.rules.alphabet.size, cond["fixed"].device
        allowed = torch.stack([self.admitted(prompt) for prompt in prompts])
        fixed = torch.where(allowed.sum(-1) == 1, allowed.int().argmax(-1), size)
        return cond | {"fixed": fixed.to(device), "allowed": allowed.to(device)}

    def admitted(self, prompt: str) -> Tensor:
        """Letters that the design and one prompt admit, [L,V]; BadInput where they contradict each other."""
        if prompt not in self.known:
            rules = self.rules
            text = rules.alphabet.clean(prompt, "template") or rules.alphabet.any * rules.length
            found = rules.allowed & tokens.allowed(text, rules.alphabet)
            if not bool(found.any(1).all()):
                place = int((~found.any(1)).int().argmax())
                raise BadInput(f"the prompt asks for {text[place]} at position {place + 1}, where design forbids it")
            check(rules, found, "the prompt's template")
            self.known[prompt] = found
        return self.known[prompt]

    def place(self, x: Tensor, cond: Encoded) -> Tensor:
        """A first state x [B,L] with the letters that are certain."""
        return torch.where(cond["fixed"] == self.rules.alphabet.size, x, cond["fixed"])


class OneByOne(Model):
    """A model whose walk reveals one letter a step, whatever number of steps is asked for."""

    def grid(self, steps: int) -> Tensor:
        """L + 1 even times."""
        return times(self.shape[0], self.denoiser.process)


def constrained_model(model: Model, design: Design, alphabet: Alphabet) -> Model:
    """The model under a design's rules: denoiser, templates, first state, kernel and times; BadInput for a conflict."""
    if not isinstance(model.denoiser.process, MaskProcess):
        raise BadInput("design needs a masked model; uniform noise reveals no letter for good")
    rules = parse(design, alphabet, model.shape[0])
    encode = Templates(model.encode, rules)
    return OneByOne(
        Constrained(model.denoiser, rules, tokens.biases(design.bias, alphabet, "design.bias")),
        model.shape,
        model.codec,
        encode,
        model.name,
        model.uncond,
        encode.place,
        FirstHitting(),
    )
