import type {
	IDataObject,
	IExecuteFunctions,
	IN8nHttpFullResponse,
	INodeExecutionData,
	INodeType,
	INodeTypeDescription,
	IWebhookDescription,
	IWebhookFunctions,
	IWebhookResponseData,
} from 'n8n-workflow';
import { NodeConnectionTypes, NodeOperationError } from 'n8n-workflow';

import { decide, outputs, SUFFIX, withoutCallback } from './callback';
import { type Failure, mistake, refused, unreachable } from './failure';
import { searchModels } from './models';
import { properties } from './properties';
import { baseUrlOf, idempotencyKeyOf, limitOf, requestBody, resumeUrlOf, runIndexOf } from './request';
import { decodeSecret, signatureFault } from './signature';
import { parseWaiting, remember, waitingExpression } from './waiting';

/** Milliseconds that POST /init-stream may take. The service does not ask the model before it answers. */
const INIT_TIMEOUT = 30_000;

/** Where the callback arrives: part of the resume URL. n8n opens it with the wait, so there is nothing to register or remove. */
const webhooks: IWebhookDescription[] = [
	{
		name: 'default',
		httpMethod: 'POST',
		// n8n answers 200 when it has taken up the execution, and not before.
		responseMode: 'onReceived',
		// Without this it answers with the word "firstEntryJson" as an HTML page, which the service takes for n8n's start page.
		responseData: 'noData',
		path: SUFFIX,
		isFullPath: true,
		restartWebhook: true,
	},
];

export class AiStream implements INodeType {
	description: INodeTypeDescription = {
		displayName: 'AiStream',
		name: 'aiStream',
		icon: { light: 'file:../../icons/aistream.svg', dark: 'file:../../icons/aistream.dark.svg' },
		group: ['transform'],
		// Up to 1 the model is a text field; nothing else is different.
		version: [1, 1.1],
		subtitle: '={{ $parameter["model"] }}',
		description: 'Starts an AI answer, gives the browser its stream, and waits for the end',
		defaults: { name: 'AiStream' },
		// An agent's tool must answer at once; this node waits.
		usableAsTool: undefined,
		inputs: [NodeConnectionTypes.Main],
		outputs: [NodeConnectionTypes.Main, NodeConnectionTypes.Main],
		outputNames: ['Completed', 'Not Completed'],
		credentials: [{ name: 'aiStreamApi', required: true }],
		webhooks,
		properties,
	};

	methods = { listSearch: { searchModels } };

	/** Starts the stream and puts the execution to wait. n8n keeps what is returned only until the wait ends. */
	async execute(this: IExecuteFunctions): Promise<INodeExecutionData[][]> {
		const body: IDataObject = {};
		const respond = this.getNodeParameter('respond', 0, true) as boolean;
		const started = await start(this, body);
		if ('error' in started) {
			if (!isLastTry(this)) throw started.error;
			if (respond) await this.sendResponse(started.answer);
			if (!this.continueOnFail()) throw started.error;
			return notStarted(this, body, started);
		}

		const { streamUrl, streamId, expiresAt, limit } = started;
		const now = Date.now();
		const waitTill = now + limit;
		remember(this.getContext('flow'), this.getContext('node'), streamId, waitTill, now);
		passOnTimeout(this, body, streamId, now, limit);
		const answer = { streamUrl, streamId, expiresAt };
		if (respond) {
			await this.sendResponse({
				statusCode: 200,
				// The address is a key to the answer.
				headers: { 'content-type': 'application/json', 'cache-control': 'no-store' },
				body: answer,
			});
		}
		await this.putExecutionToWait(new Date(waitTill));
		// A Webhook node that responds "When Last Node Finishes" answers with this when the wait begins.
		return [[{ json: respond ? answer : { streamId, expiresAt }, pairedItem: { item: 0 } }], []];
	}

	/**
	 * Takes the callback. It must not throw: n8n then ends the wait with an error. A request that is answered here, and
	 * not with `workflowData`, leaves the execution waiting as it was.
	 */
	async webhook(this: IWebhookFunctions): Promise<IWebhookResponseData> {
		try {
			const { callbackSecret } = await this.getCredentials('aiStreamApi');
			if (callbackSecret) {
				const fault = await callbackFault(this, String(callbackSecret));
				if (fault) return reply(this, 401, { ok: false, code: 'signature', message: fault });
			}
			const waiting = parseWaiting(this.evaluateExpression(waitingExpression(this.getNode().name)));
			if (!waiting) throw new NodeOperationError(this.getNode(), 'The execution does not say what it waits for');
			const decision = decide(this.getBodyData(), waiting);
			if (decision.kind === 'resume') return { workflowData: decision.outputs };
			return reply(this, decision.status, decision.body);
		} catch (error) {
			this.logger.error(`AiStream could not look at a callback: ${(error as Error).message}`);
			// The service tries again later.
			return reply(this, 503, { ok: false, code: 'not_verified', message: 'The callback could not be looked at.' });
		}
	}
}

