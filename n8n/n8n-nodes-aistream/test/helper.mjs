// What the tests stand on: the built files, a real HTTP server in the service's place, and n8n's function contexts.
// Only those contexts are mocked (IExecuteFunctions, IWebhookFunctions, ILoadOptionsFunctions), as n8n 2.41.1 fills them.

import assert from 'node:assert/strict';
import { createHmac } from 'node:crypto';
import { existsSync } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { Webhook } from 'standardwebhooks';

const require = createRequire(import.meta.url);
export const dist = new URL('../dist/', import.meta.url);

if (!existsSync(dist)) throw new Error('dist/ is missing: run `npm run build` first');

export const load = (path) => require(new URL(path, dist).pathname);

const { AiStream } = load('nodes/AiStream/AiStream.node.js');
const { AiStreamApi } = load('credentials/AiStreamApi.credentials.js');

export const node = new AiStream();
export const credential = new AiStreamApi();

export const JWT_SECRET = 'a-secret-of-the-tests-0123456789-0123';
export const CALLBACK_SECRET = `whsec_${Buffer.from('callback-secret-of-the-tests-32b').toString('base64')}`;
export const RESUME_URL = `http://n8n:5678/webhook-waiting/7?signature=${'ab'.repeat(32)}`;
export const STREAM = {
	ok: true,
	streamUrl: 'http://127.0.0.1:8000/stream/s-1?access_token=secret-token',
	streamId: 's-1',
	expiresAt: '2026-11-23T10:01:00.000Z',
	warnings: [],
};

/** A server on a free port. `answers` are given one after the other, the last one again and again; it keeps what it got. */
export async function serve(t, ...answers) {
	const requests = [];
	const server = createServer(async (request, response) => {
		const chunks = [];
		for await (const chunk of request) chunks.push(chunk);
		const raw = Buffer.concat(chunks);
		requests.push({ method: request.method, url: request.url, headers: request.headers, body: raw.length ? JSON.parse(raw) : undefined });
		const answer = answers.length > 1 ? answers.shift() : answers[0];
		if (typeof answer === 'function') return answer(request, response);
		const { status = 200, headers = {}, body } = answer;
		response.writeHead(status, { 'content-type': 'application/json', ...headers });
		return response.end(typeof body === 'string' ? body : JSON.stringify(body));
	});
	await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
	t.after(() => server.closeAllConnections() ?? server.close());
	return { url: `http://127.0.0.1:${server.address().port}`, requests };
}

/** A problem+json answer of the service. */
export const problem = (status, code, detail, more = {}, headers = {}) => ({
	status,
	headers: { 'content-type': 'application/problem+json', ...headers },
	body: { ok: false, type: 'about:blank', title: 'Title', status, code, detail, requestId: 'req-1', ...more },
});

/** One execution of a workflow: what outlives a run of the node. */
export function execution(overrides = {}) {
	return { id: '7', resumeUrl: RESUME_URL, flow: {}, contexts: {}, ...overrides };
}

/** IExecuteFunctions for one run of the node. Everything that the node does to n8n is in `did`. */
export function executeContext({
	baseUrl = 'http://127.0.0.1:9',
	parameters = {},
	options = {},
	credentials = {},
	items = [{ json: {} }],
	settings = {},
	run = 0,
	of = execution(),
	name = 'AiStream',
} = {}) {
	const given = { prompt: 'What is AI?', model: '', respond: true, limitMinutes: 15, options, ...parameters };
	const decrypted = { baseUrl, jwtSecret: JWT_SECRET, algorithm: 'HS256', subject: 'n8n', ...credentials };
	const own = (of.contexts[name] ??= {});
	const executeData = { data: { main: [items] }, node: {}, source: null };
	const did = { responses: [], waitTill: undefined, metadata: {}, executeData };
	const context = {
		did,
		of,
		getNode: () => ({ id: `id-of-${name}`, name, type: 'n8n-nodes-aistream.aiStream', typeVersion: 1.1, ...settings }),
		getInputData: () => items,
		getNodeParameter: (parameter, _item, fallback, { extractValue = false } = {}) => {
			const value = given[parameter] ?? fallback;
			return extractValue && value?.__rl ? value.value : value;
		},
		getCredentials: async () => decrypted,
		getContext: (type) => (type === 'flow' ? of.flow : own),
		getExecutionId: () => of.id,
		getExecuteData: () => executeData,
		evaluateExpression: (expression) =>
			evaluate(expression, { $execution: { resumeUrl: of.resumeUrl }, $runIndex: run }),
		continueOnFail: () => ['continueRegularOutput', 'continueErrorOutput'].includes(settings.onError),
		setMetadata: (metadata) => Object.assign(did.metadata, metadata),
		sendResponse: async (response) => did.responses.push(response),
		putExecutionToWait: async (waitTill) => {
			did.waitTill = waitTill;
		},
		helpers: helpers(decrypted),
	};
	return context;
}

export const execute = (context) => node.execute.call(context);

