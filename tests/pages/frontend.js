/**
 * A front end as simple as the original README describes one: every message is a piece of the answer, `[DONE]` completes
 * it, and any error at all is the end. It knows nothing of reconnecting, ids or event types.
 */
"use strict";

const seen = { chunks: [], completed: 0, failed: 0, data: null, afterwards: 0 };

function connect(streamUrl, { onChunk, onComplete, onFailure }) {
  const source = new EventSource(streamUrl);
  source.onmessage = ({ data }) => {
    if (data !== "[DONE]") return onChunk(data);
    source.close();
    onComplete();
  };
  source.onerror = (event) => {
    source.close();
    onFailure(event);
  };
}

/** Shows one answer on the page, and counts in `seen` what was called. */
function chat(streamUrl) {
  const over = () => seen.completed + seen.failed > 0;
  const say = (outcome) => { document.getElementById("outcome").textContent = outcome; };
  connect(streamUrl, {
    onChunk: (chunk) => {
      seen.afterwards += over();
      seen.chunks.push(chunk);
      document.getElementById("chat").append(chunk);
    },
    onComplete: () => {
      seen.afterwards += over();
      seen.completed += 1;
      say("complete");
    },
    onFailure: (event) => {
      seen.afterwards += over();
      seen.failed += 1;
      seen.data = event.data ?? null;
      say("failed");
    },
  });
}
