// Streams a completion to stdout:
//
//   node generate.js localhost:50051 "Why is the sky blue?" --deadline-s 30 --cancel-after 20
//
// Both options may be left out. GRIFFIN_CA_CERT in the environment names the file of the authority
// that the server's certificate comes from, GRIFFIN_CLIENT_CERT and GRIFFIN_CLIENT_KEY the client's
// own; GRIFFIN_API_KEY is a key or a token that says who calls, and is sent over TLS only. To use
// this in another project, copy protos/ there and set PROTOS.

import { readFileSync } from "node:fs";
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
    keepCase: true, // names stay max_tokens and do not become maxTokens
    defaults: true, // an empty text is "" and not undefined
    enums: String,
    longs: Number,
  }),
);
const client = new griffin.v1.GenerationService(target, credentials());

// A field that is left out takes the server's default: greedy decoding on the dense model. To
// sample, add sampling: { temperature: 0.7, top_p: 0.9 }; to prune, pruning: { density: 0.75 }.
const call = client.generate(
  {
    messages: [{ role: "user", content: prompt }],
    stopping: { max_tokens: 256 },
  },
  // The server knows the deadline and stops by itself. Without one a call has no time limit.
  { deadline: Date.now() + 1000 * deadlineS },
);

// How the connection is encrypted, and who calls.
function credentials() {
  const {
    GRIFFIN_CA_CERT: ca,
    GRIFFIN_CLIENT_CERT: cert,
    GRIFFIN_CLIENT_KEY: key,
    GRIFFIN_API_KEY: secret,
  } = process.env;
  if (!ca && !cert && !secret) return grpc.credentials.createInsecure();
  const read = (path) => (path ? readFileSync(path) : null);
  const tls = grpc.credentials.createSsl(read(ca), read(key), read(cert));
  if (!secret) return tls;
  const caller = grpc.credentials.createFromMetadataGenerator((_, done) => {
    const metadata = new grpc.Metadata();
    metadata.set("authorization", `Bearer ${secret}`);
    done(null, metadata);
  });
  return grpc.credentials.combineChannelCredentials(tls, caller);
}

let received = 0;
try {
  // The first response is { started }, then { tokens } follow, and the last is { finished }.
  for await (const { tokens, finished } of call) {
    if (tokens) {
      process.stdout.write(tokens.text);
      received += tokens.ids.length;
    }
    if (finished) console.error(`\n${finished.reason}`);
    // The server then frees the session, and this loop ends with CANCELLED.
    if (received >= cancelAfter) call.cancel();
  }
} catch (error) {
  if (!(error.code in grpc.status)) throw error;
  console.error(`\n${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
