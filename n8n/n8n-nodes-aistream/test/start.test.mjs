// The first half of the node: execute() asks for a stream, answers the browser, and puts the execution to wait.

import assert from 'node:assert/strict';
import test from 'node:test';

import { claims, ended, execute, executeContext, execution, JWT_SECRET, problem, RESUME_URL, serve, STREAM } from './helper.mjs';

const ANSWER = { streamUrl: STREAM.streamUrl, streamId: STREAM.streamId, expiresAt: STREAM.expiresAt };
const EVERYTHING = {
	system: 'Be brief.',
	messages: '[{"role": "user", "content": "Hello"}]',
	maxTokens: 100,
	temperature: 0,
	topP: 0.5,
	stop: ['x', 'y'],
	userId: 7,
	chatId: 'c-1',
	metadata: '{"a": 1}',
	format: 'json',
	start: 'immediate',
	onDisconnect: 'cancel',
	disconnectGraceSeconds: 5,
	fallbackModels: ['echo', 'fast'],
	reasoningEffort: 'xhigh',
};

test('asks /init-stream with what was set, and with nothing that was not', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });

	await execute(executeContext({ baseUrl: `${url}/prefix/`, parameters: { model: 'echo' }, options: EVERYTHING }));
	await execute(executeContext({ baseUrl: url }));

	const [all, least] = requests;
	assert.deepEqual([all.method, all.url], ['POST', '/prefix/init-stream']);
	const { resumeUrl, ...asked } = all.body;
	assert.deepEqual(asked, {
		prompt: 'What is AI?',
		model: 'echo',
		system: 'Be brief.',
		messages: [{ role: 'user', content: 'Hello' }],
		max_tokens: 100,
		temperature: 0,
		top_p: 0.5,
		stop: ['x', 'y'],
		userId: 7,
		chatId: 'c-1',
		metadata: { a: 1 },
		format: 'json',
		start: 'immediate',
		onDisconnect: 'cancel',
		disconnectGraceSeconds: 5,
		fallbackModels: ['echo', 'fast'],
		reasoning_effort: 'xhigh',
	});
	assert.deepEqual(least.body, { prompt: 'What is AI?', resumeUrl });
});

test('takes values of expressions for JSON and for stop, and leaves empty ones out', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });

	await execute(
		executeContext({ baseUrl: url, options: { messages: [{ role: 'user', content: 'x' }], metadata: { b: 2 }, stop: 'END' } }),
	);
	await execute(
		executeContext({ baseUrl: url, options: { messages: '', metadata: null, stop: [''], userId: '', system: null } }),
	);

	assert.deepEqual(requests[0].body.messages, [{ role: 'user', content: 'x' }]);
	assert.deepEqual(requests[0].body.metadata, { b: 2 });
	assert.equal(requests[0].body.stop, 'END');
	assert.deepEqual(Object.keys(requests[1].body), ['prompt', 'resumeUrl']);
});

const MODELS = [
	['a name typed in', { __rl: true, mode: 'name', value: 'ollama/llama3.2' }, 'ollama/llama3.2'],
	['a name from the list', { __rl: true, mode: 'list', value: 'fast', cachedResultName: 'fast' }, 'fast'],
	['the text of version 1', 'gpt-4o-mini', 'gpt-4o-mini'],
	['nothing chosen', { __rl: true, mode: 'list', value: '' }, undefined],
	['an expression that gave nothing', { __rl: true, mode: 'name', value: undefined }, undefined],
	['no text in version 1', '', undefined],
];

for (const [name, model, asked] of MODELS) {
	test(`the model is asked for by its name, or left to the service: ${name}`, async (t) => {
		const { url, requests } = await serve(t, { body: STREAM });

		await execute(executeContext({ baseUrl: url, parameters: { model } }));

		assert.equal(requests[0].body.model, asked);
		assert.equal('model' in requests[0].body, asked !== undefined);
	});
}

