import { createHmac } from 'node:crypto';

const HASHES = { HS256: 'sha256', HS384: 'sha384', HS512: 'sha512' } as const;

export type Algorithm = keyof typeof HASHES;

export interface Claims {
	sub: string;
	iat: number;
	exp: number;
	aud?: string;
	iss?: string;
}

/** A JWT (RFC 7519) signed with HMAC. `iat` and `exp` are whole seconds since 1970. */
export function signJwt(claims: Claims, secret: string, algorithm: Algorithm): string {
	const signed = `${encode({ alg: algorithm, typ: 'JWT' })}.${encode(claims)}`;
	return `${signed}.${createHmac(HASHES[algorithm], secret).update(signed).digest('base64url')}`;
}

function encode(value: object): string {
	return Buffer.from(JSON.stringify(value)).toString('base64url');
}
