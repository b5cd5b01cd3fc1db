"""MODELS_FILE: more servers of models, their defaults and limits, and what is said of a file that cannot be used."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.config import Config
from aistream.endpoints import Endpoint
from aistream.environment import load
from aistream.errors import ConfigError
from tests.service import SECRET

REQUIRED = {"DEV_MODE": "true", "JWT_SECRET": SECRET, "MODELS_FILE": "models.toml"}


def configured(text: str, **environ: str) -> Config:
    """The configuration with this file."""
    return Config.from_env({**REQUIRED, **environ}, lambda _: text)


def alias(text: str, name: str, **environ: str) -> Endpoint:
    """One endpoint of it."""
    (found,) = [endpoint for endpoint in configured(text, **environ).endpoints if endpoint.name == name]
    return found


def faults(text: str, **environ: str) -> list[str]:
    """What is said of it."""
    with pytest.raises(ConfigError) as refused:
        configured(text, **environ)
    return list(refused.value.faults)


FULL = """
[ollama]
base_url = "http://127.0.0.1:11434/v1/"

[Fast]
base_url = "https://api.mistral.ai/v1"
key_variable = "MISTRAL_API_KEY"
model = "mistral-small-latest"
models = ["mistral-small-latest", "mistral-large-latest"]
defaults = { temperature = 0.3, max_tokens = 1000, stop = ["END"], reasoning_effort = "low", safe = true, a = { b = [1, 2.5] } }
limits = { max_tokens = 4000, concurrency = 8, queue = 0, queue_seconds = 20, first_token_seconds = 120, silence_seconds = 30.5 }

[claude-proxy]
base_url = "http://proxy:4000"
api = "anthropic"
anthropic_version = "2023-06-01"

