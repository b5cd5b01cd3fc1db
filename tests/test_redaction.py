"""What of a provider's error text stands in the operator's log: the sentence, and none of what it gives away."""

import base64
import json
import random
import re
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aistream.providers.redaction import MARGIN, QUOTED, READ, SHOWN, redacted
from tests.neighbours.wires import (
    ANTHROPIC_ERRORS,
    FAKE_ANTHROPIC_KEY,
    FAKE_ANTHROPIC_ORGANISATION,
    FAKE_KEY,
    FAKE_ORGANISATION,
    OPENAI_ERRORS,
    SECRETS,
)

#: No deadline: the machine may be busy with something else.
EXAMPLES = settings(deadline=None)
PROMPT = 'Dear Dr. "Müller",\n\nmy IBAN is DE02 1203 0000 0000 2020 51.\tPlease cancel it – 緊急です 😀.'
UUID = FAKE_ANTHROPIC_ORGANISATION


# ---- Sentences that providers write ----

UNTOUCHED = [
    # OpenAI
    "This model's maximum context length is 128000 tokens. However, your messages resulted in 130512 tokens. Please reduce the"
    " length of the messages.",
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "Invalid value: 'asistant'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool', and 'developer'.",
    "The server had an error while processing your request. Sorry about that! (Please include the request ID"
    " req_0a1b2c3d4e5f60718293a4b5c6d7e8f9 in your message.)",
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth"
    " (i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username).",
    "Invalid type for 'messages[0].content[1].image_url': expected an object, but got a string instead.",
    "Invalid schema for response_format 'answer': In context=(), 'additionalProperties' is required to be false.",
    # Anthropic
    "prompt is too long: 205312 tokens > 200000 maximum",
    "max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for claude-sonnet-4-5-20250929",
    "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
    "Unexpected value(s) `output-128k-2025-02-19`, `fine-grained-tool-streaming-2025-05-14` for the `anthropic-beta` header.",
    "messages: roles must alternate between user and assistant; request_id: req_011CSHoEeqs5C35K2UUqR7Fy",
    "x-api-key: Field required; max_tokens: Field required",
    # OpenRouter
    "No endpoints found for meta-llama/Llama-3.3-70B-Instruct:free.",
    "This request requires more credits, or fewer max_tokens. You requested up to 65536 tokens, but can only afford 1234. To"
    " increase, visit https://openrouter.ai/settings/credits and upgrade to a paid account",
    # Mistral
    "Invalid model: mistral-large-2411-instruct, requests are limited to 1,000,000 tokens/minute",
    # vLLM
    "The model `neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w4a16` does not exist.",
    "1 validation error for ChatCompletionRequest: max_tokens must be at least 1, got -5 (user-provided, key-value, org-wide).",
    # Azure
    "The API deployment for this resource does not exist. If you created the deployment within the last 5 minutes, please wait.",
    "Access denied due to invalid subscription key or wrong API endpoint (eastus2, 2024-10-01-preview).",
    "HTTPSConnectionPool(host='api.openai.com', port=443): Read timed out. (read timeout=60.0)",
]


@pytest.mark.parametrize("sentence", UNTOUCHED)
def test_a_sentence_that_gives_nothing_away_stays_as_it_is(sentence: str) -> None:
    assert redacted(sentence, secrets=SECRETS, said=[PROMPT]) == sentence


MODELS = """
    gpt-4o-mini-2024-07-18 gpt-4.1 o4-mini-deep-research-2025-06-26 gpt-4o-audio-preview-2024-12-17 text-embedding-3-large
    claude-sonnet-4-5-20250929 claude-3-5-sonnet-20241022-v2:0 anthropic.claude-opus-4-1-20250805-v1:0 claude-sonnet-4-5@20250929
    meta-llama/Llama-3.3-70B-Instruct meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8 mistralai/Mixtral-8x22B-Instruct-v0.1
    Qwen/Qwen3-235B-A22B-Instruct-2507 Qwen/Qwen2.5-VL-72B-Instruct-AWQ deepseek-ai/DeepSeek-R1-Distill-Qwen-32B
    deepseek/deepseek-r1-0528-qwen3-8b:free moonshotai/Kimi-K2-Instruct-0905 MiniMaxAI/MiniMax-M1-80k zai-org/GLM-4.5-Air-FP8
    OpenGVLab/InternVL2_5-78B-MPO-AWQ HuggingFaceH4/zephyr-7b-beta xai-org/grok-1 x-ai/grok-4-fast openai/gpt-oss-120b:free
    accounts/fireworks/models/llama-v3p1-405b-instruct unsloth/Llama-3.2-3B-Instruct-bnb-4bit gemini-2.5-flash-preview-05-20
    nvidia/llama-3.1-nemotron-ultra-253b-v1 TheBloke/Mistral-7B-Instruct-v0.2-GPTQ cognitivecomputations/dolphin-mixtral-8x22b
"""


