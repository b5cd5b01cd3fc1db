// The second half of the node: webhook() takes the callback of the stream that the execution waits for, and no other request.

import assert from 'node:assert/strict';
import test from 'node:test';

import { Webhook } from 'standardwebhooks';

import { callback, CALLBACK_SECRET, ended, execute, executeContext, execution, load, serve, signed, STREAM } from './helper.mjs';

const { signatureFault, decodeSecret } = load('nodes/AiStream/signature.js');

/** An execution that waits for each of `streams` in turn, the last one still. */
async function waiting(t, streams = ['s-1'], { name = 'AiStream', of = execution(), limitMinutes = 15 } = {}) {
	for (const [run, streamId] of streams.entries()) {
		const { url } = await serve(t, { body: { ...STREAM, streamId } });
		await execute(executeContext({ baseUrl: url, of, run, name, parameters: { limitMinutes } }));
	}
	return of;
}

/** The wait goes on: n8n was given nothing to go on with. */
function goesOn({ told }) {
	assert.deepEqual(told, { noWebhookResponse: true });
}

test('a completed stream goes to the first output, with the callback’s body as it is', async (t) => {
	const of = await waiting(t);
	const body = ended('s-1', 'completed', { metadata: { a: [1] }, something: 'new' });

	const { status, told } = await callback(t, of, body);

	assert.equal(status, 200);
	assert.deepEqual(told, { workflowData: [[{ json: body, pairedItem: { item: 0 } }], []] });
});

for (const status of ['failed', 'cancelled', 'expired', 'a status of the future']) {
	test(`a stream that is ${status} goes to the second output`, async (t) => {
		const of = await waiting(t);
		const error = status === 'failed' ? { code: 'internal', message: 'x', retryable: true } : null;
		const body = ended('s-1', status, { answer: 'a part', error });

		const { told } = await callback(t, of, body);

		assert.deepEqual(told.workflowData, [[], [{ json: body, pairedItem: { item: 0 } }]]);
	});
}

const WRONG = {
	'no signature': { 'content-type': 'application/json' },
	'another secret': (raw) => signed(raw, { secret: `whsec_${Buffer.from('x'.repeat(32)).toString('base64')}` }),
	'another body': () => signed('{}'),
	'another id': (raw) => ({ ...signed(raw), 'webhook-id': 'msg_other' }),
	'a timestamp that was not signed': (raw) => ({ ...signed(raw), 'webhook-timestamp': String(Math.floor(Date.now() / 1000) + 1) }),
	'a timestamp that is no number': (raw) => ({ ...signed(raw), 'webhook-timestamp': 'now' }),
	'an old timestamp': (raw) => signed(raw, { at: new Date(Date.now() - 302_000) }),
	'a timestamp in the future': (raw) => signed(raw, { at: new Date(Date.now() + 302_000) }),
	'an unknown version': (raw) => ({ ...signed(raw), 'webhook-signature': signed(raw)['webhook-signature'].replace('v1,', 'v2,') }),
	'a signature that was cut': (raw) => ({ ...signed(raw), 'webhook-signature': signed(raw)['webhook-signature'].slice(0, 20) }),
	'an empty signature': (raw) => ({ ...signed(raw), 'webhook-signature': 'v1,' }),
};

for (const [name, headers] of Object.entries(WRONG)) {
	test(`401, and the wait goes on: ${name}`, async (t) => {
		const of = await waiting(t);
		const raw = JSON.stringify(ended('s-1'));

		const answer = await callback(t, of, raw, { headers: typeof headers === 'function' ? headers(raw) : headers });

		assert.deepEqual([answer.status, answer.body.code], [401, 'signature']);
		goesOn(answer);
		assert.equal((await callback(t, of, raw)).status, 200);
	});
}

test('one good signature of several is enough, while the sender changes its secret', async (t) => {
	const of = await waiting(t);
	const raw = JSON.stringify(ended('s-1'));
	const good = signed(raw)['webhook-signature'];
	const other = signed(raw, { secret: `whsec_${Buffer.from('x'.repeat(32)).toString('base64')}` })['webhook-signature'];

	for (const signatures of [`${other} ${good}`, `${good} ${other}`, `v1a,abc ${good}`]) {
		const headers = { ...signed(raw), 'webhook-signature': signatures };
		assert.ok((await callback(t, of, raw, { headers })).told.workflowData);
	}
});

test('the bytes that came are verified, not what they mean', async (t) => {
	const of = await waiting(t);
	const raw = `{ "streamId" : "s-1",\n\t"status": "completed", "answer": "\\u00fc ü", "n": 1.0 }`;

	assert.ok((await callback(t, of, raw)).told.workflowData);
	const answer = await callback(t, of, raw, { headers: signed(JSON.stringify(JSON.parse(raw))) });
	assert.equal(answer.status, 401);
});

test('without a callback secret nothing is verified', async (t) => {
	const of = await waiting(t);

	const { told } = await callback(t, of, ended('s-1'), { credentials: { callbackSecret: '' }, headers: {} });

	assert.ok(told.workflowData);
});

test('a duplicate of an accepted callback is 200 for its sender, and the second node waits on', async (t) => {
	const of = await waiting(t, ['s-1'], { name: 'First' });
	await waiting(t, ['s-2'], { name: 'Second', of });

	const duplicate = await callback(t, of, ended('s-1'), { name: 'Second' });

	assert.deepEqual([duplicate.status, duplicate.body.ok], [200, true]);
	goesOn(duplicate);
	assert.ok((await callback(t, of, ended('s-2'), { name: 'Second' })).told.workflowData);
});

