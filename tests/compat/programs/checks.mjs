// What checks.py is, for Node: runs the checks of a program, each with a time limit, and prints a line of JSON for each.
import { createRequire } from 'node:module';
import { randomUUID } from 'node:crypto';
import { isDeepStrictEqual } from 'node:util';

const results = process.stdout.write.bind(process.stdout);
console.log = console.info = console.error;

export const CARAVAN_URL = process.env.CARAVAN_URL;
export const MCP_URL = process.env.MCP_URL;
export const MODEL = 'meta-llama/Llama-3.2-3B-Instruct';
export const EMBEDDING_MODEL = 'embedder';
export const DIMENSIONS = 8;
export const NOBODY = '00000000-0000-4000-8000-000000000000';
const SECONDS = 60;

/** The SDK, from the environment that it is installed in. */
export const sdk = (name) => createRequire(`${process.env.SDK_HOME}/index.js`)(name);

export class Absent extends Error {}

/** The attribute at the end of the path; Absent if the SDK has none. */
export function needs(thing, ...path) {
  for (const name of path) {
    if (thing[name] === undefined) throw new Absent(`the SDK has no ${path.join('.')}`);
    thing = thing[name];
  }
  return thing;
}

export const user = (text) => [{ role: 'user', content: text }];
export const unique = (prefix) => `${prefix}-${randomUUID().slice(0, 13)}`;

/** What the model was asked, where the marker stood in a message: the bodies of its requests, in order. */
export async function modelRequests(marker) {
  const answer = await fetch(`${process.env.MODEL_CONTROL_URL}/requests`);
  const bodies = (await answer.json()).map((record) => record.body);
  return bodies.filter((body) => JSON.stringify(body.messages).includes(marker));
}

export async function waitUntil(condition) {
  for (;;) {
    const value = await condition();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

export function expect(actual, expected) {
  if (!isDeepStrictEqual(actual, expected)) {
    throw new Error(`${JSON.stringify(actual)} is not ${JSON.stringify(expected)}`);
  }
}

export function expectIn(part, whole) {
  if (!whole?.includes(part)) throw new Error(`${JSON.stringify(part)} is not in ${JSON.stringify(whole)}`);
}

/** The error that the action raises; it must be of the class. */
export async function raises(action, kind) {
  let given;
  try {
    given = await action();
  } catch (error) {
    if (error instanceof kind) return error;
    throw error;
  }
  throw new Error(`no ${kind.name}: ${JSON.stringify(given)}`);
}

/** All events of a stream. */
export async function all(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

async function outcome(check) {
  let timer;
  const limit = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no end within ${SECONDS} s`)), SECONDS * 1000);
  });
  try {
    await Promise.race([check(), limit]);
    return { ok: true, error: null };
  } catch (error) {
    if (error instanceof Absent) return { ok: null, error: error.message };
    console.error(error);
    return { ok: false, error: `${error.constructor.name}: ${error.message}` };
  } finally {
    clearTimeout(timer);
  }
}

/** Runs all checks, or those named on the command line; the name of each function is the row of the table. */
export async function main(checks) {
  const chosen = process.argv.slice(2);
  for (const [name, check] of Object.entries(checks)) {
    if (chosen.length && !chosen.includes(name)) continue;
    results(JSON.stringify({ check: name, ...(await outcome(check)) }) + '\n');
  }
  process.exit(0);
}
