// npm llama-stack-client 0.7 and openai: Responses, Conversations, chat completions and embeddings.
import {
  CARAVAN_URL, DIMENSIONS, EMBEDDING_MODEL, MCP_URL, MODEL,
  Absent, all, expect, expectIn, main, modelRequests, needs, raises, sdk, unique, user, waitUntil,
} from './checks.mjs';

const openai = process.env.SDK_PACKAGE === 'openai';
const { default: Client } = sdk(process.env.SDK_PACKAGE);
const client = new Client({ baseURL: openai ? `${CARAVAN_URL}/v1` : CARAVAN_URL, apiKey: 'none', maxRetries: 0 });
const { NotFoundError, BadRequestError, APIError } = Client;

const BOILING_POINT = {
  type: 'function',
  name: 'get_boiling_point',
  description: 'Gives the boiling point',
  strict: true,
  parameters: {
    type: 'object',
    properties: { liquid_name: { type: 'string' } },
    required: ['liquid_name'],
    additionalProperties: false,
  },
};
const MCP_TOOL = { type: 'mcp', server_label: 'tests', server_url: MCP_URL, require_approval: 'never' };
const CALL = 'CALL get_boiling_point {"liquid_name":"polyjuice"}';
const SCHEMA = {
  type: 'object', properties: { answer: { type: 'string' } }, required: ['answer'], additionalProperties: false,
};

const respond = (input, more = {}) => client.responses.create({ model: MODEL, input, ...more });
const streamResponse = (input, more = {}) => all(respond(input, { stream: true, ...more }));
const rolesOf = (response) => JSON.parse(textOf(response)).map((message) => message.role);
const typesOf = (items) => items.map((item) => item.type);

/** Neither SDK of Node's makes `output_text` of a response that came in a stream. */
function textOf(response) {
  const parts = response.output.filter((item) => item.type === 'message').flatMap((item) => item.content);
  return parts.map((part) => part.text).join('');
}

async function ended(id) {
  const found = await client.responses.retrieve(id);
  return ['queued', 'in_progress'].includes(found.status) ? null : found;
}

async function itemsOf(conversation) {
  return all(client.conversations.items.list(conversation, { order: 'asc' }));
}

