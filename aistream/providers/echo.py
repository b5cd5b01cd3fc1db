"""The built-in model: says the prompt back, word by word. For a first look and for debugging, without a key."""

from __future__ import annotations

import re
import time

import gevent

from aistream.endpoints import Endpoint
from aistream.events import End, Text, Usage
from aistream.providers.base import Call, Say, parameters
from aistream.session import Request

#: Seconds before each word: about the pace of a large model.
PACE = 0.03
#: A word with the blanks behind it, so that the pieces joined are the text.
_WORDS = re.compile(r"\s*\S+\s?|\s+")


class EchoProvider:
    """Answers every prompt with itself. A word is a token; `max_tokens` and `stop` are honoured as a model honours them."""

    def __init__(self) -> None:
        self.endpoint = Endpoint(name="echo", api="openai", base_url="", models=("echo",))

    def warnings(self, request: Request) -> list[str]:
        """See `Provider.warnings`."""
        unsent = [name for name in ("temperature", "top_p", "reasoning_effort") if getattr(request, name) is not None]
        return [f"{name} is not sent: echo does not take it" for name in unsent]

    def models(self, timeout: float) -> list[str]:
        """See `Provider.models`."""
        return ["echo"]

    def answer(self, request: Request, model: str, call: Call, say: Say) -> End:
        """Says the prompt's words, at an even pace."""
        call.requests += 1
        limit = parameters(request, self.endpoint).max_tokens
        text = request.prompt
        stops = [text.index(stop) for stop in request.stop if stop in text]
        if stops:
            text = text[: min(stops)]
        words = _WORDS.findall(text)
        for word in words[:limit]:
            gevent.sleep(PACE)
            call.heard_at = time.monotonic()
            say(Text(word))
        say(Usage(sum(len(_WORDS.findall(text)) for text in request.texts()), min(len(words), limit)))
        return End("length" if len(words) > limit else "stop")

    def warm_up(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