/** ILoadOptionsFunctions for the editor's list of models. */
export function searchModels({ baseUrl, credentials = {} }, filter) {
	const decrypted = { baseUrl, jwtSecret: JWT_SECRET, algorithm: 'HS256', subject: 'n8n', ...credentials };
	const context = {
		getNode: () => ({ name: 'AiStream', type: 'n8n-nodes-aistream.aiStream', typeVersion: 1.1 }),
		getCredentials: async () => decrypted,
		helpers: helpers(decrypted),
	};
	return node.methods.listSearch.searchModels.call(context, filter);
}

/** n8n's request helper: it signs with the credential, and does not throw for a status when it is told so. */
function helpers(decrypted) {
	return {
		async httpRequestWithAuthentication(type, request) {
			assert.equal(type, 'aiStreamApi');
			assert.equal(request.ignoreHttpStatusErrors, true);
			const { method, url, headers, body } = await credential.authenticate(decrypted, request);
			const response = await fetch(url, {
				method,
				headers: { 'content-type': 'application/json', ...headers },
				body: JSON.stringify(body),
				redirect: 'manual',
			});
			return {
				statusCode: response.status,
				headers: Object.fromEntries(response.headers),
				body: parsed(await response.text()),
			};
		},
	};
}

/**
 * POSTs `body` to a waiting execution, through a real socket, and gives what the sender got and what n8n was told.
 * `headers` are added to the signature's, or replace them.
 */
export async function callback(t, of, body, { credentials = {}, headers, name = 'AiStream', cut = {} } = {}) {
	let told;
	const logged = [];
	const server = createServer(async (request, response) => {
		const chunks = [];
		for await (const chunk of request) chunks.push(chunk);
		request.rawBody = Buffer.concat(chunks);
		response.status = (status) => Object.assign(response, { statusCode: status });
		response.json = (value) => response.end(JSON.stringify(value));
		told = await node.webhook.call({
			getNode: () => ({ id: `id-of-${name}`, name }),
			getCredentials: async () => ({ callbackSecret: CALLBACK_SECRET, ...credentials }),
			getRequestObject: () => request,
			getResponseObject: () => response,
			getHeaderData: () => request.headers,
			getBodyData: () => parsed(request.rawBody.toString()),
			evaluateExpression: (expression) =>
				evaluate(expression, {
					$node: Object.fromEntries(Object.entries(of.contexts).map(([key, own]) => [key, { context: own }])),
				}),
			logger: { error: (line) => logged.push(line) },
			...cut,
		});
		// n8n's own answer when the wait ends, with responseData noData.
		if (!told.noWebhookResponse) response.status(200).end();
	});
	await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
	t.after(() => server.close());
	const raw = typeof body === 'string' ? body : JSON.stringify(body);
	const response = await fetch(`http://127.0.0.1:${server.address().port}`, {
		method: 'POST',
		headers: { 'content-type': 'application/json', connection: 'close', ...(headers ?? signed(raw)) },
		body: raw,
	});
	return { status: response.status, body: parsed(await response.text()), told, logged };
}

/** The headers of a callback, made by the reference library. `at` is a Date. */
export function signed(raw, { secret = CALLBACK_SECRET, at = new Date(), id = 'msg_s-1' } = {}) {
	return {
		'webhook-id': id,
		'webhook-timestamp': String(Math.floor(at.getTime() / 1000)),
		'webhook-signature': new Webhook(secret).sign(id, at, raw),
	};
}

/** The callback's body as the service sends it. */
export const ended = (streamId, status = 'completed', more = {}) => ({
	userId: null,
	chatId: null,
	prompt: 'What is AI?',
	answer: 'Grüße, \u2028 “quoted”',
	input_tokens: 4,
	output_tokens: 217,
	streamId,
	status,
	finish_reason: status === 'completed' ? 'stop' : status,
	error: null,
	model: 'echo',
	requested_model: 'echo',
	provider: 'echo',
	provider_requests: 1,
	warnings: [],
	usage: {
		input_tokens: 4,
		output_tokens: 217,
		cached_input_tokens: 0,
		reasoning_tokens: 0,
		source: 'provider',
		estimated_by: null,
	},
	timings: { created_at: '2026-11-23T10:00:00.000Z', queued_ms: 0 },
	attempt: 1,
	metadata: null,
	...more,
});

/** Claims and header of a JWT, when `secret` has signed it. */
export function claims(token, secret = JWT_SECRET) {
	const [header, payload, signature] = token.split('.');
	const { alg } = JSON.parse(Buffer.from(header, 'base64url'));
	const hash = { HS256: 'sha256', HS384: 'sha384', HS512: 'sha512' }[alg];
	const expected = createHmac(hash, secret).update(`${header}.${payload}`).digest('base64url');
	assert.equal(signature, expected);
	return { alg, ...JSON.parse(Buffer.from(payload, 'base64url')) };
}

/** Evaluates `{{ … }}` as n8n does: JavaScript with n8n's variables. */
function evaluate(expression, variables) {
	const source = /^\{\{(.*)\}\}$/s.exec(expression);
	assert.ok(source && !source[1].includes('}}'), `not one expression: ${expression}`);
	return new Function(...Object.keys(variables), `return (${source[1]})`)(...Object.values(variables));
}

function parsed(text) {
	try {
		return JSON.parse(text);
	} catch {
		return text;
	}
}
