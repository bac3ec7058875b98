"""From tokens to text as they come: characters of several tokens are held back, a stop string ends the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import ConfigError, Fault

_UNFINISHED = "\ufffd"
"""What bytes decode to that are not, or not yet, a character."""
_LONGEST = 4
"""Tokens of a character: bytes of UTF-8."""
_CONTEXT = 8
"""Tokens of the prompt that the first piece is decoded after: some decoders drop a space at the beginning."""


class TextStream:
    """The text of one prompt's new tokens, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Begin after a prompt; the text ends before the first of the strings `stop`."""
        if any(not each for each in stop):
            raise ConfigError([Fault("stop", "''", "a text of one character or more")])
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-_CONTEXT:])
        self._begin, self._read = 0, len(self._tokens)  # decoded together, and of these decoded already
        self._given = 0

    def add(self, token: int) -> str:
        """Take the next token; return what is certain of the text and was not returned before, perhaps nothing."""
        self._tokens.append(token)
        while not self.stopped and self._decode():
            pass
        return self._certain(self._held_back())

    def finish(self) -> str:
        """Return the rest of the text, an unfinished character as U+FFFD."""
        while not self.stopped and self._read < len(self._tokens):
            self._decode(final=True)
        return self._certain(0)

    def _decode(self, *, final: bool = False) -> bool:
        """Decode the fewest tokens that end with a character; return whether there were any."""
        n_waiting = len(self._tokens) - self._read
        for end in range(self._read + 1, self._read + 1 + min(n_waiting, _LONGEST)):
            if not (piece := self._after(end)).endswith(_UNFINISHED):
                break
        else:
            if not n_waiting or not (final or n_waiting >= _LONGEST):
                return False
            end = self._read + 1  # no character begins here
            piece = self._after(end)
        self.text += piece
        self._begin, self._read = max(self._begin, self._read - _CONTEXT), end
        self._find_stop(len(piece))
        return True

    def _after(self, end: int) -> str:
        """Return what the tokens up to `end` add to the text."""
        before, after = (self._decoded(self._tokens[self._begin : upto]) for upto in (self._read, end))
        return after[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(np.asarray(tokens, dtype=np.int64))

    def _find_stop(self, n_new: int) -> None:
        found = [self.text.find(stop, max(0, len(self.text) - n_new - len(stop) + 1)) for stop in self._stop]
        if places := [place for place in found if place >= 0]:
            self.text, self.stopped = self.text[: min(places)], True

    def _held_back(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        if self.stopped:
            return 0
        lengths = range(max(map(len, self._stop), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)

    def _certain(self, n_held: int) -> str:
        piece = self.text[self._given : len(self.text) - n_held]
        self._given += len(piece)
        return piece
