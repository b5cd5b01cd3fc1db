"""Each refusal of a token says what is wrong with it, in words that an n8n author can act on."""

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.app import create_app
from aistream.errors import Unauthorized
from aistream.tokens import LEEWAY, VIEWER_AUDIENCE, VIEWER_TYPE, Caller, Tokens, key_id
from tests.conftest import make_config
from tests.service import SECRET, n8n_token

PREVIOUS = "the-secret-before-it-with-enough-bytes"
SESSION_ID = "0b8e0c9e-93f1-4c1b-8f9d-2b1c4f2a7d11"
#: Ten hours ahead: tokens in a table are made before their test runs.
FAR = int(time.time()) + 36_000


def tokens(**environ: str) -> Tokens:
    """What this configuration signs and verifies with."""
    return Tokens(make_config(**environ), time.time)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def named(value: object) -> str | None:
    """A token in the name of a test: its time would give the test another name in each process."""
    return "token" if isinstance(value, str) and re.fullmatch(r"[\w.-]{30,}", value) else None


def part(value: object) -> str:
    """One part of a token: JSON, or these bytes as they are."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(claims: object, header: object = None, secret: str = SECRET) -> str:
    """A token with any header and any claims, with a good signature (HMAC-SHA256) over them."""
    text = f"{part(header or {'alg': 'HS256', 'typ': 'JWT'})}.{part(claims)}"
    return f"{text}.{part(hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest())}"


def refusal(verify: Callable[[str | None], object], token: str | None) -> tuple[str, str]:
    """Code and sentence of a refusal."""
    with pytest.raises(Unauthorized) as refused:
        verify(token)
    assert token is None or len(token) < 4 or token not in refused.value.detail
    return refused.value.code, refused.value.detail


# ---- n8n's token ----

SIGNATURE = "The token's signature does not match JWT_SECRET."
EXPIRED = "The token has expired (exp lies in the past)."
TOO_EARLY = "The token is not valid yet (nbf or iat lies in the future)."
MALFORMED = "The token is not a valid JWT."
NOTHING = "There is no token: expected n8nToken in the body, or the header Authorization: Bearer."
UNSIGNED = "The token is unsigned (alg none): expected HS256."
SOMETHING_ELSE = "This is a token for something else."
GOOD = {"exp": FAR}


@pytest.mark.parametrize(
    ("token", "code", "sentence"),
    [
        (None, "token_missing", NOTHING),
        ("", "token_missing", NOTHING),
        ("not-a-token", "token_malformed", MALFORMED),
        ("a.b", "token_malformed", MALFORMED),
        ("a.b.c", "token_malformed", MALFORMED),
        ("a.b.c.d.e", "token_malformed", MALFORMED),
        ("x" * 10_240, "token_malformed", MALFORMED),
        ("." * 10_240, "token_malformed", MALFORMED),
        ("é.ü.😀", "token_malformed", MALFORMED),
        ("\ud800", "token_malformed", MALFORMED),
        ("\0", "token_malformed", MALFORMED),
        (f"{part([1])}.{part(GOOD)}.AAAA", "token_malformed", MALFORMED),
        (f"{part(b'[' * 100_000)}.{part(GOOD)}.AAAA", "token_malformed", MALFORMED),
        (signed(b"[" * 100_000), "token_malformed", MALFORMED),
        (signed(b'{"exp":' + b"9" * 5000 + b"}"), "token_malformed", MALFORMED),
        (signed([GOOD]), "token_malformed", MALFORMED),
        (signed(b"\xff"), "token_malformed", MALFORMED),
        (signed(GOOD, {"alg": "HS256", "kid": 5}), "token_malformed", MALFORMED),
        (signed(GOOD, {"alg": "HS256", "crit": ["b64"], "b64": False}), "token_malformed", MALFORMED),
        (jwt.encode(GOOD, None, "none"), "token_unsigned", UNSIGNED),
        (f"{part({'alg': 'nOnE'})}.{part(GOOD)}.", "token_unsigned", UNSIGNED),
        (jwt.encode(GOOD, SECRET * 2, "HS512"), "token_algorithm", "The token's algorithm is HS512: expected HS256."),
        (jwt.encode(GOOD, SECRET * 2, "HS384"), "token_algorithm", "The token's algorithm is HS384: expected HS256."),
        (signed(GOOD, {"alg": "x" * 5000}), "token_algorithm", "The token's algorithm is unknown to us: expected HS256."),
        (signed(GOOD, {"alg": 256}), "token_algorithm", "The token's algorithm is unknown to us: expected HS256."),
        (signed(GOOD, secret="another-secret-that-is-long-enough-too"), "token_signature", SIGNATURE),
        (n8n_token(exp=FAR)[:-3] + "AAA", "token_signature", SIGNATURE),
        (n8n_token(exp=FAR).rpartition(".")[0] + ".", "token_signature", SIGNATURE),
        (signed({"exp": now() - LEEWAY - 1}), "token_expired", EXPIRED),
        (signed({"exp": 0}), "token_expired", EXPIRED),
        (signed({**GOOD, "nbf": FAR}), "token_not_yet_valid", TOO_EARLY),
        (signed({**GOOD, "iat": FAR}), "token_not_yet_valid", TOO_EARLY),
        (signed({"sub": "n8n"}), "token_claim_missing", "The token has no exp claim."),
        (signed({"exp": None}), "token_claim_missing", "The token has no exp claim."),
        (tokens().sign_viewer(SESSION_ID, FAR), "token_wrong_kind", SOMETHING_ELSE),
    ],
    ids=named,
)
def test_a_token_that_is_not_accepted_is_told_why(token: str | None, code: str, sentence: str) -> None:
    assert refusal(tokens().verify_caller, token) == (code, sentence)


def test_a_token_signed_with_a_key_pair_is_told_the_algorithm_it_names() -> None:
    """n8n's JWT credential offers PEM keys: whoever chose one must read that it is the algorithm."""
    token = signed(GOOD, {"alg": "RS256", "typ": "JWT"})

    assert refusal(tokens().verify_caller, token) == ("token_algorithm", "The token's algorithm is RS256: expected HS256.")


