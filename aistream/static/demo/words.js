/** How the page writes numbers, durations and values. Pure functions: no element, no state. */

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** A number as a person reads it: 1,204 or 33.2. */
export const number = (value) => plain.format(value);

/** Milliseconds in the unit a reader would choose. */
export const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${plain.format(ms / 1000)} s`);

/** "1 character", "1,204 characters". */
export const counted = (count, noun) => `${plain.format(count)} ${noun}${count === 1 ? "" : "s"}`;

/** Characters as people and Python count them, not as UTF-16 does. */
export function codePoints(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** A flat value in one line. */
export function describe(value) {
  if (value === null || typeof value !== "object") return String(value);
  return Object.entries(value).map(([key, member]) => `${key} ${member}`).join(", ");
}