@pytest.mark.parametrize("model", MODELS.split())
def test_a_models_name_stays(model: str) -> None:
    assert redacted(f"The model `{model}` does not exist.") == f"The model `{model}` does not exist."


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        # OpenAI
        (
            "Incorrect API key provided: sk-proj-********************abcd. You can find your API key at"
            " https://platform.openai.com/account/api-keys.",
            "Incorrect API key provided: […]. You can find your API key at https://platform.openai.com/account/api-keys.",
        ),
        ("Incorrect API key provided: sk-ab***********yz. You can", "Incorrect API key provided: […]. You can"),
        ("Incorrect API key provided: not-n****ded. You can", "Incorrect API key provided: […]. You can"),
        (
            "Rate limit reached for gpt-4o-mini-2024-07-18 in organization org-AbCdEf1234567890GhIjKlMn on tokens per min (TPM):"
            " Limit 200000, Used 199900, Requested 1200. Please try again in 330ms.",
            "Rate limit reached for gpt-4o-mini-2024-07-18 in organization […] on tokens per min (TPM):"
            " Limit 200000, Used 199900, Requested 1200. Please try again in 330ms.",
        ),
        (
            "Project `proj_aBcD1234efGH5678` does not have access to model `gpt-4o`",
            "Project `[…]` does not have access to model `gpt-4o`",
        ),
        ("No such organization: org-abcdefghijklmnopqrst.", "No such organization: […]."),
        ("Quota of user-12ab34cd56 exceeded", "Quota of […] exceeded"),
        # Anthropic
        (
            f"This request would exceed the rate limit for your organization ({UUID}) of 30,000 input tokens per minute.",
            "This request would exceed the rate limit for your organization ([…]) of 30,000 input tokens per minute.",
        ),
        ("invalid x-api-key: sk-ant-api03-… is revoked", "invalid x-api-key: […] is revoked"),
        ("workspace wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ is archived", "workspace […] is archived"),
        # OpenRouter
        (
            '{"error":{"message":"No auth credentials found","code":401},"user_id":"user_2dHFtVWx2n56w6HkM0000000000"}',
            '{"error":{"message":"No auth credentials found","code":401},"user_id":"[…]"}',
        ),
        ("Key sk-or-v1-0e6f44a47a05...80a exceeded its limit", "Key […] exceeded its limit"),
        (
            '{"code":400,"metadata":{"raw":'
            + json.dumps(json.dumps({"error": {"input": PROMPT}}))
            + ',"provider_name":"Azure"}}',
            '{"code":400,"metadata":{"raw":"{"error": {"input": "[…]"}}","provider_name":"Azure"}}',
        ),
        # Mistral
        (
            '{"detail":[{"type":"extra_forbidden","loc":["body","foo"],"msg":"Extra inputs are not permitted","input":'
            + json.dumps(PROMPT)
            + "}]}",
            '{"detail":[{"type":"extra_forbidden","loc":["body","foo"],"msg":"Extra inputs are not permitted","input":"[…]"}]}',
        ),
        ("Unauthorized: Zk3vQ8xT1bN6mW0rY5uJ9cL2hF7dS4gA", "Unauthorized: […]"),
        # vLLM
        (
            f"1 validation error: Input should be 'user' [input_value={PROMPT!r}, input_type=str]",
            "1 validation error: Input should be 'user' [input_value='[…]', input_type=str]",
        ),
        (
            f"could not parse the body {PROMPT.encode()!r}",
            "could not parse the body b'[…]'",
        ),
        # Azure
        (
            "404 for https://me:secret@x.openai.azure.com/openai/deployments/gpt-4o?api-version=2024-10-21&api-key=abc, see it",
            "404 for https://[…]/openai/deployments/gpt-4o?[…] see it",
        ),
        ("key 0123456789abcdef0123456789abcdef is not valid", "key […] is not valid"),
        # Google, xAI, Groq, AWS and others
        ("API key AIzaSyD-1234567890_abcdefghijklmnopqrstu not valid.", "API key […] not valid."),
        ("Incorrect API key provided: xa***cd.", "Incorrect API key provided: […]."),
        ("gsk_abc123DEF456 and xai-1234abcd and key-1a2b3c4d and pk-live12345", "[…] and […] and […] and […]"),
        ("AKIAIOSFODNN7EXAMPLE wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "[…] […]"),
        ("Authorization: Bearer abcdefgh is wrong", "Authorization: Bearer […] is wrong"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl has expired", "token […] has expired"),
        ("contact jane.doe+ai@example.co.uk, please", "contact […], please"),
        ("GET /v1/models?key=hush failed", "GET /v1/models?[…] failed"),
        ("GET https://a.example/p?to=a@b.example&then=hush failed", "GET https://a.example/p?[…] failed"),
        ('{"api_key": "hush99", "n": 1}', '{"api_key": "[…]", "n": 1}'),
    ],
)
def test_what_a_sentence_gives_away_is_taken_out_and_the_rest_stays(sentence: str, shown: str) -> None:
    assert redacted(sentence, said=[PROMPT]) == shown