const FALLBACKS = [
	['spaces around a name', [' echo', 'ollama/llama3.2\n'], ['echo', 'ollama/llama3.2']],
	['values that were left empty', ['', 'echo', '  ', null], ['echo']],
	['names in one value', ['echo, fast ,'], ['echo', 'fast']],
	['text of an expression', 'echo,fast', ['echo', 'fast']],
	['a list as one value, of an expression', [['echo', 'fast'], 'ft:gpt-4o:a::b'], ['echo', 'fast', 'ft:gpt-4o:a::b']],
	['what is no text is left to the service to refuse', [7], [7]],
	['nothing added', [], undefined],
	['nothing but empty values', ['', ' , '], undefined],
	['no text', '', undefined],
	['an expression that gave nothing', null, undefined],
];

for (const [name, fallbackModels, asked] of FALLBACKS) {
	test(`fallback models are sent as a list of names, or not at all: ${name}`, async (t) => {
		const { url, requests } = await serve(t, { body: STREAM });

		await execute(executeContext({ baseUrl: url, options: { fallbackModels } }));

		assert.deepEqual(requests[0].body.fallbackModels, asked);
		assert.equal('fallbackModels' in requests[0].body, asked !== undefined);
	});
}

test('a reasoning effort that is empty is left to the service', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });

	for (const reasoningEffort of ['', null, undefined, 'none']) {
		await execute(executeContext({ baseUrl: url, options: { reasoningEffort } }));
	}

	assert.deepEqual(
		requests.map(({ body }) => body.reasoning_effort),
		[undefined, undefined, undefined, 'none'],
	);
});

test('signs a JWT with sub, iat and exp for each request', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });

	await execute(executeContext({ baseUrl: url }));
	await execute(
		executeContext({ baseUrl: url, credentials: { algorithm: 'HS512', subject: 's', audience: 'a', issuer: 'i' } }),
	);

	const [plain, full] = requests.map(({ headers }) => claims(headers.authorization.replace('Bearer ', '')));
	assert.deepEqual(Object.keys(plain), ['alg', 'sub', 'iat', 'exp']);
	assert.equal(plain.exp - plain.iat, 300);
	assert.ok(Math.abs(plain.iat - Date.now() / 1000) < 5);
	assert.deepEqual([full.alg, full.sub, full.aud, full.iss], ['HS512', 's', 'a', 'i']);
	assert.ok(!JSON.stringify(requests).includes(JWT_SECRET));
});

test('puts its suffix before the query of the resume URL and leaves the query as it is', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });
	const odd = 'https://n8n.example/path/webhook-waiting/7?signature=a%2Fb+c==&x=?';

	await execute(executeContext({ baseUrl: url }));
	await execute(executeContext({ baseUrl: url, of: execution({ resumeUrl: odd }) }));
	await execute(executeContext({ baseUrl: url, of: execution({ resumeUrl: 'http://n8n/webhook-waiting/7' }) }));

	assert.deepEqual(
		requests.map(({ body }) => body.resumeUrl),
		[
			RESUME_URL.replace('/7?', '/7/aistream?'),
			'https://n8n.example/path/webhook-waiting/7/aistream?signature=a%2Fb+c==&x=?',
			'http://n8n/webhook-waiting/7/aistream',
		],
	);
});

test('the Idempotency-Key is the same for all tries of a run, and another for every other run, node and execution', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });
	const of = execution();

	await execute(executeContext({ baseUrl: url, of }));
	await execute(executeContext({ baseUrl: url, of, options: {} }));
	await execute(executeContext({ baseUrl: url, of, run: 1 }));
	await execute(executeContext({ baseUrl: url, of, name: 'Second' }));
	await execute(executeContext({ baseUrl: url, of: execution({ resumeUrl: RESUME_URL.replace('/7', '/8') }) }));
	// The same id in another n8n, or after its database was emptied: the token differs.
	await execute(executeContext({ baseUrl: url, of: execution({ resumeUrl: RESUME_URL.replace('abab', 'cdcd') }) }));

	const [first, again, ...others] = requests.map(({ headers }) => headers['idempotency-key']);
	assert.match(first, /^[0-9a-f]{64}$/);
	assert.equal(again, first);
	assert.equal(new Set([first, ...others]).size, 5);
});

