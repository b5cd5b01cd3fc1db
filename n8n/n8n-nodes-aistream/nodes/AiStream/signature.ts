import { createHmac, timingSafeEqual } from 'node:crypto';

/** Seconds that a callback's timestamp may differ from this clock, either way (Standard Webhooks' own libraries: 300). */
export const TOLERANCE = 300;

const PREFIX = 'whsec_';

/** The bytes of a Standard Webhooks secret (`whsec_` and base64), or undefined when it is none. */
export function decodeSecret(text: string): Buffer | undefined {
	const encoded = text.trim().startsWith(PREFIX) ? text.trim().slice(PREFIX.length) : '';
	// Buffer.from skips what is not base64: a mistyped secret would become another one.
	if (!/^[A-Za-z0-9+/]{4,}={0,2}$/.test(encoded)) return undefined;
	return Buffer.from(encoded, 'base64');
}

/**
 * What is wrong with the signature of a request (Standard Webhooks 1.0, `v1`), or undefined when it is good.
 * `body` is what came over the wire, byte for byte; `now` is seconds since 1970.
 */
export function signatureFault(
	secret: Buffer,
	headers: Record<string, unknown>,
	body: Buffer,
	now: number,
): string | undefined {
	const id = headers['webhook-id'];
	const timestamp = headers['webhook-timestamp'];
	const signatures = headers['webhook-signature'];
	if (typeof id !== 'string' || typeof timestamp !== 'string' || typeof signatures !== 'string') {
		return 'webhook-id, webhook-timestamp or webhook-signature is missing';
	}
	if (!/^\d+$/.test(timestamp)) return 'webhook-timestamp is not a number of seconds';
	const age = now - Number(timestamp);
	if (Math.abs(age) > TOLERANCE) {
		return `webhook-timestamp is more than ${TOLERANCE} s ${age > 0 ? 'old' : 'in the future'}`;
	}
	const expected = createHmac('sha256', secret).update(`${id}.${timestamp}.`).update(body).digest();
	// Several signatures: the sender changes its secret and signs with both.
	const good = signatures
		.split(' ')
		.filter((signature) => signature.startsWith('v1,'))
		.map((signature) => Buffer.from(signature.slice('v1,'.length), 'base64'))
		.some((given) => given.length === expected.length && timingSafeEqual(given, expected));
	return good ? undefined : 'webhook-signature does not match';
}
