import { StreamError, connectToStream, stream } from "./index.js";

Object.assign(globalThis, { aistream: { connectToStream, stream, StreamError } });
