// Builds dist/: the ES module, the plain script, and the types. `npm run build -- FOLDER` puts the first two there as well.
import { execFileSync } from "node:child_process";
import { cpSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const common = { absWorkingDir: here, bundle: true, minify: true, target: "es2020", charset: "utf8" };
const banner = { js: "/*! aistream-client, MIT */" };

rmSync(join(here, "dist"), { recursive: true, force: true });
await build({ ...common, banner, entryPoints: ["src/index.ts"], format: "esm", outfile: "dist/aistream.mjs" });
await build({ ...common, banner, entryPoints: ["src/global.ts"], format: "iife", outfile: "dist/aistream.js" });
execFileSync(process.execPath, [createRequire(import.meta.url).resolve("typescript/bin/tsc"), "--project", here], { stdio: "inherit" });
rmSync(join(here, "dist", "global.d.ts"));
for (const folder of process.argv.slice(2)) {
  for (const name of ["aistream.mjs", "aistream.js"]) cpSync(join(here, "dist", name), join(folder, name));
}