@pytest.mark.parametrize("algorithm", [["HS256"], {"a": 1}], ids=str)
def test_an_algorithm_that_is_no_text_is_refused(algorithm: object) -> None:
    assert refusal(tokens().verify_caller, signed(GOOD, {"alg": algorithm})) == (
        "token_algorithm",
        "The token's algorithm is unknown to us: expected HS256.",
    )


def test_the_default_claims_of_n8ns_jwt_node_are_recognised() -> None:
    """With its own claim fields n8n's JWT node writes these names, and no exp."""
    token = signed({"audience": "aistream", "expiresIn": 300, "issuer": "n8n", "subject": "7", "iat": now()})

    code, sentence = refusal(tokens().verify_caller, token)

    assert code == "token_claim_missing"
    assert sentence.startswith("The token has expiresIn but no exp: n8n's JWT node writes expiresIn from its own claim fields.")
    assert "'Use JSON to Build Payload'" in sentence and "exp: Math.floor(Date.now() / 1000) + 300" in sentence


@pytest.mark.parametrize(("claim", "wrong", "variable"), [("aud", "audience", "JWT_AUDIENCE"), ("iss", "issuer", "JWT_ISSUER")])
def test_a_configured_audience_or_issuer_is_demanded_by_name(claim: str, wrong: str, variable: str) -> None:
    verify = tokens(**{variable: "aistream"}).verify_caller

    assert verify(signed({**GOOD, claim: "aistream"})) == Caller("")
    assert refusal(verify, signed({**GOOD, claim: "other"})) == (
        {"aud": "token_audience", "iss": "token_issuer"}[claim],
        f"The token's {claim} is not the one configured as {variable}.",
    )
    assert refusal(verify, signed(GOOD)) == ("token_claim_missing", f"The token has no {claim} claim.")
    code, sentence = refusal(verify, signed({**GOOD, wrong: "aistream"}))
    assert code == "token_claim_missing"
    assert sentence.startswith(f"The token has {wrong} but no {claim}: ")


