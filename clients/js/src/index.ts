export { connectToStream } from "./connection.js";
export { StreamError } from "./errors.js";
export { stream } from "./stream.js";
export type { CommonOptions, Connection, Ending, Lost, Opened, Options, Start, TextStream, Usage } from "./types.js";
