// OpenAI's package for JavaScript: `node openai_client.mjs ADDRESS` asserts answers, streams, tools, schemas and errors.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "tiny:int4";
const messages = [{ role: "user", content: "Tell me about the dog." }];
const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "any", maxRetries: 0 });
const Point = z.object({ x: z.number().int().min(0).max(9), name: z.string().max(5) });

const models = await client.models.list();
assert.equal(models.data[0].id, "tiny");

const asked = { model, messages, max_tokens: 24, ignore_eos: true };
const whole = await client.chat.completions.create(asked);
assert.equal(whole.model, model);
assert.equal(whole.usage.completion_tokens, 24);

let text = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, 24);

const parsed = await client.chat.completions.parse({
  model,
  messages,
  max_tokens: 100,
  response_format: zodResponseFormat(Point, "point"),
});
assert.equal(typeof parsed.choices[0].message.parsed.x, "number");

const runner = client.chat.completions.stream({
  model,
  messages,
  tools: [zodFunction({ name: "add", parameters: z.object({ x: z.number().int().min(0).max(9) }) })],
  tool_choice: "required",
  parallel_tool_calls: false,
});
const called = await runner.finalChatCompletion();
assert.equal(called.choices[0].message.tool_calls[0].function.name, "add");

const controller = new AbortController();
const stream = await client.chat.completions.create(
  { model, messages, max_tokens: 400, ignore_eos: true, stream: true },
  { signal: controller.signal },
);
for await (const _ of stream) {
  controller.abort();
  break;
}
let writing = 1;
for (let turn = 0; turn < 100 && writing > 0; turn++) {
  writing = (await (await fetch(`${process.argv[2]}/load`)).json()).server_load;
  await new Promise((done) => setTimeout(done, 50));
}
assert.equal(writing, 0);

await assert.rejects(client.completions.create({ model: "other", prompt: "x" }), OpenAI.NotFoundError);
await assert.rejects(client.completions.create({ model, prompt: "x", temperature: -1 }), OpenAI.BadRequestError);