def test_one_of_several_audiences_is_enough() -> None:
    assert tokens(JWT_AUDIENCE="aistream").verify_caller(signed({**GOOD, "aud": ["other", "aistream"]})) == Caller("")


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_an_audience_or_issuer_that_nobody_configured_does_no_harm(claim: str) -> None:
    assert tokens().verify_caller(signed({**GOOD, claim: "whatever"})) == Caller("")


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({**GOOD, "sub": 7}, "sub"),
        ({**GOOD, "sub": None}, "sub"),
        ({**GOOD, "sub": ["n8n"]}, "sub"),
        ({"exp": "2026-12-24T20:00:00Z"}, "exp"),
        ({"exp": []}, "exp"),
        ({"exp": float("inf")}, "exp"),
        ({**GOOD, "nbf": "soon"}, "nbf"),
        ({**GOOD, "iat": "now"}, "iat"),
    ],
)
def test_a_claim_of_the_wrong_type_is_named(claims: dict[str, Any], name: str) -> None:
    """An n8n expression gives a number for an id, or an ISO date for a time, before an author notices."""
    code, sentence = refusal(tokens().verify_caller, signed(claims))

    assert code == "token_malformed"
    assert f"The token's {name} is not " in sentence


def test_a_subject_that_no_store_can_hold_is_refused() -> None:
    assert refusal(tokens().verify_caller, signed(b'{"sub":"\\ud800","exp":%d}' % FAR))[0] == "token_malformed"


@pytest.mark.parametrize(
    "seconds_from_now",
    [
        {"exp": 5},
        {"exp": 5.5},
        {"exp": 10 - LEEWAY},
        {"exp": 300, "nbf": LEEWAY - 10},
        {"exp": 300, "iat": LEEWAY - 10},
        {"exp": 300, "iat": 0.5, "nbf": -300},
    ],
    ids=str,
)
def test_a_token_is_accepted_within_the_leeway_of_two_clocks(seconds_from_now: dict[str, float]) -> None:
    claims = {name: time.time() + seconds for name, seconds in seconds_from_now.items()}

    assert tokens().verify_caller(signed({**claims, "sub": "n8n", "jti": "1", "more": {"a": []}})) == Caller("n8n")


@pytest.mark.parametrize(
    ("seconds_from_now", "code"),
    [
        ({"exp": -LEEWAY - 1}, "token_expired"),
        ({"exp": 300, "nbf": LEEWAY + 10}, "token_not_yet_valid"),
        ({"exp": 300, "iat": LEEWAY + 10}, "token_not_yet_valid"),
    ],
    ids=str,
)
def test_the_leeway_is_no_more_than_that(seconds_from_now: dict[str, int], code: str) -> None:
    claims = {name: now() + seconds for name, seconds in seconds_from_now.items()}

    assert refusal(tokens().verify_caller, signed(claims))[0] == code


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_the_configured_algorithm_is_the_only_one(algorithm: str) -> None:
    verify = tokens(JWT_ALGORITHM=algorithm, JWT_SECRET=SECRET * 2).verify_caller

    assert verify(jwt.encode({**GOOD, "sub": "n8n"}, SECRET * 2, algorithm)) == Caller("n8n")
    assert refusal(verify, signed(GOOD, secret=SECRET * 2)) == (
        "token_algorithm",
        f"The token's algorithm is HS256: expected {algorithm}.",
    )


def test_the_previous_secret_still_verifies_and_never_signs() -> None:
    rotated = tokens(JWT_SECRET_PREVIOUS=PREVIOUS)
    before = tokens(JWT_SECRET=PREVIOUS)

    assert rotated.verify_caller(signed({**GOOD, "sub": "old"}, secret=PREVIOUS)) == Caller("old")
    assert rotated.verify_viewer(before.sign_viewer(SESSION_ID, now() + 60)) == SESSION_ID
    assert tokens().verify_caller(rotated.sign_caller("new", now() + 60)) == Caller("new")
    assert refusal(before.verify_caller, rotated.sign_caller("new", now() + 60))[0] == "token_signature"


def test_a_token_of_the_previous_secret_is_refused_for_what_is_wrong_with_it() -> None:
    rotated = tokens(JWT_SECRET_PREVIOUS=PREVIOUS)

    assert refusal(rotated.verify_caller, signed({"exp": 1}, secret=PREVIOUS)) == ("token_expired", EXPIRED)
    assert refusal(rotated.verify_caller, signed({}, secret=PREVIOUS))[0] == "token_claim_missing"