main({
  async models() {
    const listed = openai ? await all(client.models.list()) : await client.models.list();
    expectIn(MODEL, listed.map((model) => model.id));
    const model = await client.models.retrieve(MODEL);
    expect(openai ? model.id : model.identifier, MODEL);
  },

  async response() {
    const answer = await respond('SAY hello there', { instructions: 'Be kind' });
    expect([answer.status, textOf(answer)], ['completed', 'hello there ']);
    if (openai) expect(answer.output_text, 'hello there ');
  },

  async response_streamed() {
    const events = await streamResponse('SAY hello there world');
    const kinds = typesOf(events);
    expect([kinds[0], kinds.at(-1)], ['response.created', 'response.completed']);
    expect(events.map((event) => event.sequence_number), events.map((_, number) => number));
    const deltas = events.filter((event) => event.type === 'response.output_text.delta').map((event) => event.delta);
    expect(deltas.join(''), 'hello there world ');
    expect([events.at(-1).response.status, textOf(events.at(-1).response)], ['completed', 'hello there world ']);
  },

  async response_stream_helper() {
    const stream = needs(client.responses, 'stream').call(client.responses, { model: MODEL, input: 'SAY hello there' });
    const kinds = typesOf(await all(stream));
    expect([kinds.at(-1), textOf(await stream.finalResponse())], ['response.completed', 'hello there ']);
  },

  async unicode_text() {
    expectIn('日本語 🐫🚐 ', textOf((await streamResponse('UNICODE')).at(-1).response));
  },

  async previous_response_id() {
    const first = await respond('SAY first');
    const second = await respond('HISTORY', { previous_response_id: first.id });
    expect(second.previous_response_id, first.id);
    expect(rolesOf(second), ['user', 'assistant', 'user']);
  },

  async conversation() {
    const { id } = await client.conversations.create({ metadata: { name: 'check' } });
    expect((await client.conversations.retrieve(id)).metadata, { name: 'check' });
    await respond('SAY first', { conversation: id });
    expect(rolesOf(await respond('HISTORY', { conversation: id })), ['user', 'assistant', 'user']);
    expect((await client.conversations.update(id, { metadata: { name: 'new' } })).metadata, { name: 'new' });
    expect((await client.conversations.delete(id)).deleted, true);
    await raises(() => client.conversations.retrieve(id), NotFoundError);
  },

  async conversation_items() {
    const { id } = await client.conversations.create({});
    const note = { type: 'message', role: 'user', content: [{ type: 'input_text', text: 'a note' }] };
    await client.conversations.items.create(id, { items: [note] });
    await respond('SAY first', { conversation: id });
    const items = await itemsOf(id);
    expect(items.map((item) => item.role), ['user', 'user', 'assistant']);
    const got = openai
      ? await client.conversations.items.retrieve(items[0].id, { conversation_id: id })
      : await client.conversations.items.get(id, items[0].id);
    expectIn('a note', JSON.stringify(got.content));
  },

  async conversation_item_delete() {
    const { id } = await client.conversations.create({});
    await respond('SAY first', { conversation: id });
    const [first, second] = await itemsOf(id);
    if (openai) await client.conversations.items.delete(first.id, { conversation_id: id });
    else await client.conversations.items.delete(id, first.id);
    expect((await itemsOf(id)).map((item) => item.id), [second.id]);
  },

  async function_tool() {
    const asked = await respond(CALL, { tools: [BOILING_POINT] });
    const call = asked.output.at(-1);
    expect([call.type, call.name], ['function_call', 'get_boiling_point']);
    expect(JSON.parse(call.arguments), { liquid_name: 'polyjuice' });
    const output = { type: 'function_call_output', call_id: call.call_id, output: '-100' };
    const answer = await respond([output], { previous_response_id: asked.id, tools: [BOILING_POINT] });
    expect(textOf(answer), 'The tool said: -100 ');
  },

  async function_tool_streamed() {
    const events = await streamResponse(CALL, { tools: [BOILING_POINT] });
    const done = events.filter((event) => event.type === 'response.output_item.done').map((event) => event.item);
    expect(done.map((item) => [item.type, item.name]), [['function_call', 'get_boiling_point']]);
    const deltas = events.filter((event) => event.type === 'response.function_call_arguments.delta');
    expect(JSON.parse(deltas.map((event) => event.delta).join('')), { liquid_name: 'polyjuice' });
  },

  async mcp() {
    const { output } = await respond('CALL add {"a":2,"b":3}', { tools: [MCP_TOOL] });
    expect(typesOf(output), ['mcp_list_tools', 'mcp_call', 'message']);
    expect([output[1].name, output[1].output], ['add', '5']);
  },

  async mcp_streamed() {
    const events = await streamResponse('CALL add {"a":2,"b":3}', { tools: [MCP_TOOL] });
    expectIn('response.mcp_call.completed', typesOf(events));
    expect(events.map((event) => event.sequence_number), events.map((_, number) => number));
    expect(typesOf(events.at(-1).response.output), ['mcp_list_tools', 'mcp_call', 'message']);
  },

  async structured_output() {
    const marker = unique('marker');
    const format = { type: 'json_schema', name: 'answer', schema: SCHEMA, strict: true };
    const request = { model: MODEL, input: `${marker}\nSAY {"answer":"yes"}`, text: { format } };
    if (openai) {
      expect((await client.responses.parse(request)).output_parsed, { answer: 'yes' });
    } else {
      expect(JSON.parse(textOf(await client.responses.create(request))), { answer: 'yes' });
    }
    const { type, json_schema } = (await modelRequests(marker))[0].response_format;
    expect([type, json_schema.schema.required], ['json_schema', ['answer']]);
  },

  async metadata() {
    const { id, metadata } = await respond('SAY hello', { metadata: { who: 'check' } });
    expect(metadata, { who: 'check' });
    expect((await client.responses.retrieve(id)).metadata, { who: 'check' });
  },

  async retrieve_list_delete() {
    const { id } = await respond('SAY hello');
    expect(textOf(await client.responses.retrieve(id)), 'hello ');
    if (client.responses.list) {
      expectIn(id, (await client.responses.list({ limit: 100, order: 'desc' })).data.map((row) => row.id));
    }
    await client.responses.delete(id);
    await raises(() => client.responses.retrieve(id), NotFoundError);
  },

  async input_items() {
    const { id } = await respond('SAY hello');
    const { data } = await client.responses.inputItems.list(id);
    expect(data.map((item) => [item.type, item.role]), [['message', 'user']]);
    expectIn('SAY hello', JSON.stringify(data[0].content));
  },

  async background() {
    const queued = await respond('DELAY 300 | SAY hello', { background: true });
    expectIn(queued.status, ['queued', 'in_progress']);
    const done = await waitUntil(() => ended(queued.id));
    expect([done.status, textOf(done)], ['completed', 'hello ']);
  },

  async background_stream_resumed() {
    if (!openai) throw new Absent('the SDK has no stream of a response that exists');
    const seen = [];
    for await (const event of await respond('CHUNKS 6 20', { background: true, stream: true })) {
      seen.push(event);
      if (event.type === 'response.output_text.delta') break;
    }
    const { id } = seen[0].response;
    const join = () =>
      all(client.responses.retrieve(id, { stream: true, starting_after: seen.at(-1).sequence_number }));
    const rest = await join();
    const numbers = [...seen, ...rest].map((event) => event.sequence_number);
    expect(numbers, numbers.map((_, number) => number));
    expect(textOf(rest.at(-1).response), 'w0 w1 w2 w3 w4 w5 ');
    expect(await join(), rest);
  },

  async background_cancel() {
    needs(client.responses, 'cancel');
    const { id } = await respond('PART begun | HANG', { background: true });
    await client.responses.cancel(id);
    expect((await waitUntil(() => ended(id))).status, 'cancelled');
    expect((await client.responses.cancel(id)).status, 'cancelled');
  },

  async unknown_ids() {
    const conversation = `conv_${'0'.repeat(48)}`;
    await raises(() => client.responses.retrieve('resp_00000000-0000-4000-8000-000000000000'), NotFoundError);
    await raises(() => client.conversations.retrieve(conversation), NotFoundError);
    for (const wrong of [{ previous_response_id: 'resp_nothing' }, { conversation }]) {
      expectIn((await raises(() => streamResponse('SAY x', wrong), APIError)).status, [400, 404]);
    }
  },

  async bad_request() {
    const error = await raises(() => respond('SAY x', { temperature: 'hot' }), BadRequestError);
    if (openai) expect([error.param, error.type], ['temperature', 'invalid_request_error']);
  },

  async model_error() {
    for (const status of [400, 500]) {
      const { type, response } = (await streamResponse(`PART one | ERR ${status} no luck`)).at(-1);
      expect([type, response.status], ['response.failed', 'failed']);
      expectIn('no luck', response.error.message);
      expect((await client.responses.retrieve(response.id)).status, 'failed');
    }
  },

  async model_error_without_stream() {
    for (const status of [400, 500]) {
      try {
        const failed = await respond(`ERR ${status} no luck`);
        expect(failed.status, 'failed');
        expectIn('no luck', failed.error.message);
      } catch (error) {
        if (!(error instanceof APIError)) throw error;
        expect(Math.floor(error.status / 100), 4); // an SDK repeats the others by itself
        expectIn('no luck', error.message);
      }
    }
  },

  async chat_completion() {
    const answer = await client.chat.completions.create({ model: MODEL, messages: user('SAY hello there') });
    expect(answer.choices[0].message.content, 'hello there ');
  },

  async chat_completion_streamed() {
    const chunks = await all(
      client.chat.completions.create({
        model: MODEL, messages: user('SAY hello there'), stream: true, stream_options: { include_usage: true },
      }),
    );
    expect(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join(''), 'hello there ');
    expect(typeof chunks.at(-1).usage?.total_tokens, 'number');
  },

  async embeddings() {
    const answer = await client.embeddings.create({ model: EMBEDDING_MODEL, input: ['camels', 'dates'] });
    expect(answer.data.map((row) => row.embedding.length), [DIMENSIONS, DIMENSIONS]);
  },
});