interface Started {
	streamUrl: string;
	streamId: string;
	expiresAt: string | null;
	limit: number;
}

/** Asks the service for a stream. Fills `body` with what was asked, also when it fails later. */
async function start(context: IExecuteFunctions, body: IDataObject): Promise<Started | Failure> {
	let limit: number;
	let baseUrl: string;
	let key: string;
	try {
		checkInput(context);
		Object.assign(body, requestBody(context));
		limit = limitOf(context);
		baseUrl = await baseUrlOf(context);
		body.resumeUrl = resumeUrlOf(context);
		key = idempotencyKeyOf(context, body.resumeUrl as string);
	} catch (error) {
		return mistake(
			error instanceof NodeOperationError
				? error
				: new NodeOperationError(context.getNode(), error as Error, { itemIndex: 0 }),
		);
	}

	let response: IN8nHttpFullResponse;
	try {
		response = (await context.helpers.httpRequestWithAuthentication.call(context, 'aiStreamApi', {
			method: 'POST',
			url: `${baseUrl}/init-stream`,
			headers: { 'Idempotency-Key': key },
			body,
			json: true,
			timeout: INIT_TIMEOUT,
			returnFullResponse: true,
			ignoreHttpStatusErrors: true,
		})) as IN8nHttpFullResponse;
	} catch (error) {
		return unreachable(context.getNode(), error);
	}

	const { statusCode, headers } = response;
	const answer = response.body as Partial<Started>;
	if (statusCode < 200 || statusCode > 299 || !answer?.streamUrl || !answer.streamId) {
		return refused(context.getNode(), statusCode, headers, answer);
	}
	return {
		streamUrl: answer.streamUrl,
		streamId: answer.streamId,
		expiresAt: answer.expiresAt ?? null,
		limit,
	};
}

function checkInput(context: IExecuteFunctions): void {
	if (context.getInputData().length > 1) {
		throw new NodeOperationError(context.getNode(), 'AiStream takes one item at a time', {
			itemIndex: 1,
			description: 'An execution can wait for one stream only. Put a Loop Over Items node with batch size 1 before it.',
		});
	}
}

/**
 * Whether n8n will not try again. It tells no node which try this is, so they are counted; the browser is answered once.
 * The bounds of `maxTries` are n8n's.
 */
function isLastTry(context: IExecuteFunctions): boolean {
	const { retryOnFail, maxTries } = context.getNode();
	if (retryOnFail !== true) return true;
	const own = context.getContext('node');
	const run = `${context.getExecutionId()} ${runIndexOf(context)}`;
	own.tries = own.triesOf === run ? own.tries + 1 : 1;
	own.triesOf = run;
	return own.tries >= Math.min(5, Math.max(2, maxTries || 3));
}

/** The outputs when no stream was started and the author wants the workflow to go on. */
function notStarted(context: IExecuteFunctions, body: IDataObject, failure: Failure): INodeExecutionData[][] {
	const { error, code, retryable } = failure;
	if (context.getNode().onError === 'continueErrorOutput') {
		// n8n moves an item with an error to the node's third output.
		return [[], [{ json: { error: error.message }, error, pairedItem: { item: 0 } }]];
	}
	return outputs(withoutCallback(body, 'not_started', { code, message: error.message, retryable }, null, null));
}

/**
 * Says what n8n shall go on with when no callback comes in time. It then runs the node as if it were deactivated: it
 * passes its input on, all of it with `forwardAllOutputs`. So the input becomes the two outputs of a stream that timed out.
 */
function passOnTimeout(
	context: IExecuteFunctions,
	body: IDataObject,
	streamId: string,
	now: number,
	limit: number,
): void {
	const error = {
		code: 'timed_out',
		message: `No callback came within ${limit / 60_000} minutes.`,
		retryable: true,
	};
	context.setMetadata({ forwardAllOutputs: true });
	context.getExecuteData().data = {
		main: outputs(withoutCallback(body, 'timed_out', error, streamId, new Date(now).toISOString())),
	};
}

/** What is wrong with the callback's signature, or undefined when it is good. */
async function callbackFault(context: IWebhookFunctions, secret: string): Promise<string | undefined> {
	const key = decodeSecret(secret);
	if (!key) throw new NodeOperationError(context.getNode(), 'The Callback Secret must be whsec_ and base64');
	const request = context.getRequestObject();
	if (!request.rawBody) await request.readRawBody();
	const now = Math.floor(Date.now() / 1000);
	return signatureFault(key, context.getHeaderData() as Record<string, unknown>, request.rawBody, now);
}

function reply(context: IWebhookFunctions, status: number, body: IDataObject): IWebhookResponseData {
	context.getResponseObject().status(status).json(body);
	return { noWebhookResponse: true };
}
