import type { IDataObject, INodeExecutionData } from 'n8n-workflow';

import type { Waiting } from './waiting';

/** The path after the execution's id in the resume URL. n8n gives a request with it to no Wait node, and ours to no other. */
export const SUFFIX = 'aistream';

export type Decision =
	| { kind: 'resume'; outputs: INodeExecutionData[][] }
	| { kind: 'answer'; status: number; body: IDataObject };

/**
 * What to do with a callback whose sender is settled.
 *
 * The service repeats a callback whose outcome it does not know. 200 and 409 tell it that there is nothing left to do; 404
 * that the callback will never be taken. None of them ends the wait.
 */
export function decide(body: unknown, waiting: Waiting): Decision {
	if (!isObject(body) || typeof body.streamId !== 'string' || typeof body.status !== 'string') {
		return refuse(400, 'not_a_callback', 'The body is not the callback of a stream.');
	}
	if (body.streamId === waiting.streamId) {
		return { kind: 'resume', outputs: outputs(body) };
	}
	// hasOwn: the id is the sender's text, and may be the name of something that every object has.
	const earlier = Object.prototype.hasOwnProperty.call(waiting.earlier, body.streamId)
		? waiting.earlier[body.streamId]
		: undefined;
	if (earlier === 'received') {
		return { kind: 'answer', status: 200, body: { ok: true, message: 'This callback was received before.' } };
	}
	if (earlier === 'timed_out') {
		return refuse(409, 'no_longer_waiting', 'This execution no longer waits for this stream.');
	}
	return refuse(404, 'unknown_stream', 'This execution waits for another stream.');
}

/** The node's two outputs for an ended stream: Completed, Not Completed. */
export function outputs(json: IDataObject): INodeExecutionData[][] {
	const item: INodeExecutionData = { json, pairedItem: { item: 0 } };
	return json.status === 'completed' ? [[item], []] : [[], [item]];
}

/**
 * The item of a stream that sent no callback, in the shape of one. `asked` is the body of POST /init-stream.
 * Nobody counted tokens or requests, so `usage.source` is null and the counts are 0.
 */
export function withoutCallback(
	asked: IDataObject,
	status: 'timed_out' | 'not_started',
	error: { code: string; message: string; retryable: boolean },
	streamId: string | null,
	createdAt: string | null,
): IDataObject {
	return {
		userId: asked.userId ?? null,
		chatId: asked.chatId ?? null,
		prompt: asked.prompt ?? null,
		answer: '',
		input_tokens: 0,
		output_tokens: 0,
		streamId,
		status,
		finish_reason: status,
		error,
		model: null,
		requested_model: asked.model ?? null,
		provider: null,
		provider_requests: 0,
		warnings: [],
		usage: {
			input_tokens: 0,
			output_tokens: 0,
			cached_input_tokens: 0,
			reasoning_tokens: 0,
			source: null,
			estimated_by: null,
		},
		timings: {
			created_at: createdAt,
			started_at: null,
			first_token_at: null,
			ended_at: null,
			queued_ms: null,
			time_to_first_token_ms: null,
			duration_ms: null,
		},
		attempt: 0,
		metadata: asked.metadata ?? null,
	};
}

function refuse(status: number, code: string, message: string): Decision {
	return { kind: 'answer', status, body: { ok: false, code, message } };
}

function isObject(value: unknown): value is IDataObject {
	return typeof value === 'object' && value !== null && !Array.isArray(value);
}
