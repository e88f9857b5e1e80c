// npm llama-stack-client 0.2 and 0.3.0: agents under `client.agents`.
import {
  CARAVAN_URL, DIMENSIONS, EMBEDDING_MODEL, MCP_URL, MODEL, NOBODY,
  all, expect, expectIn, main, modelRequests, needs, raises, sdk, unique, user,
} from './checks.mjs';

const { default: LlamaStackClient } = sdk('llama-stack-client');
const client = new LlamaStackClient({ baseURL: CARAVAN_URL, maxRetries: 0 });
const { NotFoundError } = LlamaStackClient;

const BOILING_POINT = {
  name: 'get_boiling_point',
  description: 'Gives the boiling point',
  parameters: [{ name: 'liquid_name', parameter_type: 'string', description: 'the liquid', required: true }],
};
const CALL = 'CALL get_boiling_point {"liquid_name":"polyjuice"}';

/** The ids of a new agent and of a session of it, in the order that the calls take them. */
async function newIds(config = {}) {
  const { agent_id } = await client.agents.create({
    agent_config: { model: MODEL, instructions: 'You are helpful', ...config },
  });
  const { session_id } = await client.agents.session.create(agent_id, { session_name: 'check' });
  return [agent_id, session_id];
}

const streamTurn = (ids, script, more = {}) =>
  all(client.agents.turn.create(...ids, { messages: user(script), stream: true, ...more }));
const runTurn = (ids, script, more = {}) =>
  client.agents.turn.create(...ids, { messages: user(script), ...more });
/** Both forms are in the SDK's types. */
const argumentsOf = (call) =>
  typeof call.arguments === 'string' ? JSON.parse(call.arguments) : call.arguments;
const kindsOf = (steps) => steps.map((step) => step.step_type);

async function newToolgroup() {
  const toolgroup_id = unique('mcp::group');
  await client.toolgroups.register({
    toolgroup_id, provider_id: 'model-context-protocol', mcp_endpoint: { uri: MCP_URL },
  });
  return toolgroup_id;
}

async function newVectorDb() {
  const registered = await client.vectorDBs.register({
    vector_db_id: unique('db'), embedding_model: EMBEDDING_MODEL, embedding_dimension: DIMENSIONS, provider_id: 'pgvector',
  });
  return registered.identifier;
}

async function insertDocuments(vector_db_id) {
  const document = { document_id: 'd1', content: 'Camels drink water.', mime_type: 'text/plain', metadata: {} };
  await client.toolRuntime.ragTool.insert({ documents: [document], vector_db_id, chunk_size_in_tokens: 64 });
}