def test_what_is_signed_names_its_secret_and_tells_nothing_of_it() -> None:
    signing = tokens(JWT_SECRET_PREVIOUS=PREVIOUS)

    kids = [
        jwt.get_unverified_header(token)["kid"]
        for token in (signing.sign_caller("a", now() + 60), signing.sign_viewer(SESSION_ID, now() + 60))
    ]

    assert kids == [key_id(SECRET)] * 2
    assert key_id(SECRET) != key_id(PREVIOUS) and len(key_id(SECRET)) == 8
    assert key_id(SECRET) not in hashlib.sha256(SECRET.encode()).hexdigest()


def test_a_token_is_verified_by_the_secret_that_it_names_alone() -> None:
    rotating = tokens(JWT_SECRET_PREVIOUS=PREVIOUS)
    named = {"alg": "HS256", "kid": key_id(PREVIOUS)}

    assert rotating.verify_caller(signed(GOOD, named, PREVIOUS)) == Caller("")
    assert refusal(rotating.verify_caller, signed(GOOD, named, SECRET)) == ("token_signature", SIGNATURE)


@pytest.mark.parametrize("secret", [SECRET, PREVIOUS])
@pytest.mark.parametrize("kid", ["", "n8n's own", "00000000"])
def test_a_token_that_names_a_key_of_somebody_elses_is_tried_with_both_secrets(secret: str, kid: str) -> None:
    assert tokens(JWT_SECRET_PREVIOUS=PREVIOUS).verify_caller(signed(GOOD, {"alg": "HS256", "kid": kid}, secret)) == Caller("")


def test_a_token_that_names_no_text_as_its_key_is_refused_while_two_are_in_use() -> None:
    token = signed(GOOD, {"alg": "HS256", "kid": ["a"]})

    assert refusal(tokens(JWT_SECRET_PREVIOUS=PREVIOUS).verify_caller, token) == ("token_malformed", MALFORMED)


@pytest.mark.parametrize(("most", "seconds"), [("86400", 86_400), ("300", 300)])
def test_a_token_that_is_good_for_too_long_is_told_how_long_it_may_be(most: str, seconds: int) -> None:
    verify = tokens(JWT_MAX_LIFETIME_SECONDS=most).verify_caller

    code, sentence = refusal(verify, signed({"exp": now() + seconds + LEEWAY + 2}))

    assert code == "token_lifetime"
    assert sentence.startswith(f"The token's exp lies further ahead than {seconds} s (JWT_MAX_LIFETIME_SECONDS)")
    assert sentence.endswith("exp: Math.floor(Date.now() / 1000) + 300.")
    assert verify(signed({"exp": now() + seconds})) == Caller("")
    assert refusal(verify, signed({"exp": 1e300}))[0] == "token_lifetime"


def test_how_long_a_viewers_token_lives_is_our_own_business() -> None:
    verify = tokens(JWT_MAX_LIFETIME_SECONDS="60").verify_viewer

    assert verify(tokens().sign_viewer(SESSION_ID, now() + 10 * 86_400)) == SESSION_ID


def test_what_we_sign_for_a_caller_fulfils_our_own_demands() -> None:
    demanding = tokens(JWT_AUDIENCE="aistream", JWT_ISSUER="n8n")

    assert demanding.verify_caller(demanding.sign_caller("me", now() + 60)) == Caller("me")
    assert refusal(demanding.verify_caller, demanding.sign_caller("me", now() + 60, audience="other"))[0] == "token_audience"


# ---- A viewer's token ----


def viewers_claims(**claims: object) -> dict[str, object]:
    """What a viewer's token holds."""
    return {"sub": SESSION_ID, "aud": VIEWER_AUDIENCE, "exp": FAR, **claims}


VIEWER_HEADER = {"alg": "HS256", "typ": VIEWER_TYPE}


def test_a_viewers_token_is_good_for_its_one_session() -> None:
    assert tokens().verify_viewer(tokens().sign_viewer(SESSION_ID, now() + 60)) == SESSION_ID
    assert tokens().verify_viewer(signed(viewers_claims(), VIEWER_HEADER)) == SESSION_ID


