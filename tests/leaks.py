"""What no process of the suite may print, and how it is looked for.

Every `Service` is searched when it ends, so that each test that starts one is a test of its log as well; what the tests' own
process prints is searched by a hook in conftest.py.
"""

import re
from collections.abc import Iterable, Mapping

from aistream.config import settings
from tests.neighbours import wires

#: A word of every ordinary test's prompt, and so of what `echo` answers.
CANARY = "canary-4f0c"
#: What looks like a secret, whosever it is.
_SHAPES = [
    ("a JWT", re.compile(r"eyJ[\w-]{5,}\.eyJ[\w-]{5,}\.[\w-]*")),
    ("an access token in a URL", re.compile(r"access_token=[^\s\"'\\]+")),
    ("a resumeUrl's signature", re.compile(r"signature=[^\s\"'\\]+")),
    ("a webhook secret", re.compile(r"whsec_[\w+/=]+")),
    ("a word of a test model's answer", re.compile(r"\bword\d+\b|is the test provider")),
    ("the canary of all prompts", re.compile(re.escape(CANARY))),
]
#: Values that are no secret, whatever their setting: an address of this machine.
_OPEN = re.compile(r"(redis|unix)://[^@]*|memory://")


def secrets_of(environ: Mapping[str, str]) -> list[str]:
    """The values of these variables that nobody may see: of the settings that say so, and of keys."""
    hidden = {name for name, setting in settings().items() if setting.secret}
    named = [value for name, value in environ.items() if name in hidden or name.endswith(("_KEY", "_TOKEN"))]
    return [value for value in named if len(value) >= 8 and not _OPEN.fullmatch(value)]


def leaks(text: str, secrets: Iterable[str] = ()) -> list[str]:
    """Every line that has what it may not have: what that is, and the line with it masked."""
    known = [(f"a secret of {len(one)} characters", re.compile(re.escape(one))) for one in {*secrets, *wires.SECRETS}]
    return [
        f"{what}: {pattern.sub('█', line)[:500]}"
        for what, pattern in [*_SHAPES, *known]
        if pattern.search(text)
        for line in text.splitlines()
        if pattern.search(line)
    ]
