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
