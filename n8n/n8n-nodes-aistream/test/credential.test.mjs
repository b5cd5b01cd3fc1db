// The credential: its tokens, and its test as n8n runs it, against a server that judges tokens as the service does.

import assert from 'node:assert/strict';
import test from 'node:test';

import { claims, credential, JWT_SECRET, load, problem, serve } from './helper.mjs';

const { signJwt } = load('credentials/jwt.js');

test('signs what PyJWT signs, with all three algorithms', () => {
	const payload = { sub: 'n8n', iat: 1_700_000_000, exp: 1_700_000_300, aud: 'aistream', iss: 'lab' };
	const signature = (algorithm) => signJwt(payload, 'k'.repeat(64), algorithm).split('.').slice(2)[0];

	assert.equal(
		signJwt(payload, 'k'.repeat(64), 'HS256'),
		'eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJuOG4iLCJpYXQiOjE3MDAwMDAwMDAsImV4cCI6MTcwMDAwMDMwMCwiYXVkIjoiYWlzdHJlYW0iLCJpc3MiOiJsYWIifQ.DWyDdgyCg-8CIMxBu21daT9MIzE7tBVwWdnXCPPmSJU',
	);
	assert.equal(signature('HS384'), 'PBG4M0sj-IloWNHpLM3WSD9s99Z1sk6M-KIY08zVEF8UsqldElNBGyeETWtj1FUW');
	assert.equal(
		signature('HS512'),
		'h8rRJX39CgaUB18aYAbhrJQziyPIDY1Cf4sYqshwXTK4ssVwg5f5sYPli0Sf3uqAqDDBUyjxwZHm4BueDiUvrA',
	);
});

test('authenticate adds the token and leaves the request as it is', async () => {
	const request = { url: 'http://x', headers: { 'Idempotency-Key': 'k' }, body: { a: 1 } };

	const signed = await credential.authenticate({ jwtSecret: JWT_SECRET, subject: 'n8n' }, request);

	const { Authorization, ...headers } = signed.headers;
	assert.deepEqual({ ...signed, headers }, request);
	assert.equal(claims(Authorization.replace('Bearer ', '')).sub, 'n8n');
});

/** Runs the credential's test as n8n's CredentialsTester does: the message of the first rule that fits, or undefined. */
async function run(data) {
	const { request, rules } = credential.test;
	assert.equal(request.ignoreHttpStatusErrors, true);
	const base = new Function('$credentials', `return (${request.baseURL.slice(3, -2)})`)(data);
	const { headers } = await credential.authenticate(data, { headers: {} });
	const response = await fetch(base + request.url, {
		method: request.method,
		headers: { ...headers, 'content-type': 'application/json' },
		body: JSON.stringify(request.body),
	});
	const body = await response.json();
	assert.ok(rules.every(({ type }) => type === 'responseSuccessBody'));
	return rules.find(({ properties }) => body[properties.key] === properties.value)?.properties.message;
}

test('its test proves the secret: 400 for the request is good news, 401 is not', async (t) => {
	const invalid = problem(400, 'invalid_request', 'resumeUrl: is missing: it is required.');
	const { url, requests } = await serve(
		t,
		invalid,
		problem(401, 'token_signature', 'x'),
		problem(401, 'token_algorithm', 'x'),
		problem(401, 'a_code_of_the_future', 'x'),
		problem(404, 'not_found', 'x'),
		{ status: 404, body: { code: 404, message: 'Cannot POST' } },
		{ status: 200, body: { hello: 'world' } },
	);
	const data = { baseUrl: `${url}//`, jwtSecret: JWT_SECRET, algorithm: 'HS256', subject: 'n8n' };

	assert.equal(await run(data), undefined);
	assert.equal(await run(data), "The JWT secret is not the service's JWT_SECRET");
	assert.equal(await run(data), "The algorithm is not the service's JWT_ALGORITHM");
	assert.equal(await run(data), 'The service does not accept the token');
	assert.equal(await run(data), 'The base URL is not that of the service: there is no /init-stream');
	assert.equal(await run(data), 'What answers at the base URL is not aistream');
	assert.equal(await run(data), 'What answers at the base URL is not aistream');

	const [first] = requests;
	assert.deepEqual([first.method, first.url], ['POST', '/init-stream']);
	assert.equal(claims(first.headers.authorization.replace('Bearer ', '')).sub, 'n8n');
	// n8n sends no empty body, and without one the service would not come to look at the token.
	assert.notDeepEqual(first.body, {});
});

test('every field that holds a secret is a password', () => {
	const secret = credential.properties.filter(({ typeOptions }) => typeOptions?.password).map(({ name }) => name);

	assert.deepEqual(secret, ['jwtSecret', 'callbackSecret']);
});
