// Build what ddpmctl ships for its pages: npm ci && npm run build. The result is the same for the same versions in package-lock.json.

import { mkdir, readFile, writeFile } from "node:fs/promises";
import { gzipSync } from "node:zlib";

import { build } from "esbuild";

const out = new URL("../assets/page/", import.meta.url);
const modules = new URL("./node_modules/", import.meta.url);
const holders = { "onnxruntime-web": "Copyright (c) Microsoft Corporation", "@noble/hashes": "Copyright (c) 2022 Paul Miller (https://paulmillr.com)" };

await mkdir(out, { recursive: true });
for (const entry of ["page", "engine"]) {
  await build({
    entryPoints: [`src/${entry}.ts`], outfile: new URL(`${entry}.js`, out).pathname,
    bundle: true, minify: true, format: "iife", target: "es2022", charset: "ascii", legalComments: "none", logLevel: "warning",
    define: { "import.meta.url": "self.location.href" }, // a page that lies in a file can start no module as a worker
  });
}
const runtime = await readFile(new URL("onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", modules));
await writeFile(new URL("runtime.wasm.gz", out), gzipSync(runtime, { level: 9 }));
const terms = (await readFile(new URL("@noble/hashes/LICENSE", modules), "utf8")).split(/\n\n/).slice(2).join("\n\n").trim();
const notices = await Promise.all(Object.entries(holders).map(async ([name, holder]) => {
  const { version, license } = JSON.parse(await readFile(new URL(`${name}/package.json`, modules), "utf8"));
  if (license !== "MIT") throw new Error(`${name} has the licence ${license}`);
  return `${name} ${version}: ${holder}`;
}));
await writeFile(new URL("licences.txt", out), `${notices.join("\n")}\n\nEach of them under the MIT licence:\n\n${terms}\n`);