@pytest.mark.parametrize(
    ("token", "code"),
    [
        (None, "token_missing"),
        ("x", "token_malformed"),
        (n8n_token(exp=FAR, sub=SESSION_ID), "token_wrong_kind"),
        (n8n_token(exp=FAR, sub=SESSION_ID, aud=VIEWER_AUDIENCE), "token_wrong_kind"),
        (signed(viewers_claims(aud="other"), VIEWER_HEADER), "token_audience"),
        (signed(viewers_claims(exp=1), VIEWER_HEADER), "token_expired"),
        (signed({"aud": VIEWER_AUDIENCE, "sub": SESSION_ID}, VIEWER_HEADER), "token_claim_missing"),
        (signed({**GOOD, "sub": SESSION_ID}, VIEWER_HEADER), "token_claim_missing"),
        (signed({**GOOD, "aud": VIEWER_AUDIENCE}, VIEWER_HEADER), "token_claim_missing"),
        (signed(viewers_claims(), VIEWER_HEADER, secret=PREVIOUS), "token_signature"),
        (signed(viewers_claims(), {**VIEWER_HEADER, "alg": "none"}), "token_unsigned"),
    ],
    ids=named,
)
def test_a_viewers_token_that_is_not_accepted_is_told_why(token: str | None, code: str) -> None:
    assert refusal(tokens().verify_viewer, token)[0] == code


def test_a_viewer_without_a_token_is_told_where_it_belongs() -> None:
    assert refusal(tokens().verify_viewer, None) == ("token_missing", "There is no token: expected access_token in the URL.")


def test_the_audience_of_viewers_does_not_make_a_viewers_token_one_of_n8n() -> None:
    verify = tokens(JWT_AUDIENCE=VIEWER_AUDIENCE).verify_caller

    assert refusal(verify, tokens().sign_viewer(SESSION_ID, now() + 60)) == ("token_wrong_kind", SOMETHING_ELSE)


@settings(deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.binary(max_size=60).map(part), st.lists(st.binary(max_size=30).map(part)).map(".".join))
)
def test_no_text_is_accepted_or_breaks_the_check(token: str) -> None:
    for verify in (tokens().verify_caller, tokens().verify_viewer):
        with pytest.raises(Unauthorized):
            verify(token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional={"alg": JSON | st.just("HS256"), "typ": JSON | st.just(VIEWER_TYPE), "kid": JSON, "crit": JSON, "b64": JSON}
    ),
    st.dictionaries(
        st.sampled_from(["exp", "nbf", "iat", "sub", "aud", "iss", "jti", "expiresIn"]),
        JSON | st.sampled_from([FAR, VIEWER_AUDIENCE]),
    ),
)
def test_whatever_a_signed_token_says_it_is_accepted_or_refused(header: dict[str, Any], claims: dict[str, Any]) -> None:
    token = signed(claims, header or {"alg": "HS256"})

    for one in (tokens(), tokens(JWT_AUDIENCE="a", JWT_ISSUER="i")):
        for verify in (one.verify_caller, one.verify_viewer):
            try:
                verify(token)
            except Unauthorized as refused:
                assert refused.code.startswith("token_") and refused.status == 401


# ---- The answer ----


@pytest.fixture
def client() -> Iterator[FlaskClient]:
    """A client of an app in DEV_MODE."""
    app = create_app(make_config())
    yield app.test_client()
    app.extensions["aistream"].background.stop()


@pytest.mark.parametrize(
    ("token", "code", "challenge"),
    [
        (None, "token_missing", "Bearer"),
        ("x", "token_malformed", 'Bearer error="invalid_token"'),
        (n8n_token(exp=1), "token_expired", 'Bearer error="invalid_token"'),
    ],
)
def test_a_refusal_is_a_401_problem_that_names_its_scheme(
    client: FlaskClient, token: str | None, code: str, challenge: str
) -> None:
    bearer = {"Authorization": f"Bearer {token}"} if token else {}

    answers = [
        client.post("/init-stream", json={"n8nToken": token, "prompt": "private"}),
        client.post("/init-stream", json={}, headers=bearer),
        client.get(f"/stream/{SESSION_ID}", query_string={"access_token": token} if token else {}),
        client.get(f"/stream/{SESSION_ID}", headers=bearer),
    ]

    for answer in answers:
        assert (answer.status_code, answer.mimetype) == (401, "application/problem+json")
        assert answer.headers["WWW-Authenticate"] == challenge
        assert (answer.json or {})["ok"] is False
        assert "private" not in answer.text and (token is None or len(token) < 4 or token not in answer.text)
    assert [(answer.json or {})["code"] for answer in answers[:2]] == [code, code]
    assert {(answer.json or {})["code"] for answer in answers[2:]} <= {code, "token_wrong_kind"}
