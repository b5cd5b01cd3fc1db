import type { IDataObject, IExecuteResponsePromiseData, INode, JsonObject } from 'n8n-workflow';
import { NodeApiError, NodeOperationError } from 'n8n-workflow';

/**
 * Why no stream was started, for three readers: the author (a typed error), the workflow (`code`, `retryable`), and the
 * browser (`answer`), which is told no detail: details name fields, addresses and settings.
 */
export interface Failure {
	error: NodeApiError | NodeOperationError;
	code: string;
	retryable: boolean;
	answer: IExecuteResponsePromiseData;
}

/** What the browser is told, by the status it gets. */
const SENTENCES: Record<number, string> = {
	400: 'The request was not accepted.',
	413: 'The request is too large.',
	429: 'Too many requests. Try again later.',
	500: 'The workflow cannot start an answer.',
	502: 'The answer could not be started.',
	503: 'The service is not available. Try again later.',
};

/** The author's mistake: retrying is of no use. */
export function mistake(error: NodeOperationError): Failure {
	return { error, code: 'workflow_error', retryable: false, answer: answer(500, 'workflow_error', false) };
}

/** No answer from the service. `cause` is what n8n's request helper threw: it may hold the request, so it is not passed on. */
export function unreachable(node: INode, cause: unknown): Failure {
	const { message, code, httpCode } = cause as { message?: string; code?: string; httpCode?: string };
	const reason = [httpCode ?? code, message].filter(Boolean).join(': ');
	return {
		error: new NodeApiError(node, { message: reason } as JsonObject, {
			message: 'aistream cannot be reached',
			description: `${reason}. Is the Base URL of the credential right, seen from n8n?`,
			itemIndex: 0,
		}),
		code: 'service_unreachable',
		retryable: true,
		answer: answer(502, 'service_unreachable', true),
	};
}

/** The service's refusal: RFC 9457 problem+json, or whatever a proxy says in its place. */
export function refused(node: INode, status: number, headers: IDataObject, body: unknown): Failure {
	const problem = isProblem(body) ? body : undefined;
	const code = problem?.code ?? 'service_error';
	const retryable = status === 408 || status === 425 || status === 429 || status >= 500;
	const shown = SENTENCES[status] && status !== 500 ? status : 502;
	// What is wrong with our token is nobody's business in the browser.
	const told = shown === 502 ? 'service_error' : code;
	return {
		error: new NodeApiError(node, { message: problem?.detail ?? `status ${status}` } as JsonObject, {
			message: problem?.detail ?? problem?.title ?? `The answer is not aistream's (status ${status})`,
			description: problem
				? describe(status, problem)
				: 'Is the Base URL of the credential right, and is there a proxy on the way?',
			httpCode: String(status),
			itemIndex: 0,
		}),
		code,
		retryable,
		answer: answer(shown, told, retryable, headers['retry-after']),
	};
}

interface Problem {
	title?: string;
	detail?: string;
	code: string;
	requestId?: string;
	errors?: Array<{ field?: string; message?: string }>;
}

function isProblem(body: unknown): body is Problem {
	return typeof body === 'object' && body !== null && typeof (body as IDataObject).code === 'string';
}

function describe(status: number, problem: Problem): string {
	const fields = (problem.errors ?? []).map(({ field, message }) => `${field}: ${message}`);
	const hint = status === 401 ? ['Check the credential AiStream API.'] : [];
	const id = problem.requestId ? `, request ${problem.requestId}` : '';
	return [...fields, ...hint, `(${status} ${problem.code}${id})`].join('\n');
}

function answer(
	statusCode: number,
	code: string,
	retryable: boolean,
	retryAfter?: unknown,
): IExecuteResponsePromiseData {
	return {
		statusCode,
		headers: {
			'content-type': 'application/json',
			'cache-control': 'no-store',
			...(retryAfter ? { 'retry-after': String(retryAfter) } : {}),
		},
		body: { ok: false, error: { code, message: SENTENCES[statusCode], retryable } },
	};
}