@pytest.mark.parametrize(
    "sentence", [*(row[2] for row in OPENAI_ERRORS.values()), *(row[1] for row in ANTHROPIC_ERRORS.values())]
)
def test_the_test_providers_sentences_lose_key_and_organisation_only(sentence: str) -> None:
    expected = sentence.format(org="[…]", key="[…]")

    assert redacted(sentence.format(org=FAKE_ORGANISATION, key=FAKE_KEY)) == expected
    assert redacted(sentence.format(org=FAKE_ANTHROPIC_ORGANISATION, key=FAKE_ANTHROPIC_KEY)) == expected


def made(kind: str, random: random.Random) -> str:
    """A secret as services make them, which nobody has configured."""
    match kind:
        case "hex":
            return random.randbytes(16).hex()
        case "base64":
            return base64.b64encode(random.randbytes(32)).decode()
        case "base64url":
            return base64.urlsafe_b64encode(random.randbytes(32)).decode().rstrip("=")
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=32))


@pytest.mark.parametrize("kind", ["hex", "base64", "base64url", "base62"])
def test_a_secret_that_nobody_has_configured_is_known_by_its_looks(kind: str) -> None:
    generator = random.Random(kind)
    secrets = [made(kind, generator) for _ in range(2_000)]

    kept = [secret for secret in secrets if redacted(f"The value {secret} is not valid.") != "The value […] is not valid."]

    assert len(kept) <= 2  # of 2,000: chance makes a name now and then


# ---- What is known ----

SENTENCES = st.text("abc .:'\"(){}\\\n\t…*é", max_size=60)
KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=60)


@EXAMPLES
@given(SENTENCES, KEYS, SENTENCES, st.sampled_from([str, repr, json.dumps]))
def test_a_configured_key_survives_nowhere(before: str, key: str, after: str, written: type[str]) -> None:
    text = f"{before} {written(key)}{after} {key}"

    shown = redacted(text, secrets=["", key])

    assert key not in shown and key.replace("\\", "") not in shown


def test_a_part_of_a_configured_key_is_taken_out_too() -> None:
    key = "correct horse battery staple"

    assert redacted(f"The key {key[:-3]} is cut, {key[2:18]} too.", secrets=[key]) == "The key […] is cut, […] too."


@pytest.mark.parametrize("mask", ["...", "…", "****", "**", "•••", "*****************"])
def test_a_masked_form_of_a_configured_key_is_known_by_its_ends(mask: str) -> None:
    key = "plainwordsonlykey"

    assert redacted(f"No key {key[:4]}{mask}{key[-4:]} here.", secrets=[key]) == "No key […] here."
    assert redacted(f"No key {key[:6]}{mask} here, {mask}{key[-4:]}", secrets=[key]) in (
        "No key […] here, […]",
        "No key […]... here, […]",
    )
    assert redacted("Wait...then **try** again…", secrets=[key]) == "Wait...then **try** again…"


