// The list of models that the editor offers: what GET /models of the service has.

import assert from 'node:assert/strict';
import test from 'node:test';

import { claims, JWT_SECRET, problem, searchModels, serve } from './helper.mjs';

const LISTED = {
	ok: true,
	default: 'gpt-4',
	models: [
		{ id: 'ollama/llama3.2', provider: 'ollama', model: 'llama3.2' },
		{ id: 'gpt-4o', provider: 'openai', model: 'gpt-4o' },
		{ id: 'fast', provider: 'fast', model: 'mistral-small-latest' },
	],
	providers: [{ name: 'openai', configured: true, error: null, defaults: {}, limits: {} }],
};

test('asks GET /models with the credential, and offers what an init says', async (t) => {
	const { url, requests } = await serve(t, { body: LISTED });

	const { results } = await searchModels({ baseUrl: `${url}/prefix/` });

	assert.deepEqual(
		results,
		['fast', 'gpt-4o', 'ollama/llama3.2'].map((id) => ({ name: id, value: id })),
	);
	const [{ method, url: path, headers, body }] = requests;
	assert.deepEqual([method, path, body], ['GET', '/prefix/models', undefined]);
	assert.equal(claims(headers.authorization.replace('Bearer ', '')).sub, 'n8n');
});

test('finds a model by any part of its name, whatever the case', async (t) => {
	const { url } = await serve(t, { body: LISTED });
	const found = async (filter) => (await searchModels({ baseUrl: url }, filter)).results.map(({ value }) => value);

	assert.deepEqual(await found(' LLAMA'), ['ollama/llama3.2']);
	assert.deepEqual(await found('a'), ['fast', 'ollama/llama3.2']);
	assert.deepEqual(await found('claude'), []);
	assert.equal((await found('')).length, 3);
});

const FAILURES = [
	['the token is refused', problem(401, 'token_signature', 'The signature is not good.'), 'The signature is not good.'],
	['a service without the list', problem(404, 'not_found', 'There is nothing here.'), 'There is nothing here.'],
	['a page', { body: '<h1>Hello</h1>' }, "The answer is not aistream's (status 200)"],
	['no answer', (_request, response) => response.destroy(), 'aistream cannot be reached'],
];

for (const [name, answer, message] of FAILURES) {
	test(`says why there is no list, and no secret: ${name}`, async (t) => {
		const { url } = await serve(t, answer);

		await assert.rejects(searchModels({ baseUrl: url }), (error) => {
			assert.deepEqual([error.name, error.message], ['NodeApiError', message]);
			assert.ok(!JSON.stringify({ ...error, stack: error.stack }).includes(JWT_SECRET));
			return true;
		});
	});
}

test('a bad credential is told before anything is asked', async (t) => {
	const { url, requests } = await serve(t, { body: LISTED });

	await assert.rejects(searchModels({ baseUrl: url, credentials: { jwtSecret: '' } }), {
		name: 'NodeOperationError',
		message: 'The JWT Secret is empty',
	});
	assert.deepEqual(requests, []);
});
