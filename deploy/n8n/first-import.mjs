// first-import.mjs WORKFLOW FOLDER: writes FOLDER/credentials.json and FOLDER/workflow.json for n8n's import: the two credentials of the
// workflow, from JWT_SECRET and CALLBACK_HEADERS, and the workflow with its nodes pointing to them.
import { readFileSync, writeFileSync } from 'node:fs';

const [, , workflowFile, folder] = process.argv;

const JWT = { id: 'aistreamJwt00001', name: 'aistream: JWT_SECRET', type: 'jwtAuth' };
const HEADER = { id: 'aistreamHeader01', name: 'aistream: CALLBACK_HEADERS', type: 'httpHeaderAuth' };

// CALLBACK_HEADERS is one line `Name: value`, or a JSON object; the Wait node asks for one header, the first.
function firstHeader(text) {
	if (text.startsWith('{')) {
		const [header] = Object.entries(JSON.parse(text));
		if (header) return header;
	}
	const [, name, value] = /^([^:\s{]+):\s*(.+)$/.exec(text) ?? [];
	if (!name) throw new Error('CALLBACK_HEADERS names no header: expected X-Aistream-Key: a-secret');
	return [name, value];
}

const [name, value] = firstHeader((process.env.CALLBACK_HEADERS ?? '').trim());
const secret = (process.env.JWT_SECRET ?? '').trim();
if (!secret) throw new Error('JWT_SECRET is not set');
const algorithm = process.env.JWT_ALGORITHM?.trim() || 'HS256';

const credentials = [
	{ ...JWT, data: { keyType: 'passphrase', secret, algorithm } },
	{ ...HEADER, data: { name, value } },
];
const workflow = JSON.parse(readFileSync(workflowFile, 'utf8'));
for (const node of workflow.nodes) {
	if (node.type === 'n8n-nodes-base.jwt') node.credentials = { [JWT.type]: { id: JWT.id, name: JWT.name } };
	if (node.type === 'n8n-nodes-base.wait') node.credentials = { [HEADER.type]: { id: HEADER.id, name: HEADER.name } };
}

// They hold secrets: for their owner alone.
writeFileSync(`${folder}/credentials.json`, JSON.stringify(credentials), { mode: 0o600 });
writeFileSync(`${folder}/workflow.json`, JSON.stringify(workflow), { mode: 0o600 });