test('in a loop each round waits for its own stream', async (t) => {
	const of = await waiting(t, ['s-1', 's-2', 's-3']);

	for (const streamId of ['s-1', 's-2']) {
		const duplicate = await callback(t, of, ended(streamId));
		assert.equal(duplicate.status, 200);
		goesOn(duplicate);
	}
	assert.ok((await callback(t, of, ended('s-3'))).told.workflowData);
});

test('the callback of another stream is 404, and the wait goes on', async (t) => {
	const of = await waiting(t);

	// The names of what every object has are no streams.
	for (const streamId of ['s-2', '', 'constructor', '__proto__']) {
		const answer = await callback(t, of, ended(streamId));
		assert.deepEqual([answer.status, answer.body.code], [404, 'unknown_stream']);
		goesOn(answer);
	}
});

test('the late callback of a stream whose wait timed out is 409', async (t) => {
	const of = await waiting(t, ['s-1']);
	// n8n went on when the first wait's time was up.
	of.flow.aistream[0].waitTill = Date.now() - 1;
	await waiting(t, ['s-2'], { of });

	const late = await callback(t, of, ended('s-1'));

	assert.deepEqual([late.status, late.body.code], [409, 'no_longer_waiting']);
	goesOn(late);
});

test('no answer to a sender holds the words by which it knows n8n’s own answers', async (t) => {
	const of = await waiting(t, ['s-1', 's-2']);
	of.flow.aistream[0].ended = undefined;

	for (const answer of [
		await callback(t, of, ended('s-1')),
		await callback(t, of, ended('s-9')),
		await callback(t, of, {}),
		await callback(t, of, ended('s-2'), { headers: {} }),
	]) {
		assert.doesNotMatch(JSON.stringify(answer.body), /running already|does not exist|matching path|<html/);
	}
});

test('what is no callback is 400, and the wait goes on', async (t) => {
	const of = await waiting(t);

	for (const body of ['[]', 'null', '{}', '"text"', '{"streamId": 1, "status": "completed"}', '{"streamId": "s-1"}']) {
		const answer = await callback(t, of, body);
		assert.equal(answer.status, 400);
		goesOn(answer);
	}
});

test('what goes wrong in the node is 503, so that the sender comes again, and never an exception, which would end the wait', async (t) => {
	const of = await waiting(t);
	const broken = async () => {
		throw new Error('the credential is gone');
	};

	for (const options of [
		{ cut: { getCredentials: broken } },
		{ cut: { evaluateExpression: () => undefined } },
		{ cut: { evaluateExpression: () => '{"broken' } },
		{ credentials: { callbackSecret: 'not a secret' } },
	]) {
		const answer = await callback(t, of, ended('s-1'), options);
		assert.deepEqual([answer.status, answer.body.code, answer.logged.length], [503, 'not_verified', 1]);
		goesOn(answer);
	}
});

test('the node may have any name', async (t) => {
	for (const name of ['A "quoted" one', "it's", 'a}} {{ b', 'back\\slash', 'Grüße 🎉\n`${1}`']) {
		const of = await waiting(t, ['s-1'], { name });
		assert.ok((await callback(t, of, ended('s-1'), { name })).told.workflowData, name);
	}
});

test('the books stay small in a long loop', async (t) => {
	const { remember } = load('nodes/AiStream/waiting.js');
	const flow = {};
	const own = {};

	for (let round = 0; round < 1000; round++) remember(flow, own, `stream-${round}`, round + 1000, round);

	assert.equal(flow.aistream.length, 100);
	assert.equal(JSON.parse(own.aistream).streamId, 'stream-999');
	assert.ok(own.aistream.length < 5000);
});

// The secret is the one of the Standard Webhooks specification. The headers were made by the service's own code, with
// another secret before it; the second signature is also what Python's standardwebhooks 1.1.0 makes.
const VECTOR = {
	secret: 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw',
	at: 1_700_000_000,
	body: '{"streamId":"s-1","status":"completed","answer":"Grüße"}',
	headers: {
		'webhook-id': 'msg_s-1',
		'webhook-timestamp': '1700000000',
		'webhook-signature':
			'v1,xf2LHCfosDujNNUAo3a1BQqFMMawiGFoBXV1Fb4l5wc= v1,Si6ITuuBnWXbD4VtMg/d5HFNS7p7WVJX52uIeZJVwLY=',
	},
};

test('what the service and the reference libraries sign is accepted, up to 300 s from now', () => {
	const secret = decodeSecret(VECTOR.secret);
	const body = Buffer.from(VECTOR.body);
	const other = decodeSecret(`whsec_${Buffer.from('z'.repeat(32)).toString('base64')}`);
	const fault = (key, now) => signatureFault(key, VECTOR.headers, body, now);

	assert.equal(fault(secret, VECTOR.at), undefined);
	assert.equal(fault(other, VECTOR.at), undefined);
	assert.equal(fault(secret, VECTOR.at + 300), undefined);
	assert.equal(fault(secret, VECTOR.at - 300), undefined);
	assert.match(fault(secret, VECTOR.at + 301), /300 s old/);
	assert.match(fault(secret, VECTOR.at - 301), /in the future/);
	const reference = new Webhook(VECTOR.secret).sign('msg_s-1', new Date(VECTOR.at * 1000), VECTOR.body);
	assert.equal(reference, VECTOR.headers['webhook-signature'].split(' ')[1]);
});

test('a secret is whsec_ and base64, and nothing else', () => {
	assert.equal(decodeSecret(` ${CALLBACK_SECRET}\n`).length, 32);
	for (const text of ['', 'whsec_', 'whsec_???', 'secret', CALLBACK_SECRET.slice('whsec_'.length), 'whsec_abc def']) {
		assert.equal(decodeSecret(text), undefined, text);
	}
});
