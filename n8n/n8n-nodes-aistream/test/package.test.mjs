// What an author sees and imports: the node's description, its files, the example workflow, and what must not be in them.

import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import test from 'node:test';
import { fileURLToPath } from 'node:url';

import { credential, dist, node } from './helper.mjs';

const root = new URL('../', import.meta.url);
const read = (path) => readFileSync(new URL(path, root), 'utf8');
const { description } = node;

test('one node with two outputs, one credential, and a webhook for the callback', () => {
	assert.deepEqual([description.name, description.displayName], ['aiStream', 'AiStream']);
	assert.deepEqual(description.outputNames, ['Completed', 'Not Completed']);
	assert.equal(description.outputs.length, 2);
	assert.deepEqual(description.credentials, [{ name: credential.name, required: true }]);
	const [{ httpMethod, restartWebhook, path, responseMode, responseData }] = description.webhooks;
	assert.deepEqual([httpMethod, restartWebhook, path], ['POST', true, 'aistream']);
	// n8n answers when it has taken up the execution, and with no text: that would be an HTML page, hence no delivery.
	assert.deepEqual([responseMode, responseData], ['onReceived', 'noData']);
});

test('every option of POST /init-stream has a parameter', () => {
	const { options } = description.properties.find(({ name }) => name === 'options');

	assert.deepEqual(options.map(({ name }) => name).sort(), [
		'chatId',
		'disconnectGraceSeconds',
		'fallbackModels',
		'format',
		'maxTokens',
		'messages',
		'metadata',
		'onDisconnect',
		'reasoningEffort',
		'start',
		'stop',
		'system',
		'temperature',
		'topP',
		'userId',
	]);
});

test('the model is text in version 1, and from 1.1 on a list to choose from or a name', () => {
	const [text, locator, ...more] = description.properties.filter(({ name }) => name === 'model');

	assert.deepEqual([description.version, more], [[1, 1.1], []]);
	assert.deepEqual([text.type, text.default, text.displayOptions.show['@version']], ['string', '', [1]]);
	assert.deepEqual([locator.type, locator.displayOptions.show['@version']], ['resourceLocator', [{ _cnd: { gte: 1.1 } }]]);
	assert.deepEqual(locator.default, { mode: 'list', value: '' });
	assert.deepEqual(locator.modes.map(({ name }) => name), ['list', 'name']);
	assert.ok(node.methods.listSearch[locator.modes[0].typeOptions.searchListMethod]);
	assert.ok(![text, locator].some(({ required }) => required));
});

test('package.json names files that are built, and no dependency at run time', () => {
	const { n8n, dependencies, peerDependencies, devDependencies } = JSON.parse(read('package.json'));

	for (const path of [...n8n.nodes, ...n8n.credentials]) assert.ok(existsSync(new URL(path, root)), path);
	assert.deepEqual([dependencies, peerDependencies], [undefined, { 'n8n-workflow': '*' }]);
	for (const version of Object.values(devDependencies)) assert.match(version, /^\d+\.\d+\.\d+$/);
});

test('the icons are where the node and the credential look for them', () => {
	const places = [
		[description.icon, 'nodes/AiStream/'],
		[credential.icon, 'credentials/'],
	];
	for (const [icon, folder] of places) {
		for (const file of [icon.light, icon.dark]) {
			assert.ok(existsSync(new URL(folder + file.replace('file:', ''), dist)), file);
		}
	}
});

test('the codex file names the type that n8n gives the node', () => {
	const codex = JSON.parse(read('nodes/AiStream/AiStream.node.json'));

	assert.equal(codex.node, `${JSON.parse(read('package.json')).name}.${description.name}`);
});

test('the example workflow uses this node with parameters that it has', () => {
	const workflow = JSON.parse(read('examples/chat.json'));
	const [ai] = workflow.nodes.filter(({ type }) => type === 'n8n-nodes-aistream.aiStream');
	const named = (properties) => properties.map(({ name }) => name);
	const { options } = description.properties.find(({ name }) => name === 'options');

	assert.equal(ai.typeVersion, Math.max(...description.version));
	for (const name of Object.keys(ai.parameters)) assert.ok(named(description.properties).includes(name), name);
	for (const name of Object.keys(ai.parameters.options)) assert.ok(named(options).includes(name), name);
	const names = workflow.nodes.map(({ name }) => name);
	for (const [from, { main }] of Object.entries(workflow.connections)) {
		for (const target of [from, ...main.flat().map((to) => to.node)]) assert.ok(names.includes(target), target);
	}
});

test('the lock file names no host', () => {
	assert.doesNotMatch(read('package-lock.json'), /"resolved"/);
});

test('the linter’s rules hold without exceptions', () => {
	const sources = ['nodes/AiStream/', 'credentials/'].flatMap((folder) =>
		readdirSync(fileURLToPath(new URL(folder, root)))
			.filter((file) => file.endsWith('.ts'))
			.map((file) => read(folder + file)),
	);

	assert.ok(sources.length > 5);
	for (const source of sources) assert.doesNotMatch(source, /eslint-disable|@ts-ignore|@ts-expect-error|\bany\b(?= *[>;,)=])/);
});
