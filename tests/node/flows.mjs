// What people do with the official Node client, against a server: node flows.mjs http://HOST/v1
// Needs the npm package openai beside it. Prints one line for each flow; fails at the first that
// does not work.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "m";
const messages = [{ role: "user", content: "Hello!" }];
const city = { type: "object", properties: { city: { enum: ["Rome"] } }, required: ["city"],
  additionalProperties: false };
const tools = [{ type: "function", function: { name: "weather", parameters: city } }];
const greedy = { model, messages, temperature: 0, max_tokens: 8 };

const flows = {
  async "chat"() {
    const answer = await client.chat.completions.create(greedy);
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.choices[0].message.role, "assistant");
    assert.equal(answer.usage.total_tokens,
      answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async "stream"() {
    const whole = await client.chat.completions.create(greedy);
    let text = "", usage = null;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create({ ...greedy, ...options })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },
  async "stop a stream"() {
    const stream = await client.chat.completions.create({ ...greedy, max_tokens: 200, stream: true });
    for await (const _ of stream) break;
    stream.controller.abort();
  },
  async "samples and logprobs"() {
    const answer = await client.chat.completions.create(
      { ...greedy, temperature: 1, n: 2, logprobs: true, top_logprobs: 3 });
    assert.equal(answer.choices.length, 2);
    assert.equal(answer.choices[1].logprobs.content[0].top_logprobs.length, 3);
  },
  async "a form"() {
    const format = { type: "json_schema", json_schema: { name: "city", schema: city } };
    const answer = await client.chat.completions.parse(
      { ...greedy, max_tokens: 60, response_format: format });
    assert.deepEqual(JSON.parse(answer.choices[0].message.content), { city: "Rome" });
  },
  async "tools"() {
    const asked = { ...greedy, max_tokens: 120, tools, tool_choice: "required",
      parallel_tool_calls: false };
    const answer = await client.chat.completions.create(asked);
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.deepEqual(JSON.parse(call.function.arguments), { city: "Rome" });
    const stream = client.chat.completions.stream(asked);
    const streamed = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
    assert.deepEqual(streamed.function, call.function);
    const results = [{ role: "tool", tool_call_id: call.id, content: "sunny" }];
    const next = await client.chat.completions.create(
      { ...greedy, tools, messages: [...messages, answer.choices[0].message, ...results] });
    assert.equal(next.choices.length, 1);
  },
  async "embeddings"() {
    const answer = await client.embeddings.create({ model, input: ["one", "two"] });
    const lengths = answer.data.map((one) => Math.hypot(...one.embedding));
    assert.equal(lengths.length, 2);
    for (const length of lengths) assert.ok(Math.abs(length - 1) < 1e-4, `${length}`);
  },
  async "responses"() {
    const first = await client.responses.create({ model, input: "One", max_output_tokens: 5 });
    assert.ok(["completed", "incomplete"].includes(first.status));
    const next = await client.responses.create(
      { model, input: "Two", max_output_tokens: 5, previous_response_id: first.id });
    const items = [];
    for await (const item of client.responses.inputItems.list(next.id)) items.push(item);
    assert.equal(items.length, 3);
    assert.equal((await client.responses.retrieve(next.id)).output_text, next.output_text);
    await client.responses.delete(next.id);
    await assert.rejects(client.responses.retrieve(next.id), OpenAI.NotFoundError);
  },
  async "responses, streamed"() {
    const stream = client.responses.stream({ model, input: "Hello", max_output_tokens: 6 });
    let text = "";
    stream.on("response.output_text.delta", (event) => { text += event.delta; });
    const final = await stream.finalResponse();
    assert.equal(final.output_text, text);
  },
  async "models"() {
    const names = [];
    for await (const card of client.models.list()) names.push(card.id);
    assert.equal((await client.models.retrieve(names[0])).id, names[0]);
  },
  async "errors"() {
    await assert.rejects(client.chat.completions.create({ model, messages: [] }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "messages");
      return true;
    });
  },
};

for (const [name, flow] of Object.entries(flows)) {
  await flow();
  console.log(`ok ${name}`);
}
console.log(`${Object.keys(flows).length} flows`);
