import type { INodeProperties } from 'n8n-workflow';

/** Minutes. n8n looks for waits whose time is up once a minute, so a shorter limit is none. */
export const MIN_LIMIT = 2;

export const properties: INodeProperties[] = [
	{
		displayName:
			'Set <b>Respond</b> of the Webhook node to <b>When Last Node Finishes</b>, and the browser gets the stream as the answer to its request. To answer failures as well, set it to <b>Using Respond to Webhook Node</b> and put such a node, deactivated, after this one.',
		name: 'wiringNotice',
		type: 'notice',
		default: '',
	},
	{
		displayName: 'Prompt',
		name: 'prompt',
		type: 'string',
		typeOptions: { rows: 4 },
		default: '={{ $json.body.prompt }}',
		required: true,
		description: "The user's last turn",
	},
	{
		displayName: 'Model',
		name: 'model',
		type: 'string',
		default: '',
		placeholder: 'e.g. gpt-4o-mini',
		description: "The model that answers, or an alias of the service. Leave empty for the service's default.",
		displayOptions: { show: { '@version': [1] } },
	},
	{
		displayName: 'Model',
		name: 'model',
		type: 'resourceLocator',
		default: { mode: 'list', value: '' },
		description: "The model that answers, or an alias of the service. Leave empty for the service's default.",
		displayOptions: { show: { '@version': [{ _cnd: { gte: 1.1 } }] } },
		modes: [
			{
				displayName: 'From List',
				name: 'list',
				type: 'list',
				placeholder: "The service's default",
				typeOptions: { searchListMethod: 'searchModels', searchable: true },
			},
			{
				displayName: 'By Name',
				name: 'name',
				type: 'string',
				placeholder: 'e.g. gpt-4o-mini',
			},
		],
	},
	{
		displayName: 'Answer the Browser',
		name: 'respond',
		type: 'boolean',
		default: true,
		description:
			'Whether the request that started the workflow is answered with streamUrl, streamId and expiresAt',
	},
	{
		displayName: 'Limit Wait (Minutes)',
		name: 'limitMinutes',
		type: 'number',
		typeOptions: { minValue: MIN_LIMIT },
		default: 15,
		description:
			'How long to wait for the end of the answer. After it the workflow goes on with the status timed_out. At least 2: n8n looks once a minute.',
	},
	{
		displayName: 'Options',
		name: 'options',
		type: 'collection',
		placeholder: 'Add option',
		default: {},
		options: [
			{
				displayName: 'Chat ID',
				name: 'chatId',
				type: 'string',
				default: '',
				description: 'Comes back with the answer. A number stays a number.',
			},
			{
				displayName: 'Disconnect Grace (Seconds)',
				name: 'disconnectGraceSeconds',
				type: 'number',
				typeOptions: { minValue: 1, maxValue: 3600 },
				default: 30,
				description: 'How long viewers may be away before On Disconnect counts them as gone',
			},
			{
				displayName: 'Fallback Models',
				name: 'fallbackModels',
				type: 'string',
				typeOptions: { multipleValues: true, multipleValueButtonText: 'Add Model' },
				default: [],
				placeholder: 'e.g. claude-sonnet-4-5',
				description:
					'Up to five models that are asked in this order when the model has failed before its first token',
			},
			{
				displayName: 'Format',
				name: 'format',
				type: 'options',
				options: [
					{
						name: 'Text',
						value: 'text',
						description: "The answer's pieces, then [DONE]",
					},
					{
						name: 'JSON',
						value: 'json',
						description: 'Events with a type: exact, with reasoning and token counts',
					},
				],
				default: 'text',
				description: 'What the browser gets from the stream',
			},
			{
				displayName: 'Max Tokens',
				name: 'maxTokens',
				type: 'number',
				typeOptions: { minValue: 1, maxValue: 1000000 },
				default: 4096,
				description:
					"The most tokens that the answer may have. Without this option it is the alias's number, or 4096.",
			},
			{
				displayName: 'Messages',
				name: 'messages',
				type: 'json',
				default: '[]',
				placeholder: '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]',
				description:
					'The earlier turns: a list of objects with role (user, assistant or system) and content',
			},
			{
				displayName: 'Metadata',
				name: 'metadata',
				type: 'json',
				default: '{}',
				description: 'An object that comes back with the answer',
			},
			{
				displayName: 'On Disconnect',
				name: 'onDisconnect',
				type: 'options',
				options: [
					{
						name: 'Continue',
						value: 'continue',
						description: 'The answer goes on without viewers',
					},
					{
						name: 'Cancel',
						value: 'cancel',
						description: 'The answer is stopped when the last viewer has left',
					},
				],
				default: 'continue',
				description: 'What happens when nobody watches any more',
			},
			{
				displayName: 'Reasoning Effort',
				name: 'reasoningEffort',
				type: 'options',
				options: [
					{ name: 'Extra High', value: 'xhigh' },
					{ name: 'High', value: 'high' },
					{ name: 'Low', value: 'low' },
					{ name: 'Max', value: 'max' },
					{ name: 'Medium', value: 'medium' },
					{ name: 'Minimal', value: 'minimal' },
					{ name: 'None', value: 'none' },
				],
				default: 'medium',
				description: 'How hard the model is to think before it answers. Not every model has it.',
			},
			{
				displayName: 'Start',
				name: 'start',
				type: 'options',
				options: [
					{
						name: 'On Connect',
						value: 'connect',
						description: 'The first viewer starts the answer',
					},
					{
						name: 'Immediately',
						value: 'immediate',
						description: 'It starts at once, also when nobody ever watches',
					},
				],
				default: 'connect',
				description: 'What starts the answer',
			},
			{
				displayName: 'Stop Sequences',
				name: 'stop',
				type: 'string',
				typeOptions: { multipleValues: true, multipleValueButtonText: 'Add Sequence' },
				default: [],
				description: 'Up to four texts that end the answer',
			},
			{
				displayName: 'System',
				name: 'system',
				type: 'string',
				typeOptions: { rows: 3 },
				default: '',
				description: 'Instructions for the model',
			},
			{
				displayName: 'Temperature',
				name: 'temperature',
				type: 'number',
				typeOptions: { minValue: 0, maxValue: 2, numberPrecision: 2 },
				default: 1,
				description: 'How freely the model chooses its words. Not every model has it.',
			},
			{
				displayName: 'Top P',
				name: 'topP',
				type: 'number',
				typeOptions: { minValue: 0, maxValue: 1, numberPrecision: 2 },
				default: 1,
				description: 'The share of likely words that the model chooses from. Not every model has it.',
			},
			{
				displayName: 'User ID',
				name: 'userId',
				type: 'string',
				default: '',
				description: 'Comes back with the answer. A number stays a number.',
			},
		],
	},
];
