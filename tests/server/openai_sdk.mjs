// The openai package for JavaScript. Prints a JSON object for each test.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.KEY, maxRetries: 0, timeout: 60000 });
const model = "tiny-chat";
const messages = [{ role: "user", content: "What is 12 plus 30?" }];

const tests = {
  async chat() {
    const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
    assert.match(answer.choices[0].message.content, /42/);
    assert.equal(answer.choices[0].finish_reason, "stop");
  },
  async stream() {
    let text = "", usage = null;
    const options = { model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create(options)) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.match(text, /42/);
    assert.ok(usage.completion_tokens > 0);
  },
  async "stream helper"() {
    const runner = client.chat.completions.stream({ model, messages, temperature: 0 });
    assert.match(await runner.finalContent(), /42/);
  },
  async responses() {
    const answer = await client.responses.create({ model, input: "What is 12 plus 30?", temperature: 0 });
    assert.match(answer.output_text, /42/);
    const kinds = [];
    for await (const event of await client.responses.create({ model, input: "Hello", stream: true })) kinds.push(event.type);
    assert.equal(kinds[0], "response.created");
    assert.equal(kinds.at(-1), "response.completed");
  },
  async tools() {
    const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
    const tools = [{ type: "function", function: { name: "get_weather", description: "Get the weather of a city.", parameters } }];
    const turns = [{ role: "user", content: "What is the weather in Oslo?" }];
    const first = await client.chat.completions.create({ model, messages: turns, tools, temperature: 0 });
    assert.equal(first.choices[0].finish_reason, "tool_calls");
    const [call] = first.choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), { city: "Oslo" });
    turns.push(first.choices[0].message);
    turns.push({ role: "tool", tool_call_id: call.id, content: '{"temperature": 7, "sky": "rainy"}' });
    const second = await client.chat.completions.create({ model, messages: turns, tools, temperature: 0 });
    assert.equal(second.choices[0].finish_reason, "stop");
    assert.match(second.choices[0].message.content, /rainy/);
  },
  async "structured output"() {
    // Of bounded length, so that every answer is whole.
    const properties = { name: { type: "string", maxLength: 12 }, age: { type: "integer", minimum: 0, maximum: 150 } };
    const schema = { type: "object", properties, required: ["name", "age"], additionalProperties: false };
    const question = [{ role: "user", content: "Tom is 7 years old. Give name and age as JSON." }];
    const response_format = { type: "json_schema", json_schema: { name: "person", schema, strict: true } };
    for (const seed of [1, 2, 3]) {
      const answer = await client.chat.completions.create({ model, messages: question, seed, temperature: 1, max_tokens: 200, response_format });
      assert.equal(answer.choices[0].finish_reason, "stop");
      const person = JSON.parse(answer.choices[0].message.content);
      assert.deepEqual(Object.keys(person), ["name", "age"]);
      assert.ok(Number.isInteger(person.age));
    }
  },
  async embeddings() {
    const encoders = new OpenAI({ baseURL: process.env.ENCODERS_URL, apiKey: process.env.KEY, maxRetries: 0 });
    // The package asks for base64 unless told otherwise.
    const vectors = await encoders.embeddings.create({ model: "bert", input: ["ab", "b a"] });
    const numbers = await encoders.embeddings.create({ model: "bert", input: "ab", encoding_format: "float" });
    assert.equal(vectors.data.length, 2);
    const [one, other] = [vectors.data[0].embedding, numbers.data[0].embedding];
    assert.ok(one.length > 1 && one.length === other.length);
    assert.ok(one.every((number, index) => Math.abs(number - other[index]) < 1e-5));
  },
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert.ok(ids.includes(model));
  },
  async errors() {
    const wrong = { model, messages, temperature: -1 };
    await assert.rejects(client.chat.completions.create(wrong), error => error instanceof OpenAI.BadRequestError && /temperature/.test(error.message));
    const stranger = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), error => error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key");
  },
  async cancel() {
    const story = [{ role: "user", content: "Tell me a long story." }];
    const stream = await client.chat.completions.create({ model, messages: story, stream: true, max_tokens: 6000, ignore_eos: true });
    let count = 0;
    for await (const _ of stream) if (++count === 5) break;
    assert.equal(count, 5);
    await tests.chat();
  },
  async concurrency() {
    const ask = index => client.chat.completions.create({ model, temperature: 0, messages: [{ role: "user", content: `What is ${index} plus 30?` }] });
    const answers = await Promise.all([...Array(16).keys()].map(ask));
    const right = answers.filter((answer, index) => answer.choices[0].message.content.includes(String(index + 30)));
    assert.ok(right.length >= 13, `${right.length} of 16 are right`);
  },
};

for (const [name, test] of Object.entries(tests)) {
  const began = performance.now();
  let problem;
  try {
    await test();
  } catch (error) {
    problem = error.stack ?? String(error);
  }
  console.log(JSON.stringify({ name, seconds: (performance.now() - began) / 1000, problem }));
}
