"""The built-in model: says the prompt back, word by word. For a first look and for debugging, without a key."""

from __future__ import annotations

import re
from collections.abc import Iterator

import gevent

from aistream.events import End, Reasoning, Text, Usage
from aistream.providers.base import Model
from aistream.session import Request

#: Seconds before each word: about the pace of a large model.
PACE = 0.03
#: A word with the blanks behind it, so that the pieces joined are the text.
_WORDS = re.compile(r"\s*\S+\s?|\s+")


class EchoProvider:
    """Answers every prompt with itself. A word is a token; `max_tokens` and `stop` are honoured as a model honours them."""

    ignores = frozenset({"temperature", "top_p"})

    def stream(self, request: Request, model: Model) -> Iterator[Text | Reasoning | Usage | End]:
        """The prompt's words, at an even pace."""
        text = request.prompt
        stops = [text.index(stop) for stop in request.stop if stop in text]
        if stops:
            text = text[: min(stops)]
        words = _WORDS.findall(text)
        for word in words[: request.max_tokens]:
            gevent.sleep(PACE)
            yield Text(word)
        said = sum(len(_WORDS.findall(message.content)) for message in request.conversation())
        yield Usage(said + len(_WORDS.findall(request.system or "")), min(len(words), request.max_tokens))
        yield End("length" if len(words) > request.max_tokens else "stop")

    def warm_up(self) -> None:
        """Nothing to do."""