test('answers the browser with the stream and waits until the limit', async (t) => {
	const { url } = await serve(t, { body: STREAM });
	const context = executeContext({ baseUrl: url, parameters: { limitMinutes: 3 } });

	const output = await execute(context);

	const [response, ...more] = context.did.responses;
	assert.deepEqual(more, []);
	assert.equal(response.statusCode, 200);
	assert.deepEqual(response.body, ANSWER);
	assert.equal(response.headers['cache-control'], 'no-store');
	assert.ok(Math.abs(context.did.waitTill - Date.now() - 180_000) < 2000);
	// What a Webhook node that responds "When Last Node Finishes" answers with.
	assert.deepEqual(output, [[{ json: ANSWER, pairedItem: { item: 0 } }], []]);
});

test('with the switch off the browser gets nothing, and the address is not in the output either', async (t) => {
	const { url } = await serve(t, { body: STREAM });
	const context = executeContext({ baseUrl: url, parameters: { respond: false } });

	const output = await execute(context);

	assert.deepEqual(context.did.responses, []);
	assert.ok(context.did.waitTill);
	assert.ok(!JSON.stringify(output).includes('access_token'));
});

test('a limit below two minutes is refused before anything is asked', async (t) => {
	const { url, requests } = await serve(t, { body: STREAM });

	for (const limitMinutes of [1.9, 0, -1, 'soon']) {
		await assert.rejects(execute(executeContext({ baseUrl: url, parameters: { limitMinutes } })), {
			name: 'NodeOperationError',
			message: 'Limit Wait must be at least 2 minutes',
		});
	}
	assert.deepEqual(requests, []);
});

test('leaves with n8n what the second output gives when no callback comes', async (t) => {
	const { url } = await serve(t, { body: STREAM });
	const context = executeContext({ baseUrl: url, parameters: { model: 'echo' }, options: { userId: 7, metadata: { a: 1 } } });

	await execute(context);

	// n8n runs the node as if it were deactivated: with forwardAllOutputs its input becomes its outputs.
	assert.deepEqual(context.did.metadata, { forwardAllOutputs: true });
	const [completed, [item, ...more]] = context.did.executeData.data.main;
	assert.deepEqual([completed, more, item.pairedItem], [[], [], { item: 0 }]);
	const { json } = item;
	assert.equal(json.status, 'timed_out');
	assert.deepEqual(json.error, { code: 'timed_out', message: 'No callback came within 15 minutes.', retryable: true });
	assert.deepEqual(
		[json.streamId, json.answer, json.input_tokens, json.userId, json.chatId, json.requested_model, json.metadata],
		['s-1', '', 0, 7, null, 'echo', { a: 1 }],
	);
	// Every field of a callback is there, as ended() has them.
	assert.deepEqual(Object.keys(json).sort(), Object.keys(ended('s-1')).sort());
	assert.deepEqual([json.provider_requests, json.warnings], [0, []]);
	assert.deepEqual([json.usage.source, json.usage.estimated_by, json.timings.queued_ms], [null, null, null]);
	assert.ok(!JSON.stringify(json).includes('signature='));
});

test('the service’s refusal is a NodeApiError with its detail and its fields', async (t) => {
	const errors = [{ field: 'prompt', message: 'is missing: it is required' }];
	const { url } = await serve(t, problem(400, 'invalid_request', 'prompt: is missing: it is required.', { errors }));
	const context = executeContext({ baseUrl: url });

	await assert.rejects(execute(context), (error) => {
		assert.equal(error.name, 'NodeApiError');
		assert.equal(error.message, 'prompt: is missing: it is required.');
		assert.equal(error.description, 'prompt: is missing: it is required\n(400 invalid_request, request req-1)');
		assert.equal(error.httpCode, '400');
		assert.equal(error.context.itemIndex, 0);
		return true;
	});
	assert.equal(context.did.waitTill, undefined);
});

