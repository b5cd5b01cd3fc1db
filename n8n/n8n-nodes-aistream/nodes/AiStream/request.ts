import { createHash } from 'node:crypto';
import type { IDataObject, IExecuteFunctions, ILoadOptionsFunctions } from 'n8n-workflow';
import { NodeOperationError } from 'n8n-workflow';

import { SUFFIX } from './callback';
import { MIN_LIMIT } from './properties';
import { decodeSecret } from './signature';

/** Options that go to the service as they are, and the names it has for them. */
const FIELDS: Record<string, string> = {
	chatId: 'chatId',
	disconnectGraceSeconds: 'disconnectGraceSeconds',
	format: 'format',
	maxTokens: 'max_tokens',
	onDisconnect: 'onDisconnect',
	reasoningEffort: 'reasoning_effort',
	start: 'start',
	system: 'system',
	temperature: 'temperature',
	topP: 'top_p',
	userId: 'userId',
};

/**
 * The body of POST /init-stream. What is empty is left out; what the service can judge better is left to it.
 * Throws NodeOperationError for JSON that is none.
 */
export function requestBody(context: IExecuteFunctions): IDataObject {
	const options = context.getNodeParameter('options', 0, {}) as IDataObject;
	const body: IDataObject = { prompt: context.getNodeParameter('prompt', 0) as string };
	put(body, 'model', context.getNodeParameter('model', 0, '', { extractValue: true }));
	for (const [option, field] of Object.entries(FIELDS)) {
		put(body, field, options[option]);
	}
	put(body, 'fallbackModels', names(options.fallbackModels));
	const { stop } = options;
	put(body, 'stop', Array.isArray(stop) ? stop.filter((text) => text !== '') : stop);
	put(body, 'messages', json(context, options.messages, 'Messages', Array.isArray, 'a list'));
	put(body, 'metadata', json(context, options.metadata, 'Metadata', isObject, 'an object'));
	return body;
}

/** Milliseconds to wait for the callback. Throws NodeOperationError for less than n8n can do. */
export function limitOf(context: IExecuteFunctions): number {
	const minutes = Number(context.getNodeParameter('limitMinutes', 0, 15));
	if (!(minutes >= MIN_LIMIT)) {
		throw new NodeOperationError(context.getNode(), `Limit Wait must be at least ${MIN_LIMIT} minutes`, {
			itemIndex: 0,
			description: 'n8n looks for waits whose time is up once a minute.',
		});
	}
	return minutes * 60_000;
}

/** Where the callback of this execution goes. Throws NodeOperationError when the execution cannot wait. */
export function resumeUrlOf(context: IExecuteFunctions): string {
	const url = String(context.evaluateExpression('{{ $execution.resumeUrl }}', 0) ?? '');
	if (!context.getExecutionId() || !/^https?:\/\//.test(url)) {
		throw new NodeOperationError(context.getNode(), 'This execution has no resume URL', {
			itemIndex: 0,
			description:
				'The node waits for a callback, so it needs a saved workflow and an execution that n8n stores.',
		});
	}
	// The query is the execution's token and goes on byte for byte.
	const query = url.indexOf('?');
	return query < 0 ? `${url}/${SUFFIX}` : `${url.slice(0, query)}/${SUFFIX}${url.slice(query)}`;
}

/**
 * The same for all tries of one run of the node, and for nothing else: n8n's Retry On Fail must not start a second stream
 * when only the answer to the first try was lost. The resume URL has the execution's id and its random token.
 */
export function idempotencyKeyOf(context: IExecuteFunctions, resumeUrl: string): string {
	return createHash('sha256')
		.update([resumeUrl, context.getNode().id, runIndexOf(context)].join('\n'))
		.digest('hex');
}

/** Which run of the node in this execution this is: in a loop each round is one. */
export function runIndexOf(context: IExecuteFunctions): number {
	return Number(context.evaluateExpression('{{ $runIndex }}', 0));
}

/** The service's address. A bad callback secret is told now, not when the callback is refused. */
export async function baseUrlOf(context: IExecuteFunctions | ILoadOptionsFunctions): Promise<string> {
	const { baseUrl, jwtSecret, callbackSecret } = await context.getCredentials('aiStreamApi', 0);
	const fault = !/^https?:\/\//.test(String(baseUrl))
		? 'The Base URL must begin with http:// or https://'
		: !jwtSecret
			? 'The JWT Secret is empty'
			: callbackSecret && !decodeSecret(String(callbackSecret))
				? 'The Callback Secret must be whsec_ and base64'
				: undefined;
	if (fault) {
		throw new NodeOperationError(context.getNode(), fault, {
			itemIndex: 0,
			description: 'Check the credential AiStream API.',
		});
	}
	return String(baseUrl).replace(/\/+$/, '');
}

/** Names of models. An expression may give a list in place of the field's, or of one of its values, or text with commas. */
function names(given: unknown): unknown[] {
	return [given]
		.flat(2)
		.flatMap((name) => (typeof name === 'string' ? name.split(',') : [name]))
		.map((name) => (typeof name === 'string' ? name.trim() : name))
		.filter((name) => name !== undefined && name !== null && name !== '');
}

function put(body: IDataObject, field: string, value: unknown): void {
	if (value === undefined || value === null || value === '') return;
	if (Array.isArray(value) && value.length === 0) return;
	body[field] = value as IDataObject;
}

/** A JSON option: text from the editor, or a value from an expression. */
function json(
	context: IExecuteFunctions,
	given: unknown,
	name: string,
	fits: (value: unknown) => boolean,
	expected: string,
): unknown {
	if (given === undefined || given === null || given === '') return undefined;
	let value = given;
	if (typeof given === 'string') {
		try {
			value = JSON.parse(given);
		} catch (error) {
			throw new NodeOperationError(context.getNode(), `${name} is not valid JSON`, {
				itemIndex: 0,
				description: (error as Error).message,
			});
		}
	}
	if (!fits(value)) {
		throw new NodeOperationError(context.getNode(), `${name} must be ${expected}`, { itemIndex: 0 });
	}
	return value;
}

function isObject(value: unknown): boolean {
	return typeof value === 'object' && value !== null && !Array.isArray(value);
}