[openai]
limits = { concurrency = 200 }
"""


def test_without_a_file_there_are_the_two_built_in_providers() -> None:
    config = Config.from_env({"DEV_MODE": "true", "JWT_SECRET": SECRET, "OPENAI_API_KEY": "k"})

    assert [(one.name, one.api, one.base_url, one.usable) for one in config.endpoints] == [
        ("openai", "openai", "https://api.openai.com/v1", True),
        ("anthropic", "anthropic", "https://api.anthropic.com", False),
    ]


def test_an_alias_names_base_url_key_defaults_and_limits() -> None:
    fast = alias(FULL, "fast", MISTRAL_API_KEY=" the-key ")

    assert (fast.api, fast.base_url, fast.key, fast.usable) == ("openai", "https://api.mistral.ai/v1", "the-key", True)
    assert (fast.model, fast.models) == ("mistral-small-latest", ("mistral-small-latest", "mistral-large-latest"))
    assert (fast.defaults.temperature, fast.defaults.max_tokens, fast.defaults.stop) == (0.3, 1000, ["END"])
    assert (fast.defaults.reasoning_effort, fast.extra) == ("low", {"safe": True, "a": {"b": [1, 2.5]}})
    limits = fast.limits
    assert (limits.max_tokens, limits.concurrency, limits.queue, limits.queue_seconds) == (4000, 8, 0, 20)
    assert (limits.first_token_seconds, limits.silence_seconds) == (120, 30.5)


def test_a_server_that_wants_no_key_is_usable_without_one_and_others_are_not() -> None:
    assert alias(FULL, "ollama").usable and alias(FULL, "ollama").base_url == "http://127.0.0.1:11434/v1"
    assert not alias(FULL, "fast").usable
    assert (alias(FULL, "claude-proxy").api, alias(FULL, "claude-proxy").anthropic_version) == ("anthropic", "2023-06-01")


def test_the_built_in_providers_take_limits_too_and_keep_their_addresses() -> None:
    openai = alias(FULL, "openai", OPENAI_API_KEY="k", OPENAI_BASE_URL="http://127.0.0.1:1/v1")

    assert (openai.limits.concurrency, openai.base_url, openai.key) == (200, "http://127.0.0.1:1/v1", "k")


def test_a_key_shows_nowhere() -> None:
    config = configured(FULL, MISTRAL_API_KEY="the-secret-key")

    assert "the-secret-key" not in repr(config) + repr(config.endpoints) + str(config.endpoints[-2])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = =", "is not TOML: Invalid value (at line 1, column 5)"),
        ("x = 3", "[x] expected a table"),
        ("[a]", "[a] base_url is missing: it is required"),
        ("[a]\nbase_url = 3", "[a] base_url: expected a valid string"),
        ('[a]\nbase_url = "a.test"', "[a] base_url: expected a URL such as http://127.0.0.1:11434/v1"),
        ('[a]\nbase_url = "https://u:sk-secret@a.test"', "[a] base_url: expected a URL such as http://127.0.0.1:11434/v1"),
        ('[a]\nbase_url = "https://a.test/v1?key=sk-secret"', "[a] base_url: expected a URL such as http://127.0.0.1:11434/v1"),
        (
            '[a]\nbase_url = "http://a"\nkey_variable = "sk-secret"',
            "[a] key_variable: expected the name of a variable, such as MISTRAL_API_KEY",
        ),
        ('[a]\nbase_url = "http://a"\nkey = "sk-secret"', "[a] key: is unknown"),
        ('[a]\nbase_url = "http://a"\napi = "gemini"', "[a] api: expected 'openai' or 'anthropic'"),
        ('[a]\nbase_url = "http://a"\nanthropic_version = "new"', "[a] anthropic_version: expected a date such as 2023-06-01"),
        ('[a]\nbase_url = "http://a"\nmodel = "m"\nmodels = ["n"]', "[a] model is none of models"),
        (
            '[a]\nbase_url = "http://a"\ndefaults = {temperature = 3}',
            "[a] defaults.temperature: expected less than or equal to 2",
        ),
        (
            '[a]\nbase_url = "http://a"\ndefaults = {stream = false}',
            "[a] defaults.stream is the service's own: expected another parameter",
        ),
        (
            '[a]\nbase_url = "http://a"\ndefaults = {since = 2026-01-01}',
            "[a] defaults.since is no JSON: expected text, numbers, lists and tables of them",
        ),
        (
            '[a]\nbase_url = "http://a"\ndefaults = {weight = inf}',
            "[a] defaults.weight is no JSON: expected text, numbers, lists and tables of them",
        ),
        ('[a]\nbase_url = "http://a"\nlimits = {concurrency = 0}', "[a] limits.concurrency: expected greater than or equal to 1"),
        ('[a]\nbase_url = "http://a"\nlimits = {rpm = 5}', "[a] limits.rpm: is unknown"),
        ('[echo]\nbase_url = "http://a"', "[echo] is taken: expected another name"),
        ('[a]\nbase_url = "http://a"\n[A]\nbase_url = "http://b"', "[A] is taken: expected another name"),
        ('["a/b"]\nbase_url = "http://a"', "['a/b'] is no name: expected 1 to 40 letters, digits, - and _"),
        ('[openai]\nbase_url = "http://a"', "[openai] base_url is not set here: expected a variable"),
        ('[anthropic]\nkey_variable = "MY_KEY"', "[anthropic] key_variable is not set here: expected a variable"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_start_and_says_where(text: str, fault: str) -> None:
    found = faults(text)

    assert found == [f"MODELS_FILE {fault}"]
    assert "secret" not in found[0]


def test_all_faults_of_a_file_are_told_at_once_with_those_of_the_variables() -> None:
    found = faults('[a]\nbase = "x"\nlimits = {queue = -1}\n[b]', PORT="x")

    assert [fault.partition(":")[0] for fault in found] == [
        "PORT is 'x'",
        "MODELS_FILE [a] limits.queue",
        "MODELS_FILE [a] base",
        "MODELS_FILE [b] base_url is missing",
    ]


def test_the_file_is_read_from_the_folder_of_the_service(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[a]\nbase_url = "http://a"\nkey_variable = "A_KEY"')
    (tmp_path / ".env").write_text("MODELS_FILE=models.toml\nA_KEY=from-the-file\n")

    config = load({"DEV_MODE": "true", "JWT_SECRET": SECRET}, tmp_path)

    assert [(one.name, one.key) for one in config.endpoints][-1] == ("a", "from-the-file")


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file or directory"), (b"\xff\xfe[", "is no UTF-8")])
def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "models.toml").write_bytes(content)

    with pytest.raises(ConfigError) as refused:
        load(REQUIRED, tmp_path)

    assert list(refused.value.faults) == [f"MODELS_FILE is 'models.toml', which cannot be read: {reason}"]


def test_a_default_provider_may_be_an_alias() -> None:
    assert configured(FULL, DEFAULT_PROVIDER="Ollama").default_provider == "ollama"
    assert faults(FULL, DEFAULT_PROVIDER="groq") == [
        "DEFAULT_PROVIDER is 'groq': expected one of openai, anthropic, ollama, fast, claude-proxy"
    ]


NAMES = st.sampled_from(["base_url", "api", "key_variable", "model", "models", "defaults", "limits", "openai", "a", "max_tokens"])
VALUES = st.recursive(
    st.sampled_from(['"http://a/v1"', '"x"', "1", "-1.5", "inf", "true", "1979-05-27", '"""', "[", "'\0'"]) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda many: f"[{','.join(many)}]")
        | st.dictionaries(NAMES, inner, max_size=3).map(lambda pairs: f"{{{','.join(f'{k}={v}' for k, v in pairs.items())}}}")
    ),
    max_leaves=4,
)
LINES = st.one_of(
    NAMES.map(lambda name: f"[{name}]"), st.tuples(NAMES, VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"), st.text(max_size=8)
)


@settings(deadline=None)
@given(st.lists(LINES, max_size=6).map("\n".join))
def test_whatever_stands_in_the_file_is_taken_or_told_as_a_fault_of_it(text: str) -> None:
    try:
        config = configured(text)
    except ConfigError as error:
        assert [fault for fault in error.faults if not fault.startswith("MODELS_FILE ")] == []
    else:
        assert {"openai", "anthropic"} <= {endpoint.name for endpoint in config.endpoints}
