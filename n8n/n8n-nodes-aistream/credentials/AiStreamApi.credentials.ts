import type {
	Icon,
	IAuthenticate,
	ICredentialDataDecryptedObject,
	ICredentialTestRequest,
	ICredentialType,
	IHttpRequestOptions,
	INodeProperties,
} from 'n8n-workflow';

import { type Algorithm, signJwt } from './jwt';

/** Seconds that a token is good for. It is signed for one request, so this only has to cover the clocks' difference. */
const LIFETIME = 300;

/** What POST /init-stream says to a token that it does not accept, and what to do about it. */
const REFUSALS: Record<string, string> = {
	token_signature: "The JWT secret is not the service's JWT_SECRET",
	token_algorithm: "The algorithm is not the service's JWT_ALGORITHM",
	token_audience: "The audience is not the service's JWT_AUDIENCE",
	token_issuer: "The issuer is not the service's JWT_ISSUER",
	token_claim_missing: 'The service asks for an audience or an issuer, and the credential has none',
	token_expired: "This machine's clock is behind the service's",
	token_not_yet_valid: "This machine's clock is ahead of the service's",
	invalid_json: 'The service did not get the request as it was sent. Is there a proxy on the way?',
};

export class AiStreamApi implements ICredentialType {
	name = 'aiStreamApi';

	displayName = 'AiStream API';

	icon: Icon = { light: 'file:../icons/aistream.svg', dark: 'file:../icons/aistream.dark.svg' };

	documentationUrl = 'https://aistream.example/n8n-nodes-aistream';

	properties: INodeProperties[] = [
		{
			displayName: 'Base URL',
			name: 'baseUrl',
			type: 'string',
			default: '',
			required: true,
			placeholder: 'http://aistream:8000',
			description: 'Where n8n reaches the service, with the path prefix if it has one',
		},
		{
			displayName: 'JWT Secret',
			name: 'jwtSecret',
			type: 'string',
			typeOptions: { password: true },
			default: '',
			required: true,
			description: "The service's JWT_SECRET",
		},
		{
			displayName: 'Algorithm',
			name: 'algorithm',
			type: 'options',
			options: [
				{ name: 'HS256', value: 'HS256' },
				{ name: 'HS384', value: 'HS384' },
				{ name: 'HS512', value: 'HS512' },
			],
			default: 'HS256',
			description: "The service's JWT_ALGORITHM",
		},
		{
			displayName: 'Subject',
			name: 'subject',
			type: 'string',
			default: 'n8n',
			description: 'The claim sub: who owns the streams that are started',
		},
		{
			displayName: 'Audience',
			name: 'audience',
			type: 'string',
			default: '',
			description: "The claim aud: the service's JWT_AUDIENCE. Leave empty if it has none.",
		},
		{
			displayName: 'Issuer',
			name: 'issuer',
			type: 'string',
			default: '',
			description: "The claim iss: the service's JWT_ISSUER. Leave empty if it has none.",
		},
		{
			displayName: 'Callback Secret',
			name: 'callbackSecret',
			type: 'string',
			typeOptions: { password: true },
			default: '',
			placeholder: 'whsec_...',
			description:
				"The service's CALLBACK_SECRET. With it only callbacks that the service has signed end the wait; without it nothing is verified.",
		},
	];

	authenticate: IAuthenticate = async (
		credentials: ICredentialDataDecryptedObject,
		requestOptions: IHttpRequestOptions,
	): Promise<IHttpRequestOptions> => {
		const now = Math.floor(Date.now() / 1000);
		const { audience, issuer } = credentials;
		const token = signJwt(
			{
				sub: String(credentials.subject ?? ''),
				iat: now,
				exp: now + LIFETIME,
				...(audience ? { aud: String(audience) } : {}),
				...(issuer ? { iss: String(issuer) } : {}),
			},
			String(credentials.jwtSecret),
			(credentials.algorithm || 'HS256') as Algorithm,
		);
		return {
			...requestOptions,
			headers: { ...requestOptions.headers, Authorization: `Bearer ${token}` },
		};
	};

	/**
	 * Asks for a stream that cannot be: the service looks at the token before it looks at the rest, so its 400 proves the
	 * secret and starts nothing. n8n takes every status for an error, hence `ignoreHttpStatusErrors` and rules on the body.
	 * The body is not empty, since n8n does not send an empty one.
	 */
	test: ICredentialTestRequest = {
		request: {
			baseURL: '={{ $credentials.baseUrl.replace(/\\/+$/, "") }}',
			url: '/init-stream',
			method: 'POST',
			body: { prompt: '' },
			json: true,
			ignoreHttpStatusErrors: true,
		},
		rules: [
			...Object.entries(REFUSALS).map(([code, message]) => bodyRule('code', code, message)),
			bodyRule('status', 401, 'The service does not accept the token'),
			bodyRule('status', 404, 'The base URL is not that of the service: there is no /init-stream'),
			// Every problem of the service has one.
			bodyRule('requestId', undefined, 'What answers at the base URL is not aistream'),
		],
	};
}

function bodyRule(key: string, value: unknown, message: string) {
	return { type: 'responseSuccessBody' as const, properties: { key, value, message } };
}