@EXAMPLES
@given(st.data())
def test_a_quotation_of_what_was_said_survives_nowhere(data: st.DataObject) -> None:
    said = data.draw(st.text(st.sampled_from("abcdefghij .,\"'\n\té緊😀{}:"), min_size=QUOTED, max_size=300))
    begin = data.draw(st.integers(0, len(said) - QUOTED))
    part = said[begin : data.draw(st.integers(begin + QUOTED, len(said)))]
    written = data.draw(st.sampled_from([str, repr, json.dumps, lambda one: json.dumps(json.dumps(one))]))(part)
    one_line = " ".join(part.split())
    assume(len(one_line) >= QUOTED)
    before, after = data.draw(SENTENCES.filter(lambda s: not s.endswith("\\"))), data.draw(SENTENCES)

    shown = redacted(f"{before}{written}{after}", said=["something else", said])

    assert part not in shown
    assert [one_line[at : at + QUOTED] for at in range(len(one_line) - QUOTED + 1) if one_line[at : at + QUOTED] in shown] == []


def test_fifteen_characters_are_no_quotation() -> None:
    said = "the quick brown fox jumps"

    assert redacted(f"near '{said[:15]}'", said=[said]) == f"near '{said[:15]}'"
    assert redacted(f"near '{said[:16]}'", said=[said]) == "near '[…]'"
    assert redacted(f"near '{said[-16:]}'", said=[said]) == "near '[…]'"


def test_a_quotation_that_begins_within_what_looks_like_an_escape_is_known() -> None:
    said = r"the letter \u00e9 and its kin, please"

    assert redacted(f"near: {said[13:32]}", said=[said]) == "near: […]"


def test_a_prompt_with_backslashes_of_its_own_is_known_in_every_form() -> None:
    said = r"solve \frac{\nu}{\beta} = \u00e9 in C:\new\table.txt for me"

    for text in (said, json.dumps(said), repr(said), json.dumps(json.dumps(said)), said[12:40], json.dumps(said[12:40])):
        assert re.fullmatch(r"bad input\W*\[…\]\W*", redacted(f"bad input {text}", said=[said])), text


# ---- Any text ----


@EXAMPLES
@given(
    st.text(st.characters(exclude_categories=()), max_size=600), st.lists(st.text(max_size=40)), st.lists(st.text(max_size=40))
)
def test_the_result_is_one_line_of_300_characters_that_any_log_can_hold(text: str, secrets: list[str], said: list[str]) -> None:
    shown = redacted(text, secrets=secrets, said=said)

    assert len(shown) <= SHOWN
    assert {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"} == set()
    assert shown.splitlines() in ([], [shown]) and shown.encode().decode() == shown


def test_nothing_is_left_of_nothing() -> None:
    assert [redacted(text) for text in ("", " \r\n\0\u2028", "\\", "\\n\\u0000")] == [""] * 4


def test_a_long_text_is_cut_and_says_so() -> None:
    shown = redacted("no luck " * 100)

    assert len(shown) == SHOWN and shown == ("no luck " * 100)[: SHOWN - 1] + "…"


@pytest.mark.parametrize("secret", [FAKE_KEY, "correct horse battery staple is the key", "plain" * 20])
def test_no_half_of_a_key_survives_the_cut_through_a_large_text(secret: str) -> None:
    said = "".join(chr(0x4E00 + i) for i in range(READ))
    parts = [secret[i : i + 5] for i in range(len(secret) - 4)]

    for place in range(READ - MARGIN - len(secret) - 20, READ + 20, 7):
        shown = redacted(f"{said[:place]} value: {secret} " + "rest " * 200_000, secrets=[secret], said=[said])
        assert shown.startswith("[…]") and [part for part in parts if part in shown] == [], place


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "*",
        "a*",
        "://",
        "://a",
        "user-",
        "key-1",
        "a@",
        "a@a.",
        "sk-",
        "\\",
        "\\n",
        "\\xc3\\xa9",
        "bearer ",
        "a?a=",
        "aB1",
        "..",
        " ",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    large = text * (1_000_000 // len(text))

    assert len(redacted(large, secrets=SECRETS, said=[large[:200_000], PROMPT * 2_500])) <= SHOWN