main({
  async models() {
    const listed = await client.models.list();
    const kinds = Object.fromEntries(listed.map((model) => [model.identifier, model.model_type]));
    expect([kinds[MODEL], kinds[EMBEDDING_MODEL]], ['llm', 'embedding']);
    expect((await client.models.retrieve(MODEL)).identifier, MODEL);
  },

  async tools() {
    const toolgroup_id = await newToolgroup();
    expectIn(toolgroup_id, (await client.toolgroups.list()).map((group) => group.identifier));
    const listed = await client.tools.list({ toolgroup_id });
    const add = listed.find((tool) => tool.identifier === 'add');
    expect(add.toolgroup_id, toolgroup_id);
    expect(add.parameters.map(({ name, parameter_type }) => [name, parameter_type]), [['a', 'integer'], ['b', 'integer']]);
    const result = await client.toolRuntime.invokeTool({ tool_name: 'add', kwargs: { a: 2, b: 3 } });
    expectIn('5', JSON.stringify(result.content));
    // Not the one with the tools: a call by name may come to be that of another program's group, while they run at once.
    await client.toolgroups.unregister(await newToolgroup());
  },

  async agent_create_list_delete() {
    const [agent_id] = await newIds();
    if (client.agents.retrieve) {
      expect((await client.agents.retrieve(agent_id)).agent_config.model, MODEL);
      expectIn(agent_id, (await client.agents.list({ limit: 1000 })).data.map((row) => row.agent_id));
    }
    await client.agents.delete(agent_id);
    await raises(() => client.agents.session.create(agent_id, { session_name: 'late' }), NotFoundError);
  },

  async session_create_list_delete() {
    const ids = await newIds();
    expect((await client.agents.session.retrieve(...ids)).session_id, ids[1]);
    if (client.agents.session.list) {
      expect((await client.agents.session.list(ids[0])).data.map((row) => row.session_id), [ids[1]]);
    }
    await client.agents.session.delete(...ids);
    await raises(() => client.agents.session.retrieve(...ids), NotFoundError);
  },

  async streamed_turn() {
    const payloads = (await streamTurn(await newIds(), 'SAY hello there world')).map((chunk) => chunk.event.payload);
    const kinds = payloads.map((payload) => payload.event_type);
    expect([kinds[0], ...kinds.slice(-2)], ['step_start', 'step_complete', 'turn_complete']);
    const deltas = payloads.filter((payload) => payload.event_type === 'step_progress');
    expect(deltas.map((payload) => payload.delta.text).join(''), 'hello there world ');
    expect(payloads.at(-1).turn.output_message.content, 'hello there world ');
  },

  async unicode_text() {
    const chunks = await streamTurn(await newIds(), 'UNICODE');
    expectIn('日本語 🐫🚐 ', chunks.at(-1).event.payload.turn.output_message.content);
  },

  async non_streaming() {
    const { output_message } = await runTurn(await newIds(), 'SAY all at once');
    expect([output_message.content, output_message.stop_reason], ['all at once ', 'end_of_turn']);
  },

  async two_turn_history() {
    const ids = await newIds();
    await streamTurn(ids, 'SAY first');
    const chunks = await streamTurn(ids, 'HISTORY');
    const history = JSON.parse(chunks.at(-1).event.payload.turn.output_message.content);
    expect(history.map((message) => message.role), ['system', 'user', 'assistant', 'user']);
    expect(history[2].content, 'first ');
  },

  async client_tool_resume() {
    const ids = await newIds({ client_tools: [BOILING_POINT] });
    const marker = unique('marker');
    const { event_type, turn } = (await streamTurn(ids, `${marker}\n${CALL}`)).at(-1).event.payload;
    expect(event_type, 'turn_awaiting_input');
    const [call] = turn.output_message.tool_calls;
    expect([call.tool_name, argumentsOf(call)], ['get_boiling_point', { liquid_name: 'polyjuice' }]);
    const tool_responses = [{ call_id: call.call_id, tool_name: call.tool_name, content: '-100' }];
    const chunks = await all(client.agents.turn.resume(...ids, turn.turn_id, { tool_responses, stream: true }));
    const resumed = chunks.at(-1).event.payload.turn;
    expect(resumed.output_message.content, 'The tool said: -100 ');
    expect(kindsOf(resumed.steps), ['inference', 'tool_execution', 'inference']);
    const [asked] = await modelRequests(marker);
    expect(asked.tools[0].function.parameters.required, ['liquid_name']);
  },

  async tool_calls_in_steps() {
    const ids = await newIds({ client_tools: [BOILING_POINT] });
    const payloads = (await streamTurn(ids, CALL)).map((chunk) => chunk.event.payload);
    const deltas = payloads.filter((payload) => payload.delta?.type === 'tool_call').map((payload) => payload.delta);
    expect(deltas.at(-1).parse_status, 'succeeded');
    expect(argumentsOf(deltas.at(-1).tool_call), { liquid_name: 'polyjuice' });
    const turn = await client.agents.turn.retrieve(...ids, payloads.at(-1).turn.turn_id);
    expect(argumentsOf(turn.steps[0].model_response.tool_calls[0]), { liquid_name: 'polyjuice' });
  },

  async max_infer_iters() {
    const ids = await newIds({ toolgroups: [await newToolgroup()], max_infer_iters: 2 });
    const script = 'CALL add {"a":1,"b":1} | CALL add {"a":2,"b":2} | CALL add {"a":3,"b":3} | SAY never';
    const { turn } = (await streamTurn(ids, script)).at(-1).event.payload;
    expect(kindsOf(turn.steps).filter((kind) => kind === 'inference').length, 2);
  },

  async max_tokens_zero() {
    const marker = unique('marker');
    const ids = await newIds({ sampling_params: { strategy: { type: 'greedy' }, max_tokens: 0 } });
    const { turn } = (await streamTurn(ids, `${marker}\nSAY no limit`)).at(-1).event.payload;
    expect(turn.output_message.content, 'no limit ');
    const [asked] = await modelRequests(marker);
    expect([asked.max_tokens ?? null, asked.max_completion_tokens ?? null], [null, null]);
  },

  async mcp() {
    const ids = await newIds({ toolgroups: [await newToolgroup()] });
    const { turn } = (await streamTurn(ids, 'CALL add {"a":2,"b":3}')).at(-1).event.payload;
    expect(kindsOf(turn.steps), ['inference', 'tool_execution', 'inference']);
    expectIn('5', JSON.stringify(turn.steps[1].tool_responses[0].content));
    expectIn('5', turn.output_message.content);
  },

  async shields() {
    const shield_id = unique('guard');
    await client.shields.register({ shield_id, provider_id: 'llama-guard', provider_shield_id: MODEL });
    const ids = await newIds({ input_shields: [shield_id], output_shields: [shield_id] });
    const { turn } = (await streamTurn(ids, 'SAY hello\nGUARD Assistant UNSAFE S1')).at(-1).event.payload;
    expect(kindsOf(turn.steps), ['shield_call', 'inference', 'shield_call']);
    const { violation } = turn.steps[2];
    expect([violation.violation_level, violation.metadata], ['error', { violation_type: 'S1' }]);
    expect(turn.output_message.content, violation.user_message);
    const messages = [{ role: 'user', content: 'GUARD User UNSAFE S1' }];
    expect((await client.safety.runShield({ shield_id, messages, params: {} })).violation, violation);
  },

  async documents() {
    const documents = [{ content: '\nSAY from the document', mime_type: 'text/plain' }];
    const chunks = await streamTurn(await newIds(), 'Do as the document says.', { documents });
    expect(chunks.at(-1).event.payload.turn.output_message.content, 'from the document ');
  },

  async response_format() {
    const marker = unique('marker');
    const json_schema = { type: 'object', properties: { answer: { type: 'string' } }, required: ['answer'] };
    const ids = await newIds({ response_format: { type: 'json_schema', json_schema } });
    const chunks = await streamTurn(ids, `${marker}\nSAY {"answer":"yes"}`);
    expect(JSON.parse(chunks.at(-1).event.payload.turn.output_message.content), { answer: 'yes' });
    const { type, json_schema: asked } = (await modelRequests(marker))[0].response_format;
    expect([type, asked.schema.required], ['json_schema', ['answer']]);
  },

  async vector_db_register_list_delete() {
    const id = await newVectorDb();
    expect((await client.vectorDBs.retrieve(id)).embedding_dimension, DIMENSIONS);
    const listed = async () => (await client.vectorDBs.list()).map((row) => row.identifier);
    expectIn(id, await listed());
    await client.vectorDBs.unregister(id);
    expect((await listed()).includes(id), false);
  },

  async vector_db_insert_and_query() {
    const vector_db_id = await newVectorDb();
    const chunks = [{ content: 'dates are sweet', mime_type: 'text/plain', metadata: { document_id: 'd2' } }];
    await client.vectorIo.insert({ vector_db_id, chunks });
    const found = await client.vectorIo.query({ vector_db_id, query: 'sweet dates' });
    expect(found.chunks[0].content, 'dates are sweet');
  },

  async rag_tool_insert_and_query() {
    const id = await newVectorDb();
    await insertDocuments(id);
    const found = await client.toolRuntime.ragTool.query({ content: 'camels drink', vector_db_ids: [id] });
    expectIn('Camels drink water.', JSON.stringify(found.content));
  },

  async rag_in_a_turn() {
    const id = await newVectorDb();
    await insertDocuments(id);
    const toolgroups = [{ name: 'builtin::rag/knowledge_search', args: { vector_db_ids: [id] } }];
    const chunks = await streamTurn(await newIds({ toolgroups }), 'CALL knowledge_search {"query":"camels drink"}');
    expectIn('Camels drink water.', chunks.at(-1).event.payload.turn.output_message.content);
  },

  async retrieve_turn_and_step() {
    const ids = await newIds({ toolgroups: [await newToolgroup()] });
    const turns = [];
    for (const script of ['CALL add {"a":2,"b":3}', 'SAY second']) {
      turns.push((await streamTurn(ids, script)).at(-1).event.payload.turn);
    }
    const [first, second] = turns;
    expect((await client.agents.turn.retrieve(...ids, first.turn_id)).turn_id, first.turn_id);
    const { step } = await client.agents.steps.retrieve(...ids, first.turn_id, first.steps[1].step_id);
    expect([step.step_type, step.step_id], ['tool_execution', first.steps[1].step_id]);
    const turnIds = async (query) =>
      (await client.agents.session.retrieve(...ids, query)).turns.map((turn) => turn.turn_id);
    expect(await turnIds({}), [first.turn_id, second.turn_id]);
    expect(await turnIds({ turn_ids: [second.turn_id] }), [second.turn_id]);
  },

  async unknown_ids() {
    const [agent, session] = await newIds();
    for (const wrong of [[agent, NOBODY], [NOBODY, session], [agent, 'nope']]) {
      await raises(() => streamTurn(wrong, 'SAY x'), NotFoundError);
    }
    await raises(() => client.agents.turn.retrieve(agent, session, NOBODY), NotFoundError);
  },

  async model_error() {
    for (const status of [400, 500]) {
      const ids = await newIds();
      const last = (await streamTurn(ids, `PART one | ERR ${status} no luck`)).at(-1);
      expectIn('no luck', last.error.message);
      const next = await streamTurn(ids, 'SAY still here');
      expect(next.at(-1).event.payload.turn.output_message.content, 'still here ');
    }
  },

  async chat_completion() {
    const { completion_message } = await client.inference.chatCompletion({
      model_id: MODEL, messages: user('SAY hello there'),
    });
    expect([completion_message.content, completion_message.stop_reason], ['hello there ', 'end_of_turn']);
  },

  async chat_completion_streamed() {
    const chunks = await all(
      client.inference.chatCompletion({ model_id: MODEL, messages: user('SAY hello there'), stream: true }),
    );
    expect([chunks[0].event.event_type, chunks.at(-1).event.event_type], ['start', 'complete']);
    expect(chunks.map((chunk) => chunk.event.delta.text).join(''), 'hello there ');
  },

  async openai_chat_completion() {
    const completions = needs(client, 'chat', 'completions');
    const answer = await completions.create({ model: MODEL, messages: user('SAY hello') });
    expect(answer.choices[0].message.content, 'hello ');
    const chunks = await all(completions.create({ model: MODEL, messages: user('SAY hello there'), stream: true }));
    expect(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join(''), 'hello there ');
  },

  async embeddings() {
    if (client.embeddings) {
      const answer = await client.embeddings.create({ model: EMBEDDING_MODEL, input: ['camels', 'dates'] });
      expect(answer.data.map((row) => row.embedding.length), [DIMENSIONS, DIMENSIONS]);
    } else {
      const answer = await client.inference.embeddings({ model_id: EMBEDDING_MODEL, contents: ['camels', 'dates'] });
      expect(answer.embeddings.map((vector) => vector.length), [DIMENSIONS, DIMENSIONS]);
    }
  },
});
