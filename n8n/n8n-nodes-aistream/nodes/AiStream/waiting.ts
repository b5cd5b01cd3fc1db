import type { IContextObject } from 'n8n-workflow';

/**
 * Which stream an execution waits for, and what became of those it waited for before.
 *
 * n8n gives all waits of an execution one resume URL. So a duplicate of an earlier callback arrives at whatever waits now:
 * another AiStream node, or the same one in the next round of a loop. Only the stream's id tells them apart.
 *
 * `webhook()` can write nothing, and of all that `execute()` wrote it can read one thing: the node's own context, by an
 * expression. So `execute()` keeps the books in the execution's context and leaves a copy in the node's.
 */

/** How the wait for an earlier stream ended: its callback was accepted, or its time was up. */
type Ended = 'received' | 'timed_out';

export interface Waiting {
	streamId: string;
	earlier: Record<string, Ended>;
}

interface Wait {
	streamId: string;
	waitTill: number;
	ended?: Ended;
}

const KEY = 'aistream';

/** Waits that are remembered. A loop may have any number of rounds, a sender repeats only its latest callbacks. */
const REMEMBERED = 100;

/** Writes down that the execution now waits for `streamId`, until `waitTill` (milliseconds, as `now`). */
export function remember(
	flow: IContextObject,
	own: IContextObject,
	streamId: string,
	waitTill: number,
	now: number,
): void {
	// The execution went on from its last wait before that wait's time was up: a callback was accepted.
	const before = ((flow[KEY] ?? []) as Wait[]).map((wait) => ({
		...wait,
		ended: wait.ended ?? (now < wait.waitTill ? ('received' as const) : ('timed_out' as const)),
	}));
	const waits: Wait[] = [...before, { streamId, waitTill }].slice(-REMEMBERED);
	flow[KEY] = waits;
	const waiting: Waiting = {
		streamId,
		earlier: Object.fromEntries(before.map((wait) => [wait.streamId, wait.ended])),
	};
	// As text: n8n may evaluate expressions in another isolate, which gets no objects of ours.
	own[KEY] = JSON.stringify(waiting);
}

/** The expression that reads what `remember` wrote to the context of the node of that name. */
export function waitingExpression(nodeName: string): string {
	// Every other character as \uXXXX: a name may have quotes, or the braces that end an expression.
	const name = nodeName.replace(
		/[^A-Za-z0-9 ]/g,
		(character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`,
	);
	return `{{ $node["${name}"].context["${KEY}"] }}`;
}

/** What `waitingExpression` gave, or undefined when it is nothing that `remember` wrote. */
export function parseWaiting(text: unknown): Waiting | undefined {
	if (typeof text !== 'string' || !text.startsWith('{')) return undefined;
	return JSON.parse(text) as Waiting;
}
