import type { IN8nHttpFullResponse, ILoadOptionsFunctions, INodeListSearchResult } from 'n8n-workflow';

import { refused, unreachable } from './failure';
import { baseUrlOf } from './request';

/** Milliseconds that GET /models may take. The service gives its own servers 5 seconds for their lists. */
const TIMEOUT = 15_000;

/** What the field Model offers: the names that GET /models lists, those that have `filter` in them. */
export async function searchModels(
	this: ILoadOptionsFunctions,
	filter?: string,
): Promise<INodeListSearchResult> {
	const url = `${await baseUrlOf(this)}/models`;
	let response: IN8nHttpFullResponse;
	try {
		response = (await this.helpers.httpRequestWithAuthentication.call(this, 'aiStreamApi', {
			method: 'GET',
			url,
			json: true,
			timeout: TIMEOUT,
			returnFullResponse: true,
			ignoreHttpStatusErrors: true,
		})) as IN8nHttpFullResponse;
	} catch (error) {
		throw unreachable(this.getNode(), error).error;
	}

	const { statusCode, headers } = response;
	const answer = response.body as { models?: Array<{ id: string }> };
	if (!Array.isArray(answer?.models)) {
		throw refused(this.getNode(), statusCode, headers, answer).error;
	}
	const wanted = (filter ?? '').trim().toLowerCase();
	const found = answer.models.map(({ id }) => id).filter((id) => id.toLowerCase().includes(wanted));
	return { results: found.sort().map((id) => ({ name: id, value: id })) };
}
