// What users of the packages `ai` and `@ai-sdk/openai-compatible` do. Arguments: address of the server, key.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [address, key] = process.argv.slice(2);
const server = createOpenAICompatible({
  name: "glm-ms", baseURL: `${address}/v1`, apiKey: key, includeUsage: true, supportsStructuredOutputs: true,
});
const model = server("tiny");
const common = { model, maxRetries: 0 };
const inputSchema = z.object({ city: z.string() });
const tools = {
  get_weather: tool({ description: "weather", inputSchema, execute: async () => "22" }),
  get_time: tool({ description: "time", inputSchema, execute: async () => "22" }),
};

const whole = await generateText({ ...common, prompt: "hello" });
assert.equal(whole.text, "the quick fox 🦊");
assert.equal(whole.finishReason, "stop");
assert.ok(whole.usage.totalTokens > 0);

const stream = streamText({ ...common, prompt: "hello" });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, "the quick fox 🦊");
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

const called = await generateText({ ...common, prompt: "weather", tools, stopWhen: stepCountIs(3) });
assert.deepEqual(called.steps[0].toolCalls.map((call) => [call.toolName, call.input]),
  [["get_weather", { city: "北京" }], ["get_time", { city: "x" }]]);
assert.equal(called.text, "it is 22");

const streamed = streamText({ ...common, prompt: "weather", tools, stopWhen: stepCountIs(3) });
text = "";
for await (const piece of streamed.textStream) text += piece;
assert.equal(text, "it is 22");

const object = await generateText({ ...common, prompt: "hello", output: Output.object({ schema: z.object({ n: z.enum(["a"]) }) }) });
assert.deepEqual(object.output, { n: "a" });

await assert.rejects(generateText({ ...common, model: server("gpt"), prompt: "hello" }),
  (error) => APICallError.isInstance(error) && error.statusCode === 404);
