// Streams a completion to stdout:
//
//   node generate.js localhost:50051 "Why is the sky blue?" --deadline-s 30 --cancel-after 20
//
// Both options may be left out. In a project of your own, copy protos/ and say below where it is.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../../protos", import.meta.url));

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    "deadline-s": { type: "string" }, // seconds for the whole call
    "cancel-after": { type: "string" }, // tokens
  },
});
const [target, prompt] = positionals;
if (prompt === undefined) {
  console.error("usage: node generate.js TARGET PROMPT [--deadline-s S] [--cancel-after TOKENS]");
  process.exit(2);
}
const cancelAfter = Number(options["cancel-after"] ?? Infinity);
const deadlineS = Number(options["deadline-s"] ?? Infinity);

const { griffin } = grpc.loadPackageDefinition(
  loadSync("griffin/v1/generation.proto", {
    includeDirs: [PROTOS],
    keepCase: true, // max_tokens, not maxTokens
    defaults: true, // an empty text is "", not undefined
    enums: String,
    longs: Number,
  }),
);
const client = new griffin.v1.GenerationService(target, grpc.credentials.createInsecure());

// A field that is left out takes the server's default: greedy, on the dense model. To sample, add
// sampling: { temperature: 0.7, top_p: 0.9 }; to prune, pruning: { density: 0.75 }.
const call = client.generate(
  {
    messages: [{ role: "user", content: prompt }],
    stopping: { max_tokens: 256 },
  },
  // The server is told, and stops by itself. Without a deadline a call may last for ever.
  { deadline: Date.now() + 1000 * deadlineS },
);

let received = 0;
try {
  // Each response is { started } or { tokens } or, the last, { finished }.
  for await (const { tokens, finished } of call) {
    if (tokens) {
      process.stdout.write(tokens.text);
      received += tokens.ids.length;
    }
    if (finished) console.error(`\n${finished.reason}`);
    // The server frees the session, and this loop ends with CANCELLED.
    if (received >= cancelAfter) call.cancel();
  }
} catch (error) {
  if (!(error.code in grpc.status)) throw error;
  console.error(`\n${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