const REFUSALS = [
	[problem(400, 'invalid_request', 'resumeUrl: http://n8n:5678 is not allowed.'), 400, 'invalid_request', false],
	[problem(401, 'token_signature', 'The signature does not match JWT_SECRET.'), 502, 'service_error', false],
	[problem(404, 'not_found', 'Nothing here.'), 502, 'service_error', false],
	[problem(413, 'body_too_large', 'Too large.'), 413, 'body_too_large', false],
	[problem(422, 'key_reused', 'Another body.'), 502, 'service_error', false],
	[problem(429, 'slow_down', 'Later.', {}, { 'retry-after': '7' }), 429, 'slow_down', true],
	[problem(500, 'internal', 'Our fault.'), 502, 'service_error', true],
	[problem(503, 'store_unavailable', 'Redis is away.', {}, { 'retry-after': '3' }), 503, 'store_unavailable', true],
	[{ status: 502, headers: { 'content-type': 'text/html' }, body: '<h1>Bad Gateway</h1>' }, 502, 'service_error', true],
	[{ status: 200, headers: { 'content-type': 'text/html' }, body: '<h1>n8n is starting up</h1>' }, 502, 'service_error', false],
	[{ status: 200, body: { hello: 'world' } }, 502, 'service_error', false],
];

for (const [answer, status, code, retryable] of REFUSALS) {
	test(`the browser is told that no stream was started, and not why: ${answer.status} ${answer.body.code ?? 'of something else'}`, async (t) => {
		const { url } = await serve(t, answer);
		const context = executeContext({ baseUrl: url });

		await assert.rejects(execute(context), { name: 'NodeApiError' });

		const [response, ...more] = context.did.responses;
		assert.deepEqual(more, []);
		assert.equal(response.statusCode, status);
		const { message, ...error } = response.body.error;
		assert.deepEqual([response.body.ok, error], [false, { code, retryable }]);
		assert.match(message, /\w+\.$/);
		assert.equal(response.headers['retry-after'], answer.headers?.['retry-after']);
		const told = JSON.stringify(response);
		for (const secret of [answer.body.detail, 'JWT_SECRET', JWT_SECRET, url, 'n8n:5678', 'signature=']) {
			assert.ok(!secret || !told.includes(secret), `the browser was told ${secret}`);
		}
	});
}

test('a service that cannot be reached is a NodeApiError without the request in it, and 502 for the browser', async (t) => {
	const { url } = await serve(t, (_request, response) => response.destroy());
	const context = executeContext({ baseUrl: url });

	await assert.rejects(execute(context), (error) => {
		assert.equal(error.name, 'NodeApiError');
		assert.match(error.message, /aistream cannot be reached|connection/i);
		assert.ok(!JSON.stringify({ ...error, stack: error.stack }).includes('Bearer'));
		return true;
	});
	assert.equal(context.did.responses[0].statusCode, 502);
	assert.deepEqual(context.did.responses[0].body.error.code, 'service_unreachable');
});

test('an answer that is not the service’s says where to look', async (t) => {
	const { url } = await serve(t, { status: 502, headers: { 'content-type': 'text/html' }, body: '<h1>Bad Gateway</h1>' });

	await assert.rejects(execute(executeContext({ baseUrl: url })), {
		name: 'NodeApiError',
		message: "The answer is not aistream's (status 502)",
		description: 'Is the Base URL of the credential right, and is there a proxy on the way?',
	});
});

const MISTAKES = [
	['two items', { items: [{ json: {} }, { json: {} }] }, 'AiStream takes one item at a time', 1],
	['no execution id', { of: execution({ id: undefined }) }, 'This execution has no resume URL', 0],
	['no resume URL', { of: execution({ resumeUrl: undefined }) }, 'This execution has no resume URL', 0],
	['broken messages', { options: { messages: '[{' } }, 'Messages is not valid JSON', 0],
	['messages that are no list', { options: { messages: '{"role": "user"}' } }, 'Messages must be a list', 0],
	['broken metadata', { options: { metadata: '{a: 1}' } }, 'Metadata is not valid JSON', 0],
	['metadata that is no object', { options: { metadata: [1] } }, 'Metadata must be an object', 0],
	['no base URL', { credentials: { baseUrl: 'aistream:8000' } }, 'The Base URL must begin with http:// or https://', 0],
	['no JWT secret', { credentials: { jwtSecret: '' } }, 'The JWT Secret is empty', 0],
	['a callback secret that is none', { credentials: { callbackSecret: 'secret' } }, 'The Callback Secret must be whsec_ and base64', 0],
];

