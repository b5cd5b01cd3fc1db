/** Called for each event with its type (`message` unless it has one), its data, and its id where it has one of its own. */
export type Dispatch = (type: string, data: string, id?: string) => void;

/**
 * Server-Sent Events as the WHATWG has them (HTML 9.2.6), fed with decoded text that may be cut anywhere.
 *
 * What stands behind the last blank line when the text ends is not dispatched: its event comes again with the next line.
 * `retry` is ignored, since the connection has a back-off of its own.
 */
export function eventParser(dispatch: Dispatch): (text: string) => void {
  let rest = "";
  let afterCr = false;
  let type = "";
  let data: string[] = [];
  let id: string | undefined;

  const readLine = (line: string): void => {
    if (!line) {
      if (data.length) {
        dispatch(type || "message", data.join("\n"), id);
        id = undefined;
      }
      data = [];
      type = "";
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    // One space after the colon is no part of the value.
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (field === "data") data.push(value);
    else if (field === "event") type = value;
    else if (field === "id" && !value.includes("\0")) id = value;
  };

  return (text) => {
    if (!text) return;
    // A CR ends its line at once: waiting for the LF of a CRLF would hold back an event until the next one.
    if (afterCr && text[0] === "\n") text = text.slice(1);
    afterCr = text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    lines[0] = rest + lines[0];
    rest = lines.pop() as string;
    lines.forEach(readLine);
  };
}