for (const [name, given, message, itemIndex] of MISTAKES) {
	test(`the author’s mistake is a NodeOperationError, and asks nothing: ${name}`, async (t) => {
		const { url, requests } = await serve(t, { body: STREAM });
		const context = executeContext({ baseUrl: url, ...given });

		await assert.rejects(execute(context), (error) => {
			assert.deepEqual([error.name, error.message, error.context.itemIndex], ['NodeOperationError', message, itemIndex]);
			return true;
		});

		assert.deepEqual(requests, []);
		assert.equal(context.did.responses[0].statusCode, 500);
		assert.deepEqual(context.did.responses[0].body.error, {
			code: 'workflow_error',
			message: 'The workflow cannot start an answer.',
			retryable: false,
		});
	});
}

test('On Error: Continue gives the second output an item in the callback’s shape', async (t) => {
	const { url } = await serve(t, problem(401, 'token_signature', 'The signature does not match JWT_SECRET.'));
	const context = executeContext({ baseUrl: url, settings: { onError: 'continueRegularOutput' }, options: { chatId: 'c' } });

	const [completed, [item]] = await execute(context);

	assert.deepEqual([completed, item.pairedItem], [[], { item: 0 }]);
	assert.equal(item.json.status, 'not_started');
	assert.equal(item.json.streamId, null);
	assert.equal(item.json.chatId, 'c');
	assert.deepEqual(item.json.error, {
		code: 'token_signature',
		message: 'The signature does not match JWT_SECRET.',
		retryable: false,
	});
	assert.equal(context.did.responses[0].statusCode, 502);
	assert.equal(context.did.waitTill, undefined);
});

test('On Error: Continue Using Error Output gives n8n an item that it moves to the third output', async (t) => {
	const { url } = await serve(t, problem(401, 'token_signature', 'No.'));

	const [completed, [item]] = await execute(
		executeContext({ baseUrl: url, settings: { onError: 'continueErrorOutput' } }),
	);

	assert.deepEqual([completed, item.json], [[], { error: 'No.' }]);
	assert.equal(item.error.name, 'NodeApiError');
});

test('Retry On Fail: the browser is answered once, after the last try or after the one that worked', async (t) => {
	const away = problem(503, 'store_unavailable', 'Redis is away.');
	const { url, requests } = await serve(t, away, away, { body: STREAM }, away);
	const settings = { retryOnFail: true, maxTries: 3, onError: 'continueRegularOutput' };
	const of = execution();
	const responses = [];
	const attempt = async (run) => {
		const context = executeContext({ baseUrl: url, settings, of, run });
		const result = await execute(context).catch((error) => error.name);
		responses.push(...context.did.responses.map(({ statusCode }) => statusCode));
		return result;
	};

	// n8n tries again after an error only: until the last try the node must throw, whatever On Error says.
	assert.deepEqual([await attempt(0), await attempt(0)], ['NodeApiError', 'NodeApiError']);
	assert.deepEqual(responses, []);
	assert.equal((await attempt(0))[0].length, 1);
	assert.deepEqual(responses, [200]);

	assert.deepEqual([await attempt(1), await attempt(1)], ['NodeApiError', 'NodeApiError']);
	assert.deepEqual(responses, [200]);
	assert.equal((await attempt(1))[1][0].json.status, 'not_started');
	assert.deepEqual(responses, [200, 503]);

	const keys = requests.map(({ headers }) => headers['idempotency-key']);
	assert.equal(new Set(keys.slice(0, 3)).size, 1);
	assert.equal(new Set(keys).size, 2);
});
